"""Checkpoints that say which model they are of, and the model that comes out of them."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import edet
from edet.models.described import (
    load_described,
    read_description,
    read_training,
    save_described,
)
from edet.models.efficientdet import EfficientDet
from edet.models.reading import CheckpointError


def small(**options: Any) -> EfficientDet:
    size = {"width": 8, "cells": 1, "head_repeats": 1, "num_classes": 2, "image_size": (64, 96)}
    return edet.create_model("tf_efficientdet_lite0", **(size | options))


def test_the_model_comes_back(tmp_path: Path) -> None:
    model = small(fusion="softmax", min_level=4)
    config = replace(model.config, aspect_ratios=(2.0, (1.0, 1.0)), anchor_scale=5.0)
    model = EfficientDet(config)
    path = tmp_path / "a.pt"
    save_described(
        model,
        path,
        class_names=["cat", "dog"],
        category_ids=[3, 7],
        step=9,
        epoch=2,
        figures={"AP": 0.5},
        training={"x": torch.ones(2)},
    )
    description = read_description(path)
    assert description is not None
    assert description.config == config
    assert (description.class_names, description.category_ids) == (["cat", "dog"], [3, 7])
    assert (description.step, description.epoch) == (9, 2)
    assert description.figures == {"AP": 0.5}
    assert description.version == edet.__version__
    assert torch.equal(read_training(path)["x"], torch.ones(2))
    found, _ = load_described(path)
    assert not found.training
    for key, value in found.state_dict().items():
        assert torch.equal(value, model.state_dict()[key])
    predictor = edet.Predictor(str(path), score_threshold=0)
    assert predictor.image_size == (64, 96)
    assert predictor.label_names == {1: "cat", 2: "dog"}
    image = torch.zeros(3, 40, 40, dtype=torch.uint8)
    expected = edet.Predictor(model, score_threshold=0)(image)
    assert torch.equal(predictor(image).boxes, expected.boxes)
    named = edet.Predictor(path, class_names=["a", "b"])
    assert named.label_names == {1: "a", 2: "b"}
    assert [p.name for p in tmp_path.iterdir()] == ["a.pt"]
    other = EfficientDet(config)
    edet.load_checkpoint(other, path)  # as any checkpoint


def test_what_does_not_describe_itself(tmp_path: Path) -> None:
    path = tmp_path / "a.pth"
    edet.save_checkpoint(small(), path)
    assert read_description(path) is None
    with pytest.raises(CheckpointError, match="does not say which model it is of: give the model"):
        edet.Predictor(path)
    with pytest.raises(CheckpointError, match="holds no state to resume from"):
        read_training(path)
    with pytest.raises(FileNotFoundError, match=re.escape(f"got {tmp_path / 'no.pt'}")):
        edet.Predictor(tmp_path / "no.pt")
    with pytest.raises(ValueError, match="checkpoint must be None when model is a checkpoint"):
        edet.Predictor(path, path)
    path.write_bytes(b"PK\x03\x04")
    with pytest.raises(CheckpointError):
        read_description(path)


def test_other_versions_and_models(tmp_path: Path) -> None:
    path = tmp_path / "a.pt"
    save_described(small(), path)
    content = torch.load(path, weights_only=True)
    content["edet"]["format"] = 2
    torch.save(content, path)
    with pytest.raises(CheckpointError, match=r"another version .* 2, 1 is known\): upgrade"):
        read_description(path)
    content["edet"] |= {"format": 1, "colour": "red"}
    torch.save(content, path)
    with pytest.raises(CheckpointError, match=r"a description that cannot be read: .*colour"):
        read_description(path)
    own = small(backbone=nn.Identity(), backbone_channels=(8, 8, 8))
    save_described(own, path)
    with pytest.raises(CheckpointError, match="a backbone of its own: create that model and load"):
        load_described(path)


def test_what_cannot_be_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ValueError, match=r"path must end in \.pt, \.pth, \.safetensors"):
        save_described(small(), tmp_path / "a.bin")
    with pytest.raises(ValueError, match="class_names must hold 2 entries, got 1"):
        save_described(small(), tmp_path / "a.pt", class_names=["cat"])
    with pytest.raises(FileNotFoundError, match="path must be in a folder that exists"):
        save_described(small(), tmp_path / "no" / "a.pt")
    save_described(small(), tmp_path / "a.pt", step=1)
    whole = (tmp_path / "a.pt").read_bytes()

    def full(content: Any, file: Any) -> None:
        file.write(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(torch, "save", full)
    with pytest.raises(OSError, match="No space left"):
        save_described(small(), tmp_path / "a.pt", step=2)
    assert (tmp_path / "a.pt").read_bytes() == whole
    assert [p.name for p in tmp_path.iterdir()] == ["a.pt"]
