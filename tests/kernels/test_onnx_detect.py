"""``detect`` by ONNX's standard operators, in ONNX Runtime, against ``detect`` itself."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import edet_kernels

pytest.importorskip("onnx")
pytest.importorskip("onnxscript")
runtime = pytest.importorskip("onnxruntime")

# exporters warn about themselves
pytestmark = pytest.mark.filterwarnings("ignore")

SIZES, ANCHORS, CLASSES = ((8, 6), (4, 3)), 3, 4
COUNT = sum(h * w for h, w in SIZES) * ANCHORS


class Detect(nn.Module):
    """``detect`` of two levels, whose anchors overlap each other."""

    def __init__(self, clipped: bool, **options: Any) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        corners = torch.rand(COUNT, 2, generator=generator) * 60
        sides = torch.rand(COUNT, 2, generator=generator) * 30 + 10
        self.register_buffer("anchors", torch.cat([corners, corners + sides], 1))
        self.clipped, self.options = clipped, options

    def forward(self, classes: list[Tensor], boxes: list[Tensor], limits: Tensor) -> Any:
        ends = limits if self.clipped else None
        return edet_kernels.detect(classes, boxes, self.anchors, limits=ends, **self.options)


def arguments(batch: int, seed: int = 0) -> tuple[list[Tensor], list[Tensor], Tensor]:
    """Logits that are often equal, regressions, and limits."""
    generator = torch.Generator().manual_seed(seed)

    def maps(values: int, scale: float) -> list[Tensor]:
        shapes = [(batch, ANCHORS * values, *size) for size in SIZES]
        return [scale * torch.randn(shape, generator=generator) for shape in shapes]

    classes = [(4 * x).round() / 4 for x in maps(CLASSES, 2.0)]
    return classes, maps(4, 0.3), torch.rand(batch, 2, generator=generator) * 20 + 60


@pytest.mark.parametrize(
    ("clipped", "options"),
    [
        (True, {"score_threshold": 0.4, "max_detections": 7, "iou_threshold": 0.3}),
        (True, {"class_agnostic": True, "max_detections": 40}),
        # more detections than candidates, and thresholds that let everything through
        (False, {"max_candidates": 20, "max_detections": 30, "iou_threshold": 1.0}),
        (False, {"score_threshold": -3.0, "max_detections": 500, "iou_threshold": 0.0}),
    ],
)
@torch.no_grad()
def test_detections_are_those_of_detect(
    clipped: bool, options: dict[str, Any], tmp_path: Path
) -> None:
    logging.getLogger("torch.onnx").setLevel(logging.ERROR)
    module, batch = Detect(clipped, **options), torch.export.Dim("batch", min=1)
    free = {0: batch}
    shapes = {"classes": [free, free], "boxes": [free, free], "limits": free}
    given = arguments(2)
    program = torch.onnx.export(
        module, given, dynamo=True, verbose=False, dynamic_shapes=shapes, opset_version=18
    )
    assert program is not None
    path = tmp_path / "detect.onnx"
    program.save(path)
    session = runtime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    names = [x.name for x in session.get_inputs()]
    for seed, images in enumerate((2, 1, 5)):
        classes, boxes, limits = arguments(images, seed)
        tensors = [*classes, *boxes, limits][: len(names)]
        found = session.run(None, {n: x.numpy() for n, x in zip(names, tensors, strict=True)})
        expected = module(classes, boxes, limits)
        assert expected[3].min() > 0
        for x, y in zip(found, expected, strict=True):
            torch.testing.assert_close(torch.from_numpy(x), y, rtol=1e-5, atol=1e-4)


@torch.no_grad()
def test_soft_nms_is_refused() -> None:
    with pytest.raises(Exception, match="method must be hard in ONNX, which has no soft-NMS"):
        torch.onnx.export(
            Detect(False, method="gaussian"), arguments(1), dynamo=True, verbose=False
        )
