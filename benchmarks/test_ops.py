"""Microbenchmarks of the ops with pytest-benchmark: ``pytest benchmarks/test_ops.py``.

Each op as PyTorch's eager layers, as those compiled, and fused; the fusions by softmax, fast and
unbounded weights. A result that differs from the reference is an error, not a time.
``--benchmark-json FILE`` keeps the times, ``--benchmark-compare`` compares them.
"""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import edet_kernels
from benchmarks.gpu import shapes_of
from edet.models.configs import get_config
from edet_kernels import reference
from edet_kernels.testing import model_samples
from edet_kernels.testing.model_samples import MODEL_SAMPLES, Shapes
from edet_kernels.testing.numeric import check_detections, check_network, relative_difference
from edet_kernels.testing.samples import Call, Maker, tensors

# compilers warn about themselves
pytestmark = pytest.mark.filterwarnings("ignore")

VARIANTS = ("eager", "compiled", "fused")
FUSIONS = ("softmax", "fast", "unbounded")
#: Models whose shapes are used, each at its own image size.
MODELS = ("d0", "d3")


def make_call(op: str, make: Maker, shapes: Shapes, fusion: str) -> Call:
    """A call of ``op``: a node of three maps, a cell, the class head, or others."""
    c, sizes = shapes.width, shapes.sizes
    if op in ("weighted_fusion", "fusion_node"):
        # as it is, enlarged, max-pooled
        maps = make.maps(c, [sizes[1], sizes[2], sizes[0]])
        weights = (1 + make.weight(3, scale=0.3), *make.separable(c, c))
        options = {"size": sizes[1], "fusion": fusion}
        return Call(op, maps, weights if op == "fusion_node" else weights[:1], options)
    if op == "bifpn":
        call = model_samples.bifpn(make, shapes)
        edges = 1 + make.weight(*call.weights[0].shape, scale=0.3)
        options = {**call.options, "fusion": fusion}
        return replace(call, weights=(edges, *call.weights[1:]), options=options, unpacked=None)
    if op == "nms":
        corners, sides = 512 * torch.rand(make.batch, 1000, 2), 64 * torch.rand(make.batch, 1000, 2)
        boxes = torch.cat([corners, corners + sides], dim=-1)
        labels = torch.randint(90, (make.batch, 1000))
        return Call(op, boxes, (torch.rand(make.batch, 1000), labels))
    return MODEL_SAMPLES[op](make, shapes)


def check_call(name: str, call: Call, found: Any) -> None:
    """Checks a result against the reference by the error rule of networks: a head is five layers.

    Raises:
        CheckFailed: it is wrong.
    """
    results, own = tensors(found), tensors(call.run(getattr(reference, call.op)))
    if call.op == "detect":
        check_detections(name, results, own)
    elif call.op == "nms":
        assert all(torch.equal(x, y) for x, y in zip(results, own, strict=True))
    else:
        exact = tensors(call.reference(torch.float64))
        mine, theirs = (relative_difference(x, exact) for x in (results, own))
        check_network(name, mine, theirs, torch.float32)


def run(benchmark: Any, op: str, model: str, variant: str, fusion: str = "fast") -> None:
    """Checks a variant of an op, then times it."""
    torch.manual_seed(0)
    shapes = shapes_of(replace(get_config(f"tf_efficientdet_{model}"), cells=1))
    call = make_call(op, Maker(torch.float32, 1), shapes, fusion)
    eager = getattr(reference, op)
    function = getattr(edet_kernels, op) if variant == "fused" else eager
    if variant == "compiled":
        torch._dynamo.reset()
        function = torch.compile(eager, dynamic=False)
    benchmark.group = " ".join([op, model, call.options.get("fusion", "")])
    with torch.inference_mode():
        check_call(f"{op}, {variant}", call, call.run(function))
        benchmark(function, call.maps, *call.weights, **call.options)


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
