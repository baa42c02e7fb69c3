"""Exported ONNX files in ONNX Runtime and OpenVINO, and their operators in TensorRT's parser."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

import edet
from exported_calls import assert_detections, documented, fed, pictures
from small_models import small_model

onnx = pytest.importorskip("onnx")
pytest.importorskip("onnxscript")
runtime = pytest.importorskip("onnxruntime")

# exporters warn about themselves
pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore")]

#: Operators of these models that TensorRT's ONNX parser takes, without any restriction that they
#: could meet: https://github.com/onnx/onnx-tensorrt/blob/main/docs/operators.md
TENSORRT = set(
    re.findall(
        r"\w+",
        """
            Add BatchNormalization Cast Clip Concat Conv Div Equal Exp Expand Gather GatherElements
            GatherND GreaterOrEqual Identity Max MaxPool Min Mul NonMaxSuppression Pad Range
            ReduceMax ReduceMean ReduceSum Reshape Resize ScatterND Shape Sigmoid Slice Split
            Squeeze Sub Tile TopK Transpose Unsqueeze Where
        """,
    )
)

#: The largest K of TensorRT's TopK layer:
#: https://docs.nvidia.com/deeplearning/tensorrt/latest/_static/operators/TopK.html
TENSORRT_TOP_K = 3840


def session(path: Path) -> tuple[runtime.InferenceSession, dict[str, str]]:
    opened = runtime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    return opened, opened.get_modelmeta().custom_metadata_map


def run(opened: runtime.InferenceSession, given: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    names = [x.name for x in opened.get_outputs()]
    return dict(zip(names, opened.run(names, given), strict=True))


@pytest.fixture(scope="module")
def predictor() -> edet.Predictor:
    return edet.Predictor("edet_lite0_person", image_size=(128, 160), score_threshold=0.1)


@pytest.fixture(scope="module")
def person(predictor: edet.Predictor, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("onnx") / "person.onnx"
    edet.export(predictor, path)
    return path


@pytest.mark.parametrize("count", [1, 2, 3])
def test_onnx_runtime_finds_what_the_predictor_finds(
    person: Path, predictor: edet.Predictor, count: int
) -> None:
    opened, notes = session(person)
    images = pictures()[:count]
    assert_detections(run(opened, fed(predictor, images, notes["fill"])), predictor, images)


def test_openvino_finds_what_the_predictor_finds(person: Path, predictor: edet.Predictor) -> None:
    openvino = pytest.importorskip("openvino")
    # it computes in bfloat16 by itself where the processor can
    compiled = openvino.Core().compile_model(person, "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
    _, notes = session(person)
    images = pictures()
    for given in (images, images[:1]):
        found = compiled(fed(predictor, given, notes["fill"]))
        names = ("boxes", "scores", "labels", "counts")
        assert_detections({name: found[name] for name in names}, predictor, given)


def test_the_file_says_what_it_takes_and_gives(person: Path) -> None:
    opened, notes = session(person)
    assert {x.name: (x.shape, x.type) for x in opened.get_inputs()} == {
        "images": (["batch", 3, 128, 160], "tensor(uint8)"),
        "sizes": (["batch", 2], "tensor(int64)"),
    }
    assert {x.name: (x.shape, x.type) for x in opened.get_outputs()} == {
        "boxes": (["batch", 100, 4], "tensor(float)"),
        "scores": (["batch", 100], "tensor(float)"),
        "labels": (["batch", 100], "tensor(int64)"),
        "counts": (["batch"], "tensor(int64)"),
    }
    assert json.loads(notes["class_names"]) == {"1": "person"}
    assert json.loads(notes["image_size"]) == [128, 160]
    assert notes["model"] == "tf_efficientdet_lite0"


def test_another_size_is_refused_by_the_runtime(person: Path) -> None:
    opened, _ = session(person)
    given = {"images": np.zeros((1, 3, 160, 128), np.uint8), "sizes": np.array([[160, 128]])}
    with pytest.raises(Exception, match=r"invalid dimensions for input: images"):
        opened.run(None, given)


def test_the_page_shows_how(
    person: Path, predictor: edet.Predictor, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("openvino")
    monkeypatch.chdir(tmp_path)
    (tmp_path / "person.onnx").symlink_to(person)
    names: dict[str, Any] = {}
    for picture in pictures():
        Image.fromarray(picture.permute(1, 2, 0).numpy()).save("street.jpg", quality=95)
        expected = predictor("street.jpg")
        for part in ("onnxruntime.InferenceSession", "import openvino"):
            exec(documented(part), names)
            # Pillow rounds a pixel's value in another place, and improbable boxes come and go
            sure = int((expected.scores > 0.25).sum())
            assert sure > 0 and int((names["scores"][0] > 0.25).sum()) == sure
            found = torch.from_numpy(names["boxes"][0][:sure])
            torch.testing.assert_close(found, expected.boxes[:sure], rtol=0, atol=1.0)


def operators(path: Path) -> set[str]:
    """The operators of a file, and its checks."""
    model = onnx.load(path)
    onnx.checker.check_model(model, full_check=True)
    assert {node.domain for node in model.graph.node} == {""}
    return {node.op_type for node in model.graph.node}


def test_tensorrt_takes_the_operators(tmp_path: Path, person: Path) -> None:
    assert operators(person) <= TENSORRT
    d0 = tmp_path / "d0.onnx"
    size = {"width": 16, "cells": 1, "head_repeats": 1, "num_classes": 3, "image_size": 128}
    model = edet.create_model("tf_efficientdet_d0", **size)
    edet.export(model, d0, max_candidates=TENSORRT_TOP_K)
    found = operators(d0)
    assert found <= TENSORRT
    assert {"NonMaxSuppression", "TopK", "ScatterND"} <= found
    graph = onnx.load(d0).graph
    constants = {x.name: onnx.numpy_helper.to_array(x) for x in graph.initializer}
    most = [int(constants[n.input[1]][0]) for n in graph.node if n.op_type == "TopK"]
    assert sorted(most) == [100, TENSORRT_TOP_K]


def test_the_outputs_of_the_heads(tmp_path: Path) -> None:
    model = small_model()  # with a backbone of its own
    path = tmp_path / "heads.onnx"
    edet.export(model, path, postprocess=False, batch_size=1)
    assert model.training and all(p.requires_grad for p in model.parameters())  # as it was
    opened, _ = session(path)
    levels = [f"p{level}" for level in range(3, 8)]
    names = [f"{part}_{level}" for part in ("class", "box") for level in levels]
    assert [x.name for x in opened.get_outputs()] == names
    assert [x.shape for x in opened.get_inputs()] == [[1, 3, 64, 64]]
    pixels = torch.randint(0, 256, (1, 3, 64, 64), dtype=torch.uint8)
    found = run(opened, {"images": pixels.numpy()})
    mean, std = (torch.tensor(x).view(3, 1, 1) for x in (model.config.mean, model.config.std))
    with torch.no_grad():
        classes, boxes = model.eval()((pixels / 255 - mean) / std)
    for name, x in zip(names, [*classes, *boxes], strict=True):
        torch.testing.assert_close(torch.from_numpy(found[name]), x, rtol=1e-4, atol=1e-4)
