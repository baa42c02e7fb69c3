"""edet train and edet evaluate: from a folder to boxes, and one clear line for every mistake."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner, Result

import drawn_shapes
import edet
from edet.cli import app, train
from edet.models.described import load_described, read_training
from edet.training.augment import Augmentation
from edet.training.trainer import NotFiniteError

SMALL = {"width": 16, "cells": 1, "head_repeats": 1}


@pytest.fixture(autouse=True)
def in_a_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Everything relative, a small network under Lite0's name."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "80")
    create = edet.create_model

    def small(name: str, **options: Any) -> edet.EfficientDet:
        return create(name, **(SMALL | options))

    monkeypatch.setattr(train, "create_model", small)
    drawn_shapes.write_coco(tmp_path / "data", count=9)
    drawn_shapes.write_coco(tmp_path / "data", "val", count=3, seed=1)
    yield


def edet_(*arguments: object) -> Result:
    return CliRunner().invoke(app, [str(a) for a in arguments], prog_name="edet")


def train_(*arguments: object) -> Result:
    fixed = [
        "-m",
        "tf_efficientdet_lite0",
        "--image-size",
        "64",
        "--batch-size",
        "4",
        "--workers",
        "0",
    ]
    return edet_("train", "data", *fixed, *arguments)


def assert_one_line_error(result: Result, *words: str, code: int = 2) -> None:
    assert result.exit_code == code
    assert isinstance(result.exception, SystemExit)  # no traceback
    errors = [line for line in result.stderr.splitlines() if line.startswith("Error: ")]
    assert len(errors) == 1, result.stderr
    for word in words:
        assert word in errors[0]


def test_from_a_folder_to_boxes() -> None:
    result = train_("--epochs", 2, "-o", "run")
    assert result.exit_code == 0, result.output
    assert "9 images" in result.stdout and "3 images" in result.stdout
    lines = re.findall(r"epoch (\d)/2: loss [\d.]+ \(.*AP [\d.]+, AP50", result.stdout)
    assert lines == ["1", "2"]
    assert "In run: best.pt, last.pt, log.csv, curves.png" in result.stderr
    assert (Path("run/evaluation/confusion.png")).exists()

    result = edet_("evaluate", "data", "-c", "run/last.pt", "-o", "found", "--workers", 0)
    assert result.exit_code == 0, result.output
    assert re.search(r"AP [\d.]+  AP50 [\d.]+", result.stdout)
    assert "square" in result.stdout
    figures = json.loads(Path("found/evaluation.json").read_text())
    assert figures == json.loads(Path("run/evaluation/evaluation.json").read_text())

    result = edet_(
        "predict", "data/val", "-c", "run/best.pt", "--json", "a.json", "--score-threshold", 0
    )
    assert result.exit_code == 0, result.output
    predictor = edet.Predictor("run/best.pt", score_threshold=0)
    for entry in json.loads(Path("a.json").read_text()):
        expected = predictor(entry["file"])
        found = edet.Detections.from_json(json.dumps(entry))
        assert torch.equal(found.boxes, expected.boxes)
        assert {"disc", "square"} >= set(found.names)


def test_resume_and_what_it_refuses() -> None:
    assert train_("--epochs", 1).exit_code == 0
    assert_one_line_error(train_("--epochs", 1), "holds a run already", "--resume")
    assert train_("--epochs", 1, "--resume").exit_code == 0
    assert_one_line_error(train_("--epochs", 2, "--resume"), "started with epochs 1, got 2")
    assert train_("--epochs", 1, "--resume", "-o", "new").exit_code == 0  # nothing to go on from


def test_the_best_weights_of_a_run_are_not_overwritten() -> None:
    assert train_("--epochs", 1).exit_code == 0
    Path("run/last.pt").unlink()  # what is large and no longer needed
    best = Path("run/best.pt").read_bytes()
    assert_one_line_error(train_("--epochs", 1, "-c", "run/best.pt"), "holds a run already")
    assert Path("run/best.pt").read_bytes() == best


def test_starting_from_weights() -> None:
    model = edet.create_model("tf_efficientdet_lite0", **SMALL)
    edet.save_checkpoint(model, "start.pth")
    result = train_("--epochs", 1, "-c", "start.pth", "--freeze", "backbone", "--freeze", "norms")
    assert result.exit_code == 0, result.output
    assert "Starts from start.pth; its class prediction is trained anew" in result.stdout
    trained = edet.read_checkpoint("run/last.pt")
    for key, value in model.state_dict().items():
        if key.startswith("backbone."):
            assert torch.equal(trained[key], value)
    torch.save(model.backbone.state_dict(), "net.pth")
    result = train_("--epochs", 1, "--backbone", "net.pth", "--freeze", "backbone", "-o", "b")
    assert result.exit_code == 0, result.output
    trained = edet.read_checkpoint("b/last.pt")
    assert torch.equal(trained["backbone.conv_stem.weight"], model.backbone.conv_stem.weight)
    assert_one_line_error(train_("-c", "start.pth", "--backbone", "x"), "exclude each other")


def test_options_arrive(monkeypatch: pytest.MonkeyPatch) -> None:
    found: list[dict[str, Any]] = []
    monkeypatch.setattr(train, "run", lambda *_: found.extend(_[3:]))
    options = ["--augmentation", 0.5, "--colour", 0.3, "--mosaic", 0.25, "--weight-decay", 0.01]
    assert train_(*options).exit_code == 0
    trainer, fit = found
    assert trainer["weight_decay"] == 0.01
    assert fit["augmentation"] == Augmentation.of_strength(0.5, colour=0.3, mosaic=0.25)
    assert train_("--augmentation", 0).exit_code == 0
    assert found[3]["augmentation"] is None and found[2]["weight_decay"] is None


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--image-size", "big"], ["--image-size must be N or HxW in pixels", "got 'big'"]),
        (["--batch-size", "16"], ["at most the number of images, 9, got 16"]),
        (["-c", "none.pth"], ["none.pth"]),
        (["--backbone", "none.pth"], ["none.pth"]),
        (["-o", "data/instances_val.json"], ["data/instances_val.json"]),
        (["--validation", "nowhere"], ["nowhere does not exist"]),
        (["-m", "yolo"], ["name must be a known model, got 'yolo'"]),
        (["--device", "tpu"], ["--device"]),
    ],
)
def test_wrong_options(arguments: list[str], words: list[str]) -> None:
    assert_one_line_error(train_(*arguments), *words)


def test_wrong_data() -> None:
    Path("empty").mkdir()
    assert_one_line_error(edet_("train", "empty"), "empty holds no data set with a split 'train'")
    Path("data/train/000.png").write_bytes(b"")
    assert_one_line_error(train_(), "000.png: not an image", 'bad="skip"')
    result = train_("--bad", "skip", "--epochs", 1)
    assert result.exit_code == 0, result.output
    assert "1 left out" in result.stdout


def test_a_run_that_is_not_finite_ends_in_a_line(monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(*args: Any, **options: Any) -> None:
        raise NotFiniteError("5 steps in a row were not finite. Try a lower learning_rate")

    monkeypatch.setattr(train, "run", fails)
    assert_one_line_error(train_(), "Try a lower learning_rate", code=1)


def test_evaluate_refuses() -> None:
    edet.save_checkpoint(edet.create_model("tf_efficientdet_lite0", num_classes=2), "a.pth")
    assert_one_line_error(edet_("evaluate", "data", "-c", "a.pth"), "name it by --model MODEL")
    result = edet_(
        "evaluate", "data", "-c", "a.pth", "-m", "tf_efficientdet_lite0", "--image-size", 64
    )
    assert result.exit_code == 0, result.output
    assert train_("--epochs", 1).exit_code == 0
    arguments = ["data", "-c", "run/last.pt", "-m", "tf_efficientdet_d0"]
    words = "is tf_efficientdet_d0, run/last.pt is of tf_efficientdet_lite0"
    assert_one_line_error(edet_("evaluate", *arguments), words)
    assert_one_line_error(edet_("predict", "data/val", *arguments[1:]), words)
    file = Path("data/instances_val.json")
    file.write_text(file.read_text().replace("disc", "ball"))
    assert_one_line_error(
        edet_("evaluate", "data", "-c", "run/last.pt"), "has the classes disc, square, the data b"
    )
    assert_one_line_error(edet_("evaluate", "data", "-c", "run/last.pt", "--split", "x"), "'x'")
    for model in ([], ["-m", "tf_efficientdet_d0"]):
        assert_one_line_error(edet_("evaluate", "data", *model), "--checkpoint must be given")
    assert_one_line_error(
        edet_("evaluate", "data", "-m", "edet_lite0_person"), "has the classes person, the data b"
    )


def test_train_from_the_detector_of_the_package(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(train, "create_model", edet.create_model)  # not a small one
    options = ["--image-size", 64, "--batch-size", 4, "--workers", 0, "--epochs", 1]
    result = edet_("train", "data", "-m", "edet_lite0_person", *options)
    assert result.exit_code == 0, result.output
    assert "Starts from the weights that come with edet_lite0_person" in result.stdout
    model, description = load_described("run/last.pt")
    assert description.class_names == ["disc", "square"] and model.config.num_classes == 2
    begun = edet.create_model("edet_lite0_person").backbone.conv_stem.weight
    assert (model.backbone.conv_stem.weight - begun).abs().max() < 0.1 * begun.abs().max()


def test_evaluate_the_detector_of_the_package() -> None:
    file = Path("data/instances_val.json")
    data = json.loads(file.read_text())
    data["categories"] = [{"id": 1, "name": "person"}]
    data["annotations"] = [{**a, "category_id": 1} for a in data["annotations"]]
    file.write_text(json.dumps(data))
    result = edet_("evaluate", "data", "-m", "edet_lite0_person", "--workers", 0)
    assert result.exit_code == 0, result.output
    assert re.search(r"person +AP [\d.]+", result.stdout)


@pytest.mark.slow
def test_ctrl_c_keeps_what_there_is(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "edet", "train", "data", "-m", "tf_efficientdet_lite0"]
    command += ["--image-size", "64", "--batch-size", "4", "--workers", "1", "--epochs", "200"]
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, start_new_session=True
    ) as process:
        while not (tmp_path / "run/last.pt").exists():
            assert process.poll() is None
            time.sleep(0.1)
        os.killpg(process.pid, signal.SIGINT)  # as a terminal does: to workers too
        _, errors = process.communicate(timeout=120)
    assert process.returncode == 130, errors
    step = re.search(rb"Stopped at step (\d+); go on with --resume", errors)
    assert step is not None, errors
    assert read_training("run/last.pt")["trainer"]["step_count"] == int(step[1])
