"""Whole detectors through torch.compile, torch.export, AOTInductor and ONNX."""

from __future__ import annotations

import itertools
import logging
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import edet
import edet_kernels
from edet.detection.anchors import generate_anchors
from edet.detection.postprocess import postprocess
from exported_calls import documented

Results = tuple[Tensor, Tensor, Tensor, Tensor]

# compilers warn about themselves
pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore")]


class Backbone(nn.Module):
    """Strided convolutions to strides 8, 16 and 32: what a compiler takes no time over."""

    channels = (8, 16, 24)

    def __init__(self) -> None:
        super().__init__()
        widths = (3, 8, 8, 8, 16, 24)
        self.convs = nn.ModuleList(nn.Conv2d(a, b, 3, 2, 1) for a, b in itertools.pairwise(widths))

    def forward(self, x: Tensor) -> list[Tensor]:
        maps = []
        for conv in self.convs:
            x = F.silu(conv(x))
            maps.append(x)
        return maps[-3:]


class Predictor(nn.Module):
    """From images to a fixed number of detections."""

    def __init__(self) -> None:
        super().__init__()
        self.model = edet.create_model(
            "tf_efficientdet_d0",
            width=16,
            cells=1,
            head_repeats=1,
            num_classes=3,
            backbone=Backbone(),
        )

    def forward(self, images: Tensor) -> Results:
        return postprocess(*self.model(images), self.model.config, image_size=images.shape[-2:])


@pytest.fixture
def predictor() -> nn.Module:
    return Predictor().eval()


def assert_same(found: Results, expected: Results) -> None:
    assert expected[3].min() > 0
    for x, y in zip(found, expected, strict=True):
        torch.testing.assert_close(x, y, rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize(
    ("name", "anchors"),
    [
        ("tf_efficientdet_d0", {}),
        ("tf_efficientdet_lite0", {"anchor_scale": 3.0}),
        ("tf_efficientdet_lite3x", {"anchor_scale": 3.0}),
        ("tf_efficientdet_d7", {"anchor_scale": 5.0}),
        ("tf_efficientdet_d7x", {"max_level": 8}),
    ],
)
def test_the_documented_way_from_images_to_boxes(name: str, anchors: dict[str, float]) -> None:
    size = {"width": 16, "cells": 1, "head_repeats": 1, "num_classes": 3}
    model = edet.create_model(name, **size, backbone=Backbone()).eval()
    images = torch.randn(1, 3, 96, 160)
    with torch.no_grad():
        expected = postprocess(*model(images), generate_anchors((96, 160), **anchors))
    names = {"torch": torch, "edet_kernels": edet_kernels, "model": model, "images": images}
    exec(documented("def predict"), names)
    with torch.no_grad():
        assert_same(names["predict"](images), expected)
    exec(documented("class EndToEnd"), names)
    assert_same(names["program"].module()(images), expected)


@torch.no_grad()
def test_compiled_once_for_all_sizes(predictor: nn.Module) -> None:
    from torch._dynamo.testing import CompileCounterWithBackend

    torch.compiler.reset()
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(predictor, backend=counter, fullgraph=True)
    images = torch.randn(1, 3, 192, 256)
    for _ in range(2):
        assert_same(compiled(images), predictor(images))
    assert counter.frame_count == 1
    # a second batch size and a second image size make those dynamic, and then nothing is compiled
    for shape in ((2, 3, 192, 256), (2, 3, 256, 320)):
        compiled(torch.randn(shape))
    seen = counter.frame_count
    for shape in ((3, 3, 320, 384), (5, 3, 384, 448), (2, 3, 448, 320)):
        images = torch.randn(shape)
        assert_same(compiled(images), predictor(images))
    assert counter.frame_count == seen


@torch.no_grad()
def test_aotinductor_package(predictor: nn.Module, tmp_path: Path) -> None:
    images = torch.randn(2, 3, 64, 96)
    with edet_kernels.backend("cpu"):  # asked for by name: export records the fused ops
        program = torch.export.export(predictor, (images,))
    ops = {str(node.target) for node in program.graph.nodes if "edet_kernels" in str(node.target)}
    assert ops == {f"edet_kernels.{op}.default" for op in ("lateral", "bifpn", "head", "detect")}
    assert_same(program.module()(images), predictor(images))
    path = torch._inductor.aoti_compile_and_package(
        program,
        package_path=str(tmp_path / "detector.pt2"),
        # weights are packed when the package is loaded, not in every call
        inductor_configs={"aot_inductor.use_runtime_constant_folding": True},
    )
    loaded = torch._inductor.aoti_load_package(path)
    for _ in range(2):
        assert_same(tuple(loaded(images)), predictor(images))
        images = torch.randn(2, 3, 64, 96)


class Block(nn.Module):
    """An inverted residual block without expansion and squeeze-excite."""

    def __init__(self) -> None:
        super().__init__()
        self.depthwise = nn.ParameterList([torch.randn(8, 1, 3, 3), torch.rand(8), torch.randn(8)])
        self.project = nn.ParameterList([torch.randn(8, 8, 1, 1), torch.rand(8), torch.randn(8)])

    def forward(self, x: Tensor) -> Tensor:
        return edet_kernels.mbconv(x, None, list(self.depthwise), None, list(self.project))


@torch.no_grad()
def test_parts_that_are_none_in_a_package(tmp_path: Path) -> None:
    """AOTInductor hands an empty list on as None."""
    block, x = Block().requires_grad_(False), torch.randn(1, 8, 6, 5)
    with edet_kernels.backend("cpu"):
        program = torch.export.export(block, (x,))
        expected = block(x)
    [node] = [n for n in program.graph.nodes if "mbconv" in str(n.target)]
    assert all(argument != [] for argument in node.args)
    path = torch._inductor.aoti_compile_and_package(
        program, package_path=str(tmp_path / "block.pt2")
    )
    torch.testing.assert_close(torch._inductor.aoti_load_package(path)(x), expected)


@pytest.mark.parametrize("strict", [False, True])
def test_a_dynamic_height_or_width_is_refused_at_export(strict: bool) -> None:
    size = {"width": 16, "cells": 1, "head_repeats": 1, "num_classes": 3}
    model = edet.create_model("tf_efficientdet_d0", **size, backbone=Backbone()).eval()
    images, dynamic = torch.randn(2, 3, 64, 96), torch.export.Dim.DYNAMIC
    words = "fixed_height_and_width" if strict else "must have a fixed height and width"
    for axes in ({2: dynamic}, {0: dynamic, 2: dynamic, 3: dynamic}):
        with torch.no_grad(), pytest.raises(Exception, match=words):
            torch.export.export(model, (images,), dynamic_shapes={"images": axes}, strict=strict)
    with torch.no_grad():
        program = torch.export.export(
            model, (images,), dynamic_shapes={"images": {0: dynamic}}, strict=strict
        )
        images = torch.randn(5, 3, 64, 96)
        for found, wanted in zip(program.module()(images), model(images), strict=True):
            for x, y in zip(found, wanted, strict=True):
                torch.testing.assert_close(x, y, rtol=1e-4, atol=1e-4)


@torch.no_grad()
def test_onnx_keeps_the_asymmetric_padding(predictor: Predictor, tmp_path: Path) -> None:
    onnx = pytest.importorskip("onnx")
    pytest.importorskip("onnxscript")
    runtime = pytest.importorskip("onnxruntime")
    logging.getLogger("torch.onnx").setLevel(logging.ERROR)
    images = torch.randn(1, 3, 64, 96)
    program = torch.onnx.export(
        predictor.model, (images,), input_names=["images"], dynamo=True, verbose=False
    )
    assert program is not None
    file = tmp_path / "network.onnx"
    program.save(file)
    graph = onnx.load(file).graph
    # the standard graph, runnable anywhere
    assert {node.domain for node in graph.node} == {""}
    assert {"Conv", "MaxPool", "Pad"} <= {node.op_type for node in graph.node}
    values = {c.name: onnx.numpy_helper.to_array(c) for c in graph.initializer}
    values |= {
        node.output[0]: onnx.numpy_helper.to_array(node.attribute[0].t)
        for node in graph.node
        if node.op_type == "Constant" and node.attribute[0].name == "value"
    }
    pooled = {node.input[0] for node in graph.node if node.op_type == "MaxPool"}
    pads = [node for node in graph.node if node.op_type == "Pad" and node.output[0] in pooled]
    assert len(pads) == len(pooled)
    for pad in pads:
        assert float(values[pad.input[2]]) == float("-inf")
    # of even sizes the odd pixel is at the end: rows and columns, before and after
    amounts = {tuple(values[pad.input[1]].tolist()) for pad in pads}
    assert (0, 0, 0, 0, 0, 0, 1, 1) in amounts

    session = runtime.InferenceSession(str(file), providers=["CPUExecutionProvider"])
    found = session.run(None, {"images": images.numpy()})
    classes, boxes = predictor.model(images)
    for x, y in zip(found, [*classes, *boxes], strict=True):
        torch.testing.assert_close(torch.from_numpy(x), y, rtol=1e-4, atol=1e-4)
