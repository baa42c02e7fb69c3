"""Steps of the trainer: what is left out, accumulated, frozen, saved, and refused."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import edet
import small_models
from edet.fused.module import PackedModule
from edet.training.losses import huber_loss
from edet.training.recipe import MovingAverage
from edet.training.targets import assign_targets
from edet.training.trainer import NotFiniteError, Trainer


def small_model(**options: Any) -> edet.EfficientDet:
    """A small model, the same at every call."""
    torch.manual_seed(1)
    return small_models.small_model(**options)


def lite_model() -> edet.EfficientDet:
    """One with a backbone of its own kind, the same at every call."""
    torch.manual_seed(1)
    size = {"width": 16, "cells": 1, "head_repeats": 1, "num_classes": 2, "image_size": 64}
    return edet.create_model("tf_efficientdet_lite0", **size)


def batch(count: int = 4, seed: int = 0) -> tuple[Tensor, list[Tensor], list[Tensor]]:
    numbers = torch.Generator().manual_seed(seed)
    images = torch.randn(count, 3, 64, 64, generator=numbers)
    boxes = [torch.tensor([[4.0 + i, 8, 40, 30 + i], [20, 20, 60, 60]]) for i in range(count)]
    return images, boxes, [torch.tensor([1, 2])] * count


def everything(trainer: Trainer) -> list[Tensor]:
    """Copies of all tensors of a trainer's state."""
    found: list[Tensor] = []

    def visit(value: Any) -> None:
        if isinstance(value, Tensor):
            found.append(value.clone())
        elif isinstance(value, dict):
            for key in sorted(value, key=str):
                visit(value[key])
        elif isinstance(value, list | tuple):
            for item in value:
                visit(item)
        elif isinstance(value, int | float):
            found.append(torch.tensor(float(value), dtype=torch.float64))

    state = trainer.state_dict()
    for name in ("model", "average", "average_updates", "optimizer", "schedule", "scaler"):
        visit(state[name])
    return found


def same(a: list[Tensor], b: list[Tensor]) -> bool:
    return len(a) == len(b) and all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_step_that_is_not_finite_changes_nothing(value: float) -> None:
    trainer = Trainer(lite_model(), steps=20, batch_size=4)
    images, boxes, labels = batch()
    for _ in range(2):
        trainer.step(images, boxes, labels)
    before = everything(trainer)
    broken = images.clone()
    broken[2, 0, 5, 5] = value
    with pytest.warns(UserWarning, match=r"left out, step 2 is not finite: c\.png$"):
        losses = trainer.step(broken, boxes, labels, names=["a.png", "b.png", "c.png", "d.png"])
    assert not losses.total.isfinite()
    assert same(everything(trainer), before)
    assert [tuple(x) for x in trainer.skipped] == [(2, ["c.png"])]
    assert trainer.step_count == 3
    assert trainer.step(images, boxes, labels).total.isfinite()
    assert trainer.skipped_in_a_row == 0
    assert not same(everything(trainer), before)


def test_a_gradient_that_is_not_finite_changes_nothing() -> None:
    trainer = Trainer(small_model(), steps=20, batch_size=4)
    before = everything(trainer)
    weight = trainer.model.class_net.predict.conv_pw.weight
    handle = weight.register_hook(lambda gradient: gradient * float("inf"))
    with pytest.warns(UserWarning, match="step 0 is not finite: image 0, image 1, image 2, imag"):
        assert trainer.step(*batch()).total.isfinite()
    assert same(everything(trainer), before)
    handle.remove()
    trainer.step(*batch())
    assert trainer.average.updates == 1


@pytest.mark.filterwarnings("ignore:left out")
def test_several_in_a_row_end_the_run() -> None:
    trainer = Trainer(small_model(), steps=20, batch_size=4, max_skipped=3)
    images, boxes, labels = batch()
    trainer.step(images * float("nan"), boxes, labels)
    trainer.step(images, boxes, labels)
    before = everything(trainer)
    for _ in range(2):
        trainer.step(images * float("nan"), boxes, labels)
    with pytest.raises(NotFiniteError, match=r"3 steps in a row .* Try a lower learning_rate"):
        trainer.step(images * float("nan"), boxes, labels)
    assert same(everything(trainer), before)
    assert len(trainer.skipped) == 4


def test_accumulated_parts_are_the_whole_batch() -> None:
    whole = Trainer(small_model(), steps=9, batch_size=4, freeze=["norms"], warmup_steps=0)
    parts = Trainer(
        small_model(), steps=9, batch_size=4, freeze=["norms"], warmup_steps=0, accumulate=3
    )
    for trainer in (whole, parts):
        trainer.optimizer.param_groups[0]["lr"] = 0.01
    a, b = whole.step(*batch()), parts.step(*batch())
    torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)
    for p, q in zip(whole.model.parameters(), parts.model.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-4, atol=1e-6)


def test_frozen_parts_stay() -> None:
    model = lite_model()
    before = copy.deepcopy(model.state_dict())
    trainer = Trainer(model, steps=9, batch_size=4, freeze=["backbone"], warmup_steps=0)
    trainer.step(*batch())
    model.eval()  # as an evaluation does
    trainer.step(*batch())
    changed = {k for k, v in model.state_dict().items() if not torch.equal(v, before[k])}
    assert changed and not any(key.startswith("backbone.") for key in changed)
    assert any("running_mean" in key for key in changed)

    norms = Trainer(lite_model(), steps=9, batch_size=4, freeze=["norms"], warmup_steps=0)
    norms.step(*batch())
    changed = {k for k, v in norms.model.state_dict().items() if not torch.equal(v, before[k])}
    assert any(key.startswith("backbone.") for key in changed)
    assert not any(".bn" in key and not key.endswith("weight") for key in changed)
    assert not any("running" in key for key in changed)


def test_training_mode_comes_back_by_itself() -> None:
    trainer = Trainer(small_model(), steps=9, batch_size=4, warmup_steps=0)
    edet.Predictor(trainer.model)
    before = copy.deepcopy(trainer.model.state_dict())
    trainer.step(*batch())
    assert trainer.model.training
    changed = [k for k, v in trainer.model.state_dict().items() if not torch.equal(v, before[k])]
    assert any("running_mean" in key for key in changed)


@pytest.mark.parametrize("precision", ["bfloat16", "float16"])
def test_autocast(precision: str) -> None:
    plain = Trainer(small_model(), steps=9, batch_size=4, warmup_steps=0)
    half = Trainer(small_model(), steps=9, batch_size=4, warmup_steps=0, precision=precision)
    a, b = plain.step(*batch()), half.step(*batch())
    torch.testing.assert_close(a.total, b.total, rtol=0.05, atol=0)
    assert not torch.equal(a.total, b.total)
    assert (half.scaler is not None) == (precision == "float16")
    before = half.average.updates
    for _ in range(9):  # until the losses' scale is found
        half.step(*batch())
    assert half.average.updates > before
    assert not half.skipped


def test_a_scale_that_is_too_large_is_lowered_and_not_counted() -> None:
    trainer = Trainer(small_model(), steps=9, batch_size=4, precision="float16")
    assert trainer.scaler is not None
    trainer.scaler._init_scale = 2.0**126
    before = everything(trainer)
    for _ in range(2):
        trainer.step(*batch())
    assert trainer.scaler.get_scale() == 2.0**124
    assert same(everything(trainer)[:100], before[:100])
    assert not trainer.skipped


def test_float64() -> None:
    x = torch.tensor([0.05, 0.3], dtype=torch.float64, requires_grad=True)
    loss = huber_loss(x, torch.tensor([0.1, 0.1]))
    loss.backward()
    assert loss.item() == pytest.approx(0.01625)
    assert x.grad is not None
    torch.testing.assert_close(x.grad, torch.tensor([-0.05, 0.1], dtype=torch.float64))
    narrow = Trainer(small_model(), steps=9, batch_size=4, warmup_steps=0)
    wide = Trainer(small_model().double(), steps=9, batch_size=4, warmup_steps=0)
    images, boxes, labels = batch()
    a, b = narrow.step(images, boxes, labels), wide.step(images.double(), boxes, labels)
    torch.testing.assert_close(a.total, b.total.float(), rtol=1e-4, atol=0)
    assert wide.average.model.class_net.predict.conv_pw.weight.dtype == torch.float64


def test_uint8_images_are_normalised() -> None:
    pixels = torch.randint(0, 256, (4, 3, 64, 64), dtype=torch.uint8)
    _, boxes, labels = batch()
    config = small_model().config
    mean, std = (torch.tensor(v).view(3, 1, 1) for v in (config.mean, config.std))
    a = Trainer(small_model(), steps=9, batch_size=4).step(pixels, boxes, labels)
    b = Trainer(small_model(), steps=9, batch_size=4).step(
        (pixels / 255 - mean) / std, boxes, labels
    )
    torch.testing.assert_close(a, b)


def test_adamw() -> None:
    trainer = Trainer(small_model(), steps=9, batch_size=4, optimizer="adamw", warmup_steps=0)
    assert trainer.learning_rate == 3e-4
    assert [g["weight_decay"] for g in trainer.optimizer.param_groups] == [1e-4, 0]
    weight = trainer.model.class_net.predict.conv_pw.weight
    before = weight.detach().clone()
    trainer.step(*batch())
    assert 1e-4 < (weight - before).abs().max() < 4e-4


@pytest.mark.parametrize("options", [{}, {"optimizer": "adamw", "precision": "float16"}])
def test_state_goes_on_to_the_same_bits(options: dict[str, Any]) -> None:
    def trainer() -> Trainer:
        made = Trainer(small_model(), steps=20, batch_size=4, learning_rate=0.01, **options)
        if made.scaler is not None:
            made.scaler._init_scale = 128.0  # small enough from the start
        return made

    straight = trainer()
    for i in range(3):
        straight.step(*batch(seed=i))
    state = pickle.loads(pickle.dumps(straight.state_dict()))
    after = [torch.rand(2), straight.step(*batch(seed=3)).total]
    resumed = trainer()
    resumed.load_state_dict(state)
    assert resumed.average.updates == 3
    assert torch.equal(torch.rand(2), after[0])
    assert torch.equal(resumed.step(*batch(seed=3)).total, after[1])
    assert same(everything(straight), everything(resumed))
    assert resumed.learning_rate == straight.learning_rate
    other = Trainer(small_model(num_classes=3), steps=20, batch_size=4, **options)
    with pytest.raises(ValueError, match=r"(?s)the state is of another model: .*class_net"):
        other.load_state_dict(state)
    mixed = Trainer(small_model(), steps=20, batch_size=4, precision="bfloat16")
    if "precision" in options:
        with pytest.raises(ValueError, match="another precision"):
            mixed.load_state_dict(state)


def test_a_trainer_can_be_pickled_and_copied() -> None:
    trainer = Trainer(small_model(), steps=9, batch_size=4, warmup_steps=1)
    trainer.step(*batch())
    again = pickle.loads(pickle.dumps(trainer))
    copied = copy.deepcopy(trainer)
    for each in (trainer, again, copied):
        each.step(*batch())
    assert same(everything(trainer), everything(again))
    assert same(everything(trainer), everything(copied))


def test_the_average_is_never_stale_in_a_predictor() -> None:
    trainer = Trainer(lite_model(), steps=9, batch_size=4, learning_rate=0.1, warmup_steps=0)
    kept = edet.Predictor(trainer.average.model, score_threshold=0)
    image = torch.randint(0, 256, (3, 64, 64), dtype=torch.uint8)
    for _ in range(3):  # the second and later calls of a shape are planned
        kept(image)
    for i in range(3):
        trainer.step(*batch(seed=i))
        own = copy.deepcopy(trainer.average.model)
        own.unfreeze()
        for part in own.modules():
            if isinstance(part, PackedModule):
                part.repack()
        expected = edet.Predictor(own, score_threshold=0)(image)
        for predictor in (kept, edet.Predictor(trainer.average.model, score_threshold=0)):
            for _ in range(3):
                found = predictor(image)
                assert torch.equal(found.scores, expected.scores)
                assert torch.equal(found.boxes, expected.boxes)


def test_the_average_of_a_half_model_is_kept_wide() -> None:
    model = nn.Linear(4, 1).bfloat16()
    average = MovingAverage(model, 0.9998)
    average.updates = 10**6  # past its beginning
    assert average.model.weight.dtype == torch.float32
    start = average.model.weight.clone()
    nn.init.constant_(model.weight, 1.0)
    for _ in range(500):
        average.update(model)
    expected = 1 + (start - 1) * 0.9998**500
    torch.testing.assert_close(average.model.weight, expected, rtol=1e-4, atol=1e-5)


Change = Callable[[Tensor, list[Any], list[Any]], tuple[Any, Any, Any]]


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        (lambda i, b, n: (list(i), b, n), TypeError, r"images must be one tensor .* got list"),
        (lambda i, b, n: (i[0], b, n), TypeError, r"images must be one tensor .* got \(3, 64, 64"),
        (
            lambda i, b, n: (i, [x.numpy() for x in b], n),
            TypeError,
            r"boxes\[0\] must be a tensor, got ndarray: torch.as_tensor it",
        ),
        (
            lambda i, b, n: (i, b, [x.tolist() for x in n]),
            TypeError,
            r"labels\[0\] must be a tensor, got list",
        ),
        (
            lambda i, b, n: (i, [torch.tensor([])] * 4, n),
            ValueError,
            r"boxes\[0\] must be \(M, 4\), got \(0,\): torch.zeros\(0, 4\) for an image without",
        ),
        (
            lambda i, b, n: (i[:1], b[:1], n[:1]),
            ValueError,
            "one image of 64×64 has one pixel at the last level, .* give larger images, a larger",
        ),
    ],
)
def test_bad_batches(change: Change, error: type[Exception], message: str) -> None:
    trainer = Trainer(small_model(), steps=9, batch_size=4)
    before = everything(trainer)
    with pytest.raises(error, match=message):
        trainer.step(*change(*batch()))
    assert same(everything(trainer), before)


def test_boxes_of_fractions_are_noticed() -> None:
    trainer = Trainer(small_model(), steps=9, batch_size=4)
    images, boxes, labels = batch()
    with pytest.warns(UserWarning, match="none has a coordinate above 1: multiply fractions by"):
        trainer.step(images, [box / 64 for box in boxes], labels)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"batch_size": 0}, "batch_size must be at least 1, got 0"),
        ({"accumulate": 0}, "accumulate must be at least 1, got 0"),
        ({"optimizer": "adam"}, "optimizer must be one of sgd, adamw, got 'adam'"),
        ({"precision": "fp16"}, "precision must be one of float32, bfloat16, float16, got"),
        ({"freeze": ["head"]}, "freeze must be one of backbone, norms, got 'head'"),
    ],
)
def test_bad_options(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Trainer(small_model(), **({"steps": 4, "batch_size": 4} | options))


def test_steps_must_be_known() -> None:
    trainer = Trainer(small_model(), batch_size=4)
    with pytest.raises(ValueError, match="steps must be given to Trainer"):
        trainer.step(*batch())
    with pytest.raises(ValueError, match="no state before steps are known"):
        trainer.state_dict()


def test_targets_of_images_without_objects() -> None:
    anchors = torch.tensor([[0.0, 0, 8, 8]])
    found = assign_targets(anchors, [torch.zeros(0, 4)], [torch.zeros(0, dtype=torch.int64)])
    assert found.labels.tolist() == [[-1]]


def test_models_that_are_frozen() -> None:
    model = small_model()
    edet.Predictor(model)  # freezes it, which training undoes
    assert all(p.requires_grad for p in Trainer(model, steps=3, batch_size=2).model.parameters())
    average = MovingAverage(model).model
    with pytest.raises(ValueError, match="got none that requires a gradient, as in a moving"):
        Trainer(average, steps=3, batch_size=2)
    Trainer(average.requires_grad_(), steps=3, batch_size=2)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"optimizer": "adamw"}, "is of another optimizer"),
        (
            {"freeze": ("norms",)},
            "of another optimizer than this trainer.s, or of another freeze",
        ),
        ({"precision": "float16"}, "with another precision"),
    ],
)
def test_a_state_that_does_not_fit_changes_nothing(options: dict[str, Any], message: str) -> None:
    """Of another optimizer the weights were loaded, and the first step ended in a KeyError."""
    trainer = Trainer(small_model(), steps=9, batch_size=4)
    trainer.step(*batch())
    other = Trainer(small_model(), steps=9, batch_size=4, **options)
    before = everything(other)
    with pytest.raises(ValueError, match=message):
        other.load_state_dict(trainer.state_dict())
    assert all(x.equal(y) for x, y in zip(before, everything(other), strict=True))


def test_a_state_that_lacks_something() -> None:
    trainer = Trainer(small_model(), steps=9, batch_size=4)
    state = trainer.state_dict()
    del state["schedule"]
    with pytest.raises(ValueError, match=r"one of Trainer\.state_dict, it lacks schedule"):
        trainer.load_state_dict(state)


def test_steps_without_images_or_gradients() -> None:
    trainer = Trainer(small_model(), steps=9, batch_size=4)
    with pytest.raises(ValueError, match="images must hold at least one image, got none"):
        trainer.step(torch.zeros(0, 3, 64, 64), [], [])
    with torch.no_grad(), pytest.raises(ValueError, match="step needs gradients"):
        trainer.step(*batch())
