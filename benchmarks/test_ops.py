"""Microbenchmarks of the ops with pytest-benchmark: ``pytest benchmarks/test_ops.py``.

Each op as PyTorch's eager layers, as those compiled, and fused; the fusions by softmax, fast and
unbounded weights. A result that differs from the reference is an error, not a time.
``--benchmark-json FILE`` keeps the times, ``--benchmark-compare`` compares them.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import edet_kernels
from benchmarks.gpu import CASES, Case, Maker
from edet.bench.stages import check, check_detections, relative_difference
from edet.layers import bifpn_nodes
from edet.models.configs import get_config
from edet_kernels import reference

VARIANTS = ("eager", "compiled", "fused")
FUSIONS = ("softmax", "fast", "unbounded")
#: Models whose shapes are used, each at its own image size.
MODELS = ("d0", "d3")


def make_case(op: str, make: Maker, fusion: str) -> Case:
    """A call of ``op``: a node of three maps, a cell, a head layer, the class head, or others."""
    c, levels = make.config.width, range(make.config.levels)
    sizes = [make.size(level) for level in levels]
    pyramid = [make.map(c, size) for size in sizes]
    if op in ("weighted_fusion", "fusion_node"):
        maps = [pyramid[1], pyramid[2], pyramid[0]]  # as it is, enlarged, max-pooled
        convs = make.separable(c, c) if op == "fusion_node" else ()
        return Case(
            op, (maps, 1 + make.weight(3, scale=0.3), *convs), {"size": sizes[1], "fusion": fusion}
        )
    if op == "bifpn":
        nodes = bifpn_nodes(len(sizes))
        dw, pw, scale, shift = map(list, zip(*(make.separable(c, c) for _ in nodes), strict=True))
        dw, pw = [*map(edet_kernels.pack_depthwise, dw)], [*map(edet_kernels.pack_pointwise, pw)]
        options = {
            "nodes": [node.edges for node in nodes],
            "sizes": [sizes[node.level] for node in nodes],
            "outputs": list(range(len(nodes), len(nodes) + len(sizes))),
            "fusion": fusion,
        }
        weights = 1 + make.weight(len(nodes), 3, scale=0.3)
        stacked = map(torch.stack, (dw, pw, scale, shift))
        return Case(op, (pyramid, weights, *stacked), options)
    if op == "head":
        layers = [make.separable(c, n) for n in (*[c] * make.config.head_repeats, 9 * 90)]
        dw, pw, scale, shift = map(list, zip(*layers, strict=True))
        for per_level in (scale, shift):
            per_level[:-1] = [x.expand(len(sizes), c).contiguous() for x in per_level[:-1]]
        return Case(op, (pyramid, dw, pw, scale, shift))
    if op == "nms":
        corners, sides = 512 * torch.rand(make.batch, 1000, 2), 64 * torch.rand(make.batch, 1000, 2)
        boxes = torch.cat([corners, corners + sides], dim=-1)
        labels = torch.randint(90, (make.batch, 1000))
        return Case(op, (boxes, torch.rand(make.batch, 1000), labels))
    return CASES[op](make)


def check_case(name: str, case: Case, found: Any) -> None:
    """Checks a result against the reference by the error rule.

    Raises:
        CheckFailed: it is wrong.
    """
    results = [found] if isinstance(found, torch.Tensor) else list(found)
    own = case.run(reference)
    if case.op == "detect":
        check_detections(name, results, own)
    elif case.op == "nms":
        assert all(torch.equal(x, y) for x, y in zip(results, own, strict=True))
    else:
        exact = case.to(torch.float64).run(reference)
        mine, theirs = (relative_difference(x, exact) for x in (results, own))
        check(name, mine, theirs, torch.float32)


def run(benchmark: Any, op: str, model: str, variant: str, fusion: str = "fast") -> None:
    """Checks a variant of an op, then times it."""
    torch.manual_seed(0)
    config = get_config(f"tf_efficientdet_{model}")
    case = make_case(op, Maker(config, 1, torch.float32, torch.device("cpu")), fusion)
    eager = getattr(reference, op)
    call = getattr(edet_kernels, op) if variant == "fused" else eager
    if variant == "compiled":
        torch._dynamo.reset()
        call = torch.compile(eager, dynamic=False)
    benchmark.group = " ".join([op, model, case.options.get("fusion", "")])
    with torch.inference_mode():
        check_case(f"{op}, {variant}", case, call(*case.arguments, **case.options))
        benchmark(call, *case.arguments, **case.options)


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("fusion", FUSIONS)
@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("op", ["weighted_fusion", "fusion_node", "bifpn"])
def test_fusion(benchmark: Any, op: str, model: str, fusion: str, variant: str) -> None:
    run(benchmark, op, model, variant, fusion)


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("op", ["separable_conv", "head", "lateral", "stem", "mbconv"])
def test_layers(benchmark: Any, op: str, model: str, variant: str) -> None:
    run(benchmark, op, model, variant)


# loops over boxes in Python are not compiled
@pytest.mark.parametrize("variant", ["eager", "fused"])
@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("op", ["nms", "detect"])
def test_detection(benchmark: Any, op: str, model: str, variant: str) -> None:
    run(benchmark, op, model, variant)
