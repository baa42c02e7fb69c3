"""A predictor goes where its model goes: pickles, copies, other processes, data loaders."""

from __future__ import annotations

import copy
import io
import multiprocessing
import pickle
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

import edet

IMAGE = torch.randint(0, 256, (3, 50, 70), dtype=torch.uint8, generator=torch.manual_seed(1))


@pytest.fixture
def predictor() -> edet.Predictor:
    model = edet.create_model("tf_efficientdet_lite0", num_classes=2, width=16, cells=1)
    return edet.Predictor(
        model,
        image_size=(64, 96),
        score_threshold=0.0,
        nms="gaussian",
        max_detections=7,
        class_names=["cat", "dog"],
        batch_size=3,
        max_plans=2,
    )


def assert_same(found: Any, expected: Any) -> None:
    assert torch.equal(found.boxes, expected.boxes)
    assert torch.equal(found.scores, expected.scores)
    assert found.names == expected.names


def saved(predictor: edet.Predictor) -> edet.Predictor:
    file = io.BytesIO()
    torch.save(predictor, file)
    file.seek(0)
    loaded: edet.Predictor = torch.load(file, weights_only=False)
    return loaded


@pytest.mark.parametrize(
    "how", [lambda p: pickle.loads(pickle.dumps(p)), copy.deepcopy, copy.copy, saved]
)
def test_copies(how: Any, predictor: edet.Predictor) -> None:
    expected = [predictor(IMAGE) for _ in range(3)][-1]  # planned
    copied = how(predictor)
    for _ in range(3):
        assert_same(copied(IMAGE), expected)
    assert copied.stats().images == 3 and copied.stats().plans == 1
    assert (copied.max_plans, copied.batch_size) == (predictor.max_plans, predictor.batch_size)
    assert copied.label_names == predictor.label_names


def test_a_copy_has_its_own_weights(predictor: edet.Predictor) -> None:
    expected = predictor(IMAGE)
    copied = pickle.loads(pickle.dumps(predictor))
    with torch.no_grad():
        copied.model.class_net.predict.conv_pw.bias.add_(1)
    assert not torch.equal(copied(IMAGE).scores, expected.scores)
    assert_same(predictor(IMAGE), expected)


def detect(predictor: edet.Predictor, image: Tensor) -> list[Any]:
    torch.set_num_threads(1)
    found = predictor(image)
    return [found.boxes.numpy(), found.scores.numpy()]


class Detected(Dataset[Tensor]):
    """Boxes that a predictor finds, as a loader's workers compute them."""

    def __init__(self, predictor: edet.Predictor) -> None:
        self.predictor = predictor

    def __len__(self) -> int:
        return 2

    def __getitem__(self, index: int) -> Tensor:
        torch.set_num_threads(1)
        return self.predictor(IMAGE).boxes


@pytest.mark.slow
def test_other_processes(predictor: edet.Predictor) -> None:
    expected = predictor(IMAGE)
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        boxes, scores = pool.apply(detect, (predictor, IMAGE))
    torch.testing.assert_close(torch.from_numpy(boxes), expected.boxes)
    torch.testing.assert_close(torch.from_numpy(scores), expected.scores)
    loader = DataLoader(
        Detected(predictor), batch_size=None, num_workers=1, multiprocessing_context="spawn"
    )
    for boxes in loader:
        torch.testing.assert_close(boxes, expected.boxes)
