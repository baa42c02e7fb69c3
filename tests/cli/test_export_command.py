"""``edet export``: files, what it says of them, and one clear line for every mistake."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

import edet
from edet.cli import app
from edet.models.described import save_described
from small_models import small_model


@pytest.fixture(autouse=True)
def _in_a_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "80")


def export(*arguments: Any) -> Any:
    return CliRunner().invoke(app, ["export", *map(str, arguments)], prog_name="edet")


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ("edet_lite0_person -f onnx -o x.pt2", "--output must end in .onnx with --format onnx"),
        ("edet_lite0_person -f aoti -o x.onnx", "--output must end in .pt2 with --format aoti"),
        ("edet_lite0_person -f engine -o x.onnx", "'engine' is not one of 'onnx', 'aoti', 'torch'"),
        ("edet_lite0_person -o none/x.onnx", "--output: cannot write to none/x.onnx: No such file"),
        ("edet_lite0_person", "Missing option '--output'"),
        ("edet_lite9 -o x.onnx", "name must be a known model, got 'edet_lite9'"),
        ("tf_efficientdet_d0 -o x.onnx", "--checkpoint FILE is required"),
        ("lost.pt -o x.onnx", "lost.pt"),
        ("a.pt -c b.pt -o x.onnx", "--checkpoint must be left out when MODEL is one, got a.pt"),
        ("edet_lite0_person --image-size dynamic -o x.onnx", "--image-size must be N or HxW"),
        ("edet_lite0_person --nms gaussian -o x.onnx", "nms must be hard in ONNX"),
        ("edet_lite0_person --batch-size 0 -o x.onnx", "'--batch-size'"),
    ],
)
def test_mistakes_take_one_line(arguments: str, words: str, tmp_path: Path) -> None:
    result = export(*arguments.split())
    assert result.exit_code == 2
    assert isinstance(result.exception, SystemExit)  # no traceback
    errors = [line for line in result.stderr.splitlines() if line.startswith("Error: ")]
    assert len(errors) == 1 and words in errors[0]
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("arguments", ["-c a.pt2", "edet_lite0_person --class-names a.pt2"])
def test_no_input_is_overwritten(arguments: str, tmp_path: Path) -> None:
    file = tmp_path / "a.pt2"
    torch.save(edet.create_model("tf_efficientdet_lite0", num_classes=1).state_dict(), file)
    before = file.read_bytes()
    result = export(*arguments.split(), "-o", "a.pt2", "-f", "torch")
    assert result.exit_code == 2
    assert "Error: --output: a.pt2 is the input a.pt2, which would be replaced" in result.stderr
    assert file.read_bytes() == before


def test_help() -> None:
    result = export("--help")
    assert result.exit_code == 0
    text = " ".join(result.stdout.split())
    assert "one file from pixels to boxes" in text
    assert "Example: edet export run/best.pt -o detector.onnx" in text


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # exporters warn about themselves
def test_a_trained_checkpoint(tmp_path: Path) -> None:
    size = {"width": 16, "cells": 1, "head_repeats": 1, "num_classes": 2, "image_size": (64, 96)}
    model = edet.create_model("tf_efficientdet_lite0", **size)
    save_described(model, tmp_path / "best.pt", class_names=["red", "white"])
    result = export("best.pt", "-f", "torch", "-o", "cells.pt2", "--max-detections", 7)
    assert result.exit_code == 0, result.output
    size = f"{(tmp_path / 'cells.pt2').stat().st_size / 1e6:.1f}"
    assert result.stdout.splitlines() == [
        f"cells.pt2: {size} MB",
        "in:  images (B, 3, 64, 96) uint8, letterboxed RGB",
        "     sizes (B, 2) int64, height and width of each image before",
        "out: boxes (B, 7, 4) float32, scores (B, 7) float32, labels (B, 7) int64, "
        "counts (B) int64",
    ]
    notes = {"edet.json": ""}
    program = torch.export.load("cells.pt2", extra_files=notes)
    described = json.loads(notes["edet.json"])
    assert json.loads(described["class_names"]) == {"1": "red", "2": "white"}
    given = {"images": torch.zeros(3, 3, 64, 96, dtype=torch.uint8)}
    found = program.module()(**given, sizes=torch.tensor([[64, 96]] * 3))
    assert [tuple(x.shape) for x in found] == [(3, 7, 4), (3, 7), (3, 7), (3,)]


def test_the_outputs_of_the_heads_are_told() -> None:
    from edet.cli.export import interface_lines

    predictor = edet.Predictor(small_model())
    assert interface_lines(predictor, 4, False) == [
        "in:  images (4, 3, 64, 64) uint8, letterboxed RGB",
        "out: class_p3 ... class_p7 logits, box_p3 ... box_p7 regressions",
    ]
