"""What is measured beside whole calls: operators, by number and by time, and the machine's name."""

from __future__ import annotations

import os
import platform
import time
from pathlib import Path
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from edet_kernels.testing.timing import Call

from ..models.efficientdet import EfficientDet


class Operations(TorchDispatchMode):
    """Counts and times operations that do work: neither views nor bare allocations."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0
        self.seconds = 0.0

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        start = time.perf_counter()
        result = func(*args, **(kwargs or {}))
        if not (func.is_view or func.overloadpacket.__name__.startswith("empty")):
            self.seconds += time.perf_counter() - start
            self.count += 1
        return result


class KernelTime:
    """A call of which only the time inside operators that do work is measured."""

    def __init__(self, call: Call) -> None:
        self.call = call

    def __call__(self) -> Any:
        return self.call()

    def seconds(self) -> float:
        """The time inside operators of one call."""
        with Operations() as operations:
            self.call()
        return operations.seconds


@torch.no_grad()
def count_operations(model: EfficientDet) -> dict[str, int]:
    """Operations that each part of ``model`` dispatches: on a GPU, about as many kernel launches.

    Views and allocations are not counted; a fused op is one operation. The image is as small as the
    pyramid allows, which does not change the counts.

    Returns:
        a count for each of ``backbone``, ``fpn``, ``class_net`` and ``box_net``.
    """
    parameter = next(model.parameters())
    side = 2 ** (model.config.max_level + 1)
    maps: Any = torch.zeros(1, 3, side, side, dtype=parameter.dtype, device=parameter.device)
    counts = {}
    for part in ("backbone", "fpn", "class_net", "box_net"):
        module = getattr(model, part)
        module(maps)  # packs the weights
        with Operations() as operations:
            out = module(maps)
        counts[part] = operations.count
        maps = out if part in ("backbone", "fpn") else maps
    return counts


def machine_name(device: torch.device) -> str:
    """The processor that ``device`` is, with its instruction set or memory."""
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        return f"{properties.name}, {properties.total_memory / 2**30:.0f} GiB"
    name = platform.processor() or platform.machine()
    info = Path("/proc/cpuinfo")
    if info.exists():
        lines = (line.partition(":") for line in info.read_text().splitlines())
        name = next((value.strip() for key, _, value in lines if key.strip() == "model name"), name)
    return f"{name}, {os.cpu_count()} cores, {torch.backends.cpu.get_cpu_capability()}"
