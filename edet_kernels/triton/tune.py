"""Finds the fastest configurations on the GPU at hand: ``python -m edet_kernels.triton.tune``.

Every kernel is timed with every candidate on maps of some widths and sizes; the table of the GPU
(configs.tuned_file) is then replaced in one step. Entries of other kernels, dtypes, widths and
sizes stay. A candidate that does not compile or does not fit the GPU is left out.
"""

from __future__ import annotations

import argparse
import itertools
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial

import torch
from torch import Tensor

from ..names import ACTIVATIONS, FUSIONS, POOLS
from ..packing import pack_depthwise, pack_pointwise
from . import configs
from .fusion_node import fusion_node
from .lateral import lateral, lateral_backward
from .separable_conv import separable_conv, separable_conv_backward
from .weighted_fusion import weighted_fusion, weighted_fusion_backward

CHANNELS = (64, 88, 160, 384)  # BiFPN widths of D0, D1, D3 and D7x
SIDES = (8, 32, 64, 256)  # of square maps: coarse levels, D0's finest, large batches of it

_FAST, _SWISH, _NONE = FUSIONS.index("fast"), ACTIVATIONS.index("swish"), ACTIVATIONS.index("none")
_SAME = POOLS.index("same")

Call = Callable[[], object]
Timer = Callable[[Call], float]


def candidates(kernel: str) -> Iterator[configs.Config]:
    """The configurations to be tried."""
    values: dict[str, Sequence[int]] = {
        "BLOCK_P": (16, 32, 64, 128),
        "BLOCK_N": (64, 128),
        "BLOCK_K": (16, 32, 64),
        "num_warps": (2, 4, 8),
        "num_stages": (1, 3),
        "launches": (1, 2),
        "splits": (32, 128),
    }
    fields = configs.FIELDS[kernel]
    seen_split = False
    for numbers in itertools.product(*(values[field] for field in fields)):
        config = dict(zip(fields, numbers, strict=True))
        if config.get("launches") == 2:
            # other kernels run, so that the rest of the configuration makes no difference
            if seen_split:
                continue
            seen_split = True
        yield config


def call(kernel: str, dtype: torch.dtype, channels: int, side: int, device: torch.device) -> Call:
    """A call that runs ``kernel`` on maps of side × side pixels."""
    random = torch.Generator(device).manual_seed(0)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=random, device=device)

    def map(side: int) -> Tensor:
        x = normal(1, channels, side, side).to(dtype)
        return x.contiguous(memory_format=torch.channels_last)

    size = [side, side]
    x = map(side)
    dw = pack_depthwise(normal(channels, 1, 3, 3))
    pw = pack_pointwise(normal(channels, channels, 1, 1))
    scale, shift = normal(channels), normal(channels)
    # a top-down and a bottom-up node are between these: one input as it is, two resized
    inputs, edges = [x, map(-(-side // 2)), map(2 * side)], torch.ones(3, device=device)
    separable = ([x], dw, pw, scale[None], shift[None], _SWISH)
    projections = (x, [pw], [scale], [shift], 0, _SAME)
    fusion = (inputs, edges, size, _FAST, _SAME, _SWISH)
    calls: dict[str, Call] = {
        "weighted_fusion": partial(weighted_fusion, *fusion),
        "weighted_fusion_backward": partial(weighted_fusion_backward, x, *fusion),
        "fusion_node": partial(
            fusion_node, inputs, edges, dw, pw, scale, shift, size, _FAST, _SAME, _SWISH, _NONE
        ),
        "separable_conv": partial(separable_conv, *separable),
        "lateral": partial(lateral, *projections),
        "pointwise_backward": partial(lateral_backward, [x], *projections),
        "weight_backward": partial(lateral_backward, [x], *projections),
        "depthwise_backward": partial(separable_conv_backward, [x], *separable),
    }
    return calls[kernel]


def _milliseconds(run: Call) -> float:
    from triton.testing import do_bench

    return float(do_bench(run, quantiles=[0.5]))


def best(
    kernel: str,
    run: Call,
    timer: Timer = _milliseconds,
    among: Iterable[configs.Config] | None = None,
) -> tuple[float, configs.Config]:
    """The time and the fastest configuration of ``kernel`` in ``run``.

    Raises:
        RuntimeError: no candidate runs on this GPU.
    """
    found: list[tuple[float, configs.Config]] = []
    problem: Exception | None = None
    for config in candidates(kernel) if among is None else among:
        with configs.forced({kernel: config}):
            try:
                found.append((timer(run), config))
            except Exception as error:  # too much shared memory, too many registers, no compilation
                problem = error
    if not found:
        raise RuntimeError(f"no configuration of {kernel} runs: {problem}") from problem
    return min(found, key=lambda pair: pair[0])


def merged(old: Sequence[configs.Entry], new: Sequence[configs.Entry]) -> list[configs.Entry]:
    """``new`` and the entries of ``old`` that it does not replace, in order."""

    def key(entry: configs.Entry) -> tuple[str, str, int, int]:
        return entry["kernel"], entry["dtype"], entry["channels"], entry["pixels"]

    return sorted({key(entry): entry for entry in (*old, *new)}.values(), key=key)


def main(arguments: Sequence[str] | None = None) -> int:
    """The command; returns its exit code."""
    parser = argparse.ArgumentParser(
        prog="python -m edet_kernels.triton.tune",
        description="Time the Triton kernels on this GPU and keep the fastest configurations.",
    )
    kernels = list(configs.FIELDS)
    parser.add_argument("--kernels", nargs="+", choices=kernels, default=kernels, metavar="KERNEL",
                        help=f"of {', '.join(kernels)}; default: all")  # fmt: skip
    parser.add_argument("--dtypes", nargs="+", choices=configs.DTYPES, default=["float16"])
    parser.add_argument("--channels", nargs="+", type=int, default=CHANNELS, metavar="C")
    parser.add_argument("--sides", nargs="+", type=int, default=SIDES, metavar="PIXELS",
                        help="sides of square maps")  # fmt: skip
    options = parser.parse_args(arguments)
    if not torch.cuda.is_available():
        print("tuning needs a GPU, and torch finds no CUDA GPU; nothing was written",
              file=sys.stderr)  # fmt: skip
        return 1
    device = torch.device("cuda", torch.cuda.current_device())
    file = configs.tuned_file(torch.cuda.get_device_name(device))
    entries: list[configs.Entry] = []
    for kernel, dtype, channels, side in itertools.product(
        options.kernels, options.dtypes, options.channels, options.sides
    ):
        run = call(kernel, getattr(torch, dtype), channels, side, device)
        milliseconds, config = best(kernel, run)
        entry = {"kernel": kernel, "dtype": dtype, "channels": channels, "pixels": side * side}
        print(
            f"{kernel} {dtype} C={channels} {side}×{side}: {milliseconds:.4f} ms with {config}",
            flush=True,
        )
        entries.append({**entry, "config": config})
    configs.write(file, merged(configs.read(file) if file.is_file() else [], entries))
    configs.clear()
    print(f"wrote {file}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
