"""What ``edet.export`` refuses and leaves behind, and programs of torch.export."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

import edet
from exported_calls import assert_detections, documented, inputs, pictures
from small_models import small_model

NAMES = ("boxes", "scores", "labels", "counts")


@pytest.mark.parametrize(
    ("path", "options", "error", "words"),
    [
        ("x.onnx", {"format": "engine"}, ValueError, "format must be one of onnx, aoti, torch"),
        ("x.pt2", {}, ValueError, r"path must end in \.onnx for onnx, got x\.pt2"),
        ("x.onnx", {"format": "aoti"}, ValueError, r"path must end in \.pt2 for aoti"),
        ("x.onnx", {"batch_size": 0}, ValueError, "batch_size must be at least 1, got 0"),
        ("x.onnx", {"max_candidates": 0}, ValueError, "max_candidates must be at least 1, got 0"),
        ("x.onnx", {"nms": "gaussian"}, ValueError, "nms must be hard in ONNX, .* no soft-NMS"),
        ("x.onnx", {"dtype": torch.bfloat16}, ValueError, "dtype must be float32 or float16"),
        ("x.onnx", {"image_size": (64, None)}, Exception, "image_size"),
        ("none/x.onnx", {}, OSError, "none"),
    ],
)
def test_refused_before_any_work(
    path: str,
    options: dict[str, Any],
    error: type[Exception],
    words: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(error, match=words):
        edet.export(small_model(), path, **options)
    assert list(tmp_path.iterdir()) == []


def test_options_beside_a_predictor_are_refused(tmp_path: Path) -> None:
    with pytest.raises(TypeError, match="those of the predictor itself, got image_size"):
        edet.export(edet.Predictor(small_model()), tmp_path / "x.onnx", image_size=64)


def test_a_missing_compiler_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from torch._inductor import cpp_builder, exc

    def none() -> None:
        raise exc.InvalidCxxCompiler

    monkeypatch.setattr(cpp_builder, "get_cpp_compiler", none)
    with pytest.raises(FileNotFoundError, match=r"aoti needs a C\+\+ compiler: install g\+\+"):
        edet.export(small_model(), tmp_path / "x.pt2", format="aoti")


@pytest.mark.parametrize("format", ["onnx", "torch"])
def test_a_failure_leaves_the_old_file(
    format: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("onnxscript")
    path = tmp_path / ("x.onnx" if format == "onnx" else "x.pt2")
    path.write_text("old")

    def full(*_: object, **__: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(torch.export, "export", full)
    monkeypatch.setattr(torch.onnx, "export", full)
    with pytest.raises(OSError, match="No space left"):
        edet.export(small_model(), path, format=format)
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # exporters warn about themselves
def test_a_program_of_torch_export(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    predictor = edet.Predictor("edet_lite0_person", image_size=128, score_threshold=0.1)
    path = tmp_path / "person.pt2"
    edet.export(predictor, path, format="torch")
    notes = {"edet.json": ""}
    program = torch.export.load(path, extra_files=notes)
    described = json.loads(notes["edet.json"])
    assert json.loads(described["class_names"]) == {"1": "person"}
    ops = {str(node.target) for node in program.graph.nodes if "edet_kernels" in str(node.target)}
    assert ops == {"edet_kernels.detect.default"}
    module, fill = program.module(), json.loads(described["fill"])
    for count in (1, 3):
        images = pictures()[:count]
        found = module(**inputs(images, predictor.image_size, fill))
        assert_detections(dict(zip(NAMES, found, strict=True)), predictor, images)
    monkeypatch.chdir(tmp_path)
    path.rename("program.pt2")
    names: dict[str, Any] = inputs(pictures(), predictor.image_size, fill)
    exec(documented("torch.export.load("), names)
    assert names["names"] == {"1": "person"}
    assert_detections({name: names[name] for name in NAMES}, predictor, pictures())
    given = inputs(pictures(), (160, 128), fill)
    with pytest.raises(AssertionError, match=r"Guard failed: images\.size\(\)\[2\] == 128"):
        module(**given)


@pytest.mark.filterwarnings("ignore")
def test_heads_alone_need_nothing_of_this_project(tmp_path: Path) -> None:
    path = tmp_path / "heads.pt2"
    edet.export(small_model(), path, format="torch", postprocess=False)
    program = torch.export.load(path)
    assert not any("edet_kernels" in str(node.target) for node in program.graph.nodes)
    pixels = torch.zeros(3, 3, 64, 64, dtype=torch.uint8)
    found = program.module()(images=pixels)
    assert [tuple(x.shape[:2]) for x in found] == [(3, 18)] * 5 + [(3, 36)] * 5
