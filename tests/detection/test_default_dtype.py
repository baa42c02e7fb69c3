"""The default dtype of the process, which any library may set, changes no result."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import numpy as np
import pytest
import torch
from torch import Tensor

import edet
import edet_kernels
from edet.detection.anchors import _anchors, decode_boxes, encode_boxes, generate_anchors
from edet.detection.postprocess import postprocess
from edet.detection.preprocess import geometry, letterbox, preprocess
from edet.models.efficientnet import normalise_pixels
from edet.training.losses import detection_loss
from edet.training.targets import assign_targets
from edet.training.trainer import Trainer

IMAGES = [
    torch.randint(0, 256, (3, 1003, 1501), dtype=torch.uint8, generator=torch.manual_seed(1)),
    torch.rand(3, 77, 501, generator=torch.manual_seed(2)),  # makes the batch a float one
]


@pytest.fixture(autouse=True)
def _restore() -> Iterator[None]:
    yield
    torch.set_default_dtype(torch.float32)


def outputs(size: int, classes: int = 3) -> tuple[list[Tensor], list[Tensor]]:
    generator = torch.manual_seed(3)
    sides = [-(-size // 2**level) for level in range(3, 8)]
    return tuple(  # type: ignore[return-value]
        [
            torch.randn(2, 9 * n, side, side, dtype=torch.float32, generator=generator)
            for side in sides
        ]
        for n in (classes, 4)
    )


def anchors() -> list[Tensor]:
    _anchors.cache_clear()  # what was computed before
    made = generate_anchors((1000, 1500))
    return [made, decode_boxes(made / 1000, made), encode_boxes(made + 3, made)]


def pixels() -> list[Tensor]:
    batch = preprocess(IMAGES, (512, 640))
    arrays = preprocess([np.full((40, 30, 3), 7, np.uint16)], (64, 64))
    mean, std = (torch.tensor([0.4, 0.5, 0.6], dtype=torch.float32) for _ in range(2))
    return [
        batch.images,
        batch.scales,
        arrays.images,
        letterbox([x[:, :32, :32] for x in IMAGES], (32, 32), (1, 2, 3)),
        geometry([(1003, 1501), (7, 4001)], (512, 640)),
        normalise_pixels(IMAGES[0][None], mean, std, torch.float32),
    ]


def detections() -> list[Tensor]:
    made = generate_anchors((256, 256))
    found = [
        *postprocess(*outputs(256), made),
        *postprocess(*outputs(256), made, method="gaussian"),
        *postprocess(*outputs(256), made, sizes=[(1003, 1501), (700, 333)]),
    ]
    with edet_kernels.backend("reference"):
        found += postprocess(*outputs(256), made, sizes=[(1003, 1501), (700, 333)])
    return list(found)


def losses() -> list[Tensor]:
    made = generate_anchors((256, 256))
    boxes = [torch.tensor([[3.7, 9.1, 200.3, 180.2]], dtype=torch.float32)] * 2
    targets = assign_targets(made, boxes, [torch.tensor([1]), torch.tensor([3])])
    return [*targets, *detection_loss(*outputs(256), targets)]


CASES: dict[str, Callable[[], list[Tensor]]] = {
    f.__name__: f for f in (anchors, pixels, detections, losses)
}


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("name", CASES)
def test_functions(name: str, dtype: torch.dtype) -> None:
    expected = CASES[name]()
    torch.set_default_dtype(dtype)
    found = CASES[name]()
    for x, y in zip(found, expected, strict=True):
        assert x.dtype == y.dtype
        assert torch.equal(x, y)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("made_before", [False, True])
def test_predictor(made_before: bool, dtype: torch.dtype) -> None:
    model = edet.create_model("tf_efficientdet_lite0", num_classes=4, image_size=128)
    predictor = edet.Predictor(model, score_threshold=0.0)
    expected = predictor(IMAGES)
    torch.set_default_dtype(dtype)
    if not made_before:
        predictor = edet.Predictor(model, score_threshold=0.0)
    for _ in range(3):  # planned
        for found, wanted in zip(predictor(IMAGES), expected, strict=True):
            assert torch.equal(found.boxes, wanted.boxes)
            assert torch.equal(found.scores, wanted.scores)
            assert found.boxes.dtype == torch.float32
            assert found.boxes[:, 2].max() <= found.image_size[1]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_training_step(dtype: torch.dtype) -> None:
    boxes = [torch.tensor([[3.7, 9.1, 100.3, 80.2]], dtype=torch.float32)] * 2
    labels = [torch.tensor([1])] * 2
    images = torch.randn(2, 3, 128, 128)
    results = []
    for default in (torch.float32, dtype):
        torch.set_default_dtype(torch.float32)
        torch.manual_seed(0)
        model = edet.create_model("tf_efficientdet_lite0", num_classes=2, width=16, cells=1)
        torch.set_default_dtype(default)
        trainer = Trainer(model, steps=4, batch_size=2, warmup_steps=0)
        steps = [trainer.step(images, boxes, labels) for _ in range(2)]
        state = trainer.average.model.state_dict()
        results.append([*(x for losses in steps for x in losses), *state.values()])
    for x, y in zip(*results, strict=True):
        assert x.dtype == y.dtype
        assert torch.equal(x, y)
