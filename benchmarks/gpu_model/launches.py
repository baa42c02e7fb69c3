"""Which kernels a model launches, with which blocks and parameters: what the launchers say.

The emulation's launchers run in its dry mode, which lists launches and touches no memory, so that
D7 at batch 64 needs neither a GPU nor the memory of one.
"""

from __future__ import annotations

import functools
import importlib.util
import os
import re
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from benchmarks.gpu_model.sass import ROOT, plain_name
from benchmarks.gpu_model.work import Work, works_of

Extent = tuple[int, int, int]


@dataclass(frozen=True)
class Device:
    """What launchers ask of a GPU."""

    capability: int
    multiprocessors: int
    shared_bytes: int  # that one block may have


@dataclass(frozen=True)
class Launch:
    """One launch, or a memset, whose kernel has no name."""

    kernel: str
    grid: Extent
    block: Extent
    shared_bytes: int
    params: bytes
    pdl: bool
    pointers: bytes  # the parameters without what differs from run to run


@dataclass
class Call:
    """One call of an op.

    Attributes:
        op: its name.
        part: of the model: backbone, bifpn, heads.
        launches: what it launched.
        works: what each launch must at least do.
        shape: of the first map.
    """

    op: str
    part: str
    launches: list[Launch]
    works: list[Work]
    shape: tuple[int, ...]


@functools.cache
def emulation() -> Any:
    """The module edet_emulation of the newest build.

    Raises:
        RuntimeError: it is not built.
    """
    named = os.environ.get("EDET_EMULATED")
    built = sorted(ROOT.glob("build/*/edet_emulation.so"), key=lambda path: path.stat().st_mtime)
    if not built and not named:
        raise RuntimeError(
            "needs the emulation of the CUDA kernels: EDET_EMULATION=1 python setup.py build_ext "
            "--inplace"
        )
    path = named or str(built[-1])
    spec = importlib.util.spec_from_file_location("edet_emulation", path)
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    from edet_kernels import operators

    operators.register("edet_emulation")
    return module


@functools.cache
def _names() -> dict[int, str]:
    """The emulation's kernels by where their code is."""
    listing = subprocess.run(
        ["nm", "-C", emulation().__file__], capture_output=True, text=True, check=True
    ).stdout
    found = {}
    for line in listing.splitlines():
        if match := re.match(r"([0-9a-f]+) [tTwW] (.*edet::cuda::.*)", line):
            found[int(match[1], 16)] = plain_name(match[2])
    return found


def _launch(raw: dict[str, Any]) -> Launch:
    if raw["kernel"] == "memset":
        return Launch("", (0, 0, 0), (0, 0, 0), 0, b"", False, b"")
    params = bytes(raw["params"])
    words = [params[i : i + 8] for i in range(0, len(params), 8)]
    # addresses of this process differ from run to run; whether one is null matters. Those of a
    # program's own heap may have four bytes, more than any extent has
    same = b"".join(
        b"a" if w[6:] == b"\0\0" and (w[5] or (w[3] and not w[4])) else w for w in words
    )
    return Launch(_names()[raw["function"]], raw["grid"], raw["block"], raw["shared_bytes"], params,
                  raw["pdl"], same)  # fmt: skip


class Recorder(TorchDispatchMode):
    """Lists the ops that are called, with what each launched."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[Call] = []
        self.part = ""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        module = emulation()
        module.count_launches(True)
        result = func(*args, **(kwargs or {}))
        launches = [_launch(raw) for raw in module.launches()]
        if launches:
            op = str(func).split(".")[1]
            kernels = [launch.kernel for launch in launches if launch.kernel]
            works = iter(works_of(op, args, result, kernels))
            done = [next(works) if launch.kernel else Work() for launch in launches]
            first = args[0] if isinstance(args[0], torch.Tensor) else args[0][0]
            self.calls.append(Call(op, self.part, launches, done, tuple(first.shape)))
        return result


@contextmanager
def dry(device: Device, launch: str = "auto") -> Iterator[None]:
    """Ops of :mod:`edet_kernels` list their CUDA launches on a device, and compute nothing."""
    module = emulation()
    namespaces: Any = torch.ops
    before = namespaces.edet_kernels
    environment = {name: os.environ.get(name) for name in ("EDET_BACKEND", "EDET_CUDA_LAUNCH")}
    os.environ.update(EDET_BACKEND="cpu", EDET_CUDA_LAUNCH=launch)
    namespaces.edet_kernels = namespaces.edet_emulation
    module.set_device(device.multiprocessors, device.shared_bytes, device.capability)
    module.set_dry(True)
    try:
        yield
    finally:
        module.set_dry(False)
        module.count_launches(False)
        namespaces.edet_kernels = before
        for name, value in environment.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value


def of_model(
    name: str,
    batch: int,
    device: Device,
    launch: str = "auto",
    dtype: torch.dtype = torch.float16,
    fusion: str | None = None,
) -> list[Call]:
    """The calls of a model on uint8 images of its size, from pixels to detections, in order.

    Args:
        name: of the model, ``tf_efficientdet_d0``.
        batch: images.
        device: what launchers are told.
        launch: ``EDET_CUDA_LAUNCH``.
        dtype: of the maps.
        fusion: of the BiFPN's nodes; the model's own when None.
    """
    import edet
    from edet_kernels import detect

    model: Any = edet.create_model(name, fusion=fusion).eval().to(dtype)
    h, w = model.config.image_size
    recorder = Recorder()
    images = torch.empty(batch, 3, h, w, dtype=torch.uint8)
    with torch.inference_mode(), dry(device, launch), recorder:
        recorder.part = "backbone"
        maps = model.backbone.forward_pixels(images, *(torch.ones(3) for _ in range(2)))
        recorder.part = "bifpn"
        pyramid = model.fpn(maps)
        recorder.part = "heads"
        classes, boxes = model.class_net(pyramid), model.box_net(pyramid)
        recorder.part = "detections"
        numbers = sum(m.shape[1] * m.shape[2] * m.shape[3] for m in boxes)
        detect(classes, boxes, torch.empty(numbers // 4, 4), limits=torch.empty(batch, 2))
    return recorder.calls
