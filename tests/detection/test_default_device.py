"""The process's default device: what is computed on the host stays there, the model where it is."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from PIL import Image

import drawn_shapes
import edet
import small_models
from edet.training.datasets import open_dataset
from edet.training.evaluation import evaluate
from edet.training.trainer import Trainer

IMAGE = torch.randint(0, 256, (3, 50, 70), dtype=torch.uint8)


@pytest.fixture
def without_values() -> Iterator[None]:
    """A default device on which a tensor that was made without one is found out."""
    torch.set_default_device("meta")
    yield
    torch.set_default_device(None)


@pytest.fixture
def model() -> edet.EfficientDet:
    return small_models.small_model()  # before the default is another


def test_predicting(model: edet.EfficientDet, tmp_path: Path, without_values: None) -> None:
    Image.fromarray(IMAGE.permute(1, 2, 0).numpy()).save(tmp_path / "a.png")
    predictor = edet.Predictor(model, image_size=64, score_threshold=0.0)
    predictor.warm_up()
    for image in (IMAGE, tmp_path / "a.png"):
        found = predictor(image)
        assert found.boxes.device.type == "cpu"
        assert torch.equal(found.boxes, predictor(IMAGE).boxes)
    assert len(list(predictor.stream([IMAGE] * 3))) == 3
    found.to_json(tmp_path / "a.json")
    again = edet.Detections.from_json((tmp_path / "a.json").read_text())
    assert torch.equal(again.boxes, found.boxes)


@pytest.mark.parametrize("workers", [0, 1])
def test_training(
    model: edet.EfficientDet, workers: int, tmp_path: Path, without_values: None
) -> None:
    """Workers that are forked cannot even use a GPU."""
    dataset = open_dataset(drawn_shapes.write_coco(tmp_path))
    trainer = Trainer(model, batch_size=3)
    trainer.fit(dataset, epochs=1, folder=tmp_path / "run", workers=workers)
    assert all(p.device.type == "cpu" for p in trainer.model.parameters())
    evaluate(trainer.average.model, dataset, workers=workers)
