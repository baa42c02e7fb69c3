"""Training of a BiFPN and its heads: step time and peak memory, fused and by PyTorch's layers.

    python benchmarks/train.py --model tf_efficientdet_d0 --batch 1

A step is a forward and a backward pass from fixed backbone maps to fixed gradients of the
predictions. Times are CPU milliseconds of all threads and wall milliseconds, the two ways in turns.
Memory is what torch's allocator held at most during the first step of a fresh process, above what
it held before (weights, maps, gradients of the predictions); the gradients of the weights and the
memory that the kernels keep for the next step are included. What oneDNN, which computes PyTorch's
convolutions, allocates for itself is not seen, so the layers' memory is a lower bound.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Callable

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


def peak_memory(function: Callable[[], None]) -> int:
    """Bytes that torch's CPU allocator held at most during a call, above what it held before."""
    with torch.autograd.profiler.profile(profile_memory=True) as profile:
        function()
    held = peak = 0
    for event in profile.kineto_results.events():
        if event.name() == "[memory]":
            held += event.nbytes()
            peak = max(peak, held)
    return peak


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="tf_efficientdet_d0")
    parser.add_argument("--size", type=int, help="of the images; the model's own when absent")
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--memory", choices=WAYS, help="print one way's peak memory and stop")
    args = parser.parse_args()
    torch.manual_seed(0)
    torch.set_num_threads(args.threads)
    model = edet.create_model(args.model)
    neck = Neck(model, args.batch, args.size or model.config.image_size[0])
    if args.memory:
        with edet_kernels.backend(WAYS[args.memory]):
            print(peak_memory(neck.step))
        return
    result = {"model": args.model, "batch": args.batch, "threads": args.threads}
    cpu: dict[str, list[float]] = {way: [] for way in WAYS}
    wall: dict[str, list[float]] = {way: [] for way in WAYS}
    for i in range(args.steps + 2):
        for way, backend in WAYS.items():
            with edet_kernels.backend(backend):
                start = time.process_time(), time.perf_counter()
                neck.step()
                if i >= 2:
                    cpu[way].append(1e3 * (time.process_time() - start[0]))
                    wall[way].append(1e3 * (time.perf_counter() - start[1]))
    for way in WAYS:
        command = [sys.executable, *sys.argv, "--memory", way]
        memory = int(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
        result[way] = {
            "cpu_ms": round(statistics.median(cpu[way]), 2),
            "wall_ms": round(statistics.median(wall[way]), 2),
            "peak_mib": round(memory / 2**20, 1),
        }
    print(json.dumps(result, indent=2))


if __name__ == "__main__":
    main()
