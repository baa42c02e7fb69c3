"""Microbenchmarks of the ops with pytest-benchmark: ``pytest benchmarks/test_ops.py``.

Each op as PyTorch's eager layers, as those compiled, and fused; the fusions by softmax, fast and
unbounded weights. A result that differs from the float64 reference is an error, not a time.
``--benchmark-json FILE`` keeps the times, ``--benchmark-compare`` compares them.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch

import edet_kernels
from edet.bench import check, relative_difference
from edet_kernels import reference

VARIANTS = ("eager", "compiled", "fused")
FUSIONS = ("softmax", "fast", "unbounded")
#: Channels and the side of P3: D0 at 512×512, D3 at 896×896.
SIZES = {"d0": (64, 64), "d3": (160, 112)}


def inputs(op: str, size: str) -> tuple[list[Any], dict[str, Any]]:
    """Arguments of an op: a BiFPN node of three maps, a head layer, or a whole head."""
    generator = torch.Generator().manual_seed(0)

    def random(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator)

    c, side = SIZES[size]
    same, up, down = (
        random(1, c, s, s).contiguous(memory_format=torch.channels_last)
        for s in (side, side // 2, 2 * side)
    )
    scale, shift = 1 + 0.1 * random(c), random(c)
    convs = [random(c, 1, 3, 3) / 3, random(c, c, 1, 1) / c**0.5]
    if op == "weighted_fusion":
        return [[same, up, down], 1 + 0.3 * random(3)], {"size": (side, side)}
    if op == "fusion_node":
        return [[same, up, down], 1 + 0.3 * random(3), *convs, scale, shift], {"size": (side, side)}
    levels = [random(1, c, side >> k, side >> k) for k in range(5)]
    levels = [x.contiguous(memory_format=torch.channels_last) for x in levels]
    if op == "separable_conv":
        return [levels, *convs, scale.expand(5, c), shift.expand(5, c)], {}
    layers = 4
    return [
        levels, [convs[0]] * layers, [convs[1]] * layers,
        [*[scale.expand(5, c).contiguous()] * (layers - 1), scale],
        [*[shift.expand(5, c).contiguous()] * (layers - 1), shift],
    ], {}  # fmt: skip


def doubled(value: Any) -> Any:
    """``value`` with all tensors in float64."""
    if isinstance(value, torch.Tensor):
        return value.double()
    return [doubled(v) for v in value] if isinstance(value, list) else value


def outputs(value: Any) -> list[torch.Tensor]:
    """One result or several, as a list."""
    return [value] if isinstance(value, torch.Tensor) else list(value)


def run(benchmark: Any, op: str, size: str, variant: str, **options: Any) -> None:
    """Checks a variant of an op, then times it."""
    arguments, keywords = inputs(op, size)
    keywords |= options
    eager = getattr(reference, op)
    call = {"eager": eager, "fused": getattr(edet_kernels, op)}.get(variant)
    benchmark.group = " ".join([op, size, *options.values()])
    with torch.inference_mode():
        if call is None:
            call = torch.compile(eager, dynamic=False)
        exact = outputs(eager(*doubled(arguments), **keywords))
        own, mine = (
            relative_difference(outputs(f(*arguments, **keywords)), exact) for f in (eager, call)
        )
        check(f"{op}, {variant}", mine, own, torch.float32)
        benchmark(call, *arguments, **keywords)


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("fusion", FUSIONS)
@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("op", ["weighted_fusion", "fusion_node"])
def test_fusion(benchmark: Any, op: str, size: str, fusion: str, variant: str) -> None:
    run(benchmark, op, size, variant, fusion=fusion)


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("op", ["separable_conv", "head"])
def test_head(benchmark: Any, op: str, size: str, variant: str) -> None:
    run(benchmark, op, size, variant)
