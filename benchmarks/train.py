"""A step of training: its time and peak memory, by PyTorch's layers and fused.

    python benchmarks/train.py --model tf_efficientdet_d0 --batch 4 --json result.json

A step is ``Trainer.step``: targets, the network forward, losses, backward, clipping, optimiser and
average; with ``--part neck`` the BiFPN and the heads alone, from fixed backbone maps to fixed
gradients of the predictions and back. Both ways take turns; times are CPU milliseconds of all
threads and wall milliseconds, and a ratio is that of two steps beside each other.

Memory is measured in a fresh process for each way, in its first step, above what was held before
(model, average, images): what torch's allocator held at most, and by how much the process grew
(``VmHWM``), which has in it what oneDNN and the C library take for themselves. Gradients,
moments and what the kernels keep for the next step are in both.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import edet
import edet_kernels

#: Name of a way to run a step, and the backend that makes it run so.
WAYS = {"layers": "reference", "fused": "auto"}


class Neck(nn.Module):
    """The BiFPN and both heads of a model, on random backbone maps."""

    def __init__(self, model: edet.EfficientDet, batch: int, size: int) -> None:
        super().__init__()
        self.fpn, self.class_net, self.box_net = model.fpn, model.class_net, model.box_net
        levels = range(model.config.min_level, 6)
        self.maps = [
            torch.randn(batch, c, -(-size >> n), -(-size >> n)).contiguous(
                memory_format=torch.channels_last
            )
            for n, c in zip(levels, model.fpn.in_channels, strict=True)
        ]
        with torch.no_grad():
            self.gradients = [torch.randn_like(x) for x in self.predictions()]

    def predictions(self) -> list[Tensor]:
        """All class and box maps."""
        pyramid = self.fpn(self.maps)
        return [*self.class_net(pyramid), *self.box_net(pyramid)]

    def step(self) -> None:
        """A forward and a backward pass."""
        for x in self.maps:
            x.requires_grad_()
            x.grad = None
        self.zero_grad()
        torch.autograd.backward(self.predictions(), self.gradients)


class Whole:
    """A trainer with a batch of random images, two objects in each."""

    def __init__(self, model: edet.EfficientDet, batch: int, size: int) -> None:
        self.trainer = edet.Trainer(model, steps=1000, batch_size=batch)
        self.images = torch.randn(batch, 3, size, size).contiguous(
            memory_format=torch.channels_last
        )
        box = torch.tensor([[0.1, 0.1, 0.4, 0.5], [0.3, 0.2, 0.9, 0.8]]) * size
        self.boxes, self.labels = [box] * batch, [torch.tensor([1, 2])] * batch

    def step(self) -> None:
        """A step of the trainer."""
        self.trainer.step(self.images, self.boxes, self.labels)


def allocated(function: Callable[[], None]) -> int:
    """Bytes that torch's CPU allocator held at most during a call, above what it held before."""
    with torch.autograd.profiler.profile(profile_memory=True) as profile:
        function()
    held = peak = 0
    for event in profile.kineto_results.events():
        if event.name() == "[memory]":
            held += event.nbytes()
            peak = max(peak, held)
    return peak


def grown(function: Callable[[], None]) -> int:
    """Bytes by which the process was larger at its largest during a call than before it."""

    def memory(name: str) -> int:
        lines = Path("/proc/self/status").read_text().splitlines()
        return next(int(x.split()[1]) << 10 for x in lines if x.startswith(name))

    before = memory("VmRSS")
    function()
    # and not ru_maxrss, which a process has from the one that started it
    return memory("VmHWM") - before


MEMORY = {"allocator": allocated, "process": grown}


def cpu_name() -> str:
    """The processor's name, as Linux has it."""
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    names = [line.split(":")[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor()


def times(make: Callable[[], Any], pairs: int) -> dict[str, Any]:
    """Times of both ways in turns, in ms, and the ratios fused / layers of the pairs."""
    cases = {way: make() for way in WAYS}
    cpu: dict[str, list[float]] = {way: [] for way in WAYS}
    wall: dict[str, list[float]] = {way: [] for way in WAYS}
    for i in range(pairs + 1):
        for way in WAYS if i % 2 else reversed(WAYS):
            with edet_kernels.backend(WAYS[way]):
                start = time.process_time(), time.perf_counter()
                cases[way].step()
                if i:  # the first one warms up
                    cpu[way].append(1e3 * (time.process_time() - start[0]))
                    wall[way].append(1e3 * (time.perf_counter() - start[1]))
    result: dict[str, Any] = {
        way: {
            "cpu_ms": round(statistics.median(cpu[way]), 1),
            "wall_ms": round(statistics.median(wall[way]), 1),
            "cpu_samples_ms": [round(t, 1) for t in cpu[way]],
        }
        for way in WAYS
    }
    ratios = [a / b for a, b in zip(cpu["fused"], cpu["layers"], strict=True)]
    return {**result, "cpu_ratio": round(statistics.median(ratios), 3)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="tf_efficientdet_d0")
    parser.add_argument("--part", choices=("step", "neck"), default="step")
    parser.add_argument("--size", type=int, help="of the images; the model's own when absent")
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--pairs", type=int, default=7, help="of steps, one of each way")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--json", type=Path, help="file to add the result to, a list of them")
    parser.add_argument("--memory", nargs=2, metavar=("WAY", "KIND"), help="print it and stop")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)

    def make() -> Any:
        torch.manual_seed(0)
        model = edet.create_model(args.model)
        part = Neck if args.part == "neck" else Whole
        return part(model, args.batch, args.size or model.config.image_size[0])

    if args.memory:
        way, kind = args.memory
        with edet_kernels.backend(WAYS[way]):
            print(MEMORY[kind](make().step))
        return
    result = {
        "model": args.model,
        "part": args.part,
        "size": args.size or edet.create_model(args.model).config.image_size[0],
        "batch": args.batch,
        "threads": args.threads,
        "cpu": cpu_name(),
        "cores": os.cpu_count(),
        "torch": torch.__version__,
        "date": datetime.now(timezone.utc).date().isoformat(),
        **times(make, args.pairs),
    }
    for way in WAYS:
        for kind in MEMORY:
            command = [sys.executable, *sys.argv, "--memory", way, kind]
            memory = int(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
            result[way][f"{kind}_peak_mib"] = round(memory / 2**20, 1)
    print(json.dumps(result, indent=2))
    if args.json:
        known = json.loads(args.json.read_text()) if args.json.exists() else []
        args.json.write_text(json.dumps([*known, result], indent=2) + "\n")


if __name__ == "__main__":
    main()
