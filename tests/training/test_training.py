"""Losses, the recipe's parts, and a small EfficientDet that learns from drawn rectangles."""

from __future__ import annotations

import copy
import math
from typing import cast

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import edet
import edet_kernels
from edet.training.losses import Losses, detection_loss, focal_loss, huber_loss
from edet.training.targets import Targets
from edet.training.trainer import MovingAverage, Trainer, sgd, warmup_cosine
from small_models import small_model


def published_focal(logits: Tensor, labels: Tensor, alpha: float, gamma: float) -> Tensor:
    """The focal loss by one-hot targets, with autograd's gradient."""
    targets = F.one_hot(labels.clamp(min=0), logits.shape[-1]).to(logits)
    targets[labels < 0] = 0
    p = logits.sigmoid()
    p_t = targets * p + (1 - targets) * (1 - p)
    factor = targets * alpha + (1 - targets) * (1 - alpha)
    entropy = F.binary_cross_entropy_with_logits(logits, targets, reduction="none")
    loss = factor * (1 - p_t) ** gamma * entropy
    return loss[labels != -2].sum()


@pytest.mark.parametrize("gamma", [1.5, 2.0])
def test_focal_loss_is_the_published_one(gamma: float) -> None:
    logits = (torch.randn(3, 40, 7, dtype=torch.float64) * 4).requires_grad_()
    labels = torch.randint(-2, 7, (3, 40))
    found = focal_loss(logits, labels, alpha=0.3, gamma=gamma)
    expected = published_focal(logits, labels, 0.3, gamma)
    torch.testing.assert_close(found, expected)
    [gradient] = torch.autograd.grad(found, logits)
    torch.testing.assert_close(gradient, torch.autograd.grad(expected, logits)[0])


def test_focal_loss_of_half_precision_and_of_extremes() -> None:
    labels = torch.tensor([0, -1, 1, -2])
    extremes = torch.tensor([[-90.0, 90], [-90, 90], [0, 0], [float("nan")] * 2])
    logits = extremes.clone().requires_grad_()
    loss = focal_loss(logits, labels)
    loss.backward()
    assert loss.isfinite()
    assert logits.grad is not None
    assert logits.grad[:3].isfinite().all()
    half = torch.randn(4, 2).bfloat16()
    assert focal_loss(half, labels).dtype == torch.float32
    torch.testing.assert_close(focal_loss(half, labels), focal_loss(half.float(), labels))


def test_focal_loss_has_no_second_derivative() -> None:
    logits = torch.randn(4, 2, requires_grad=True)
    loss = focal_loss(logits, torch.tensor([0, -1, 1, -2]))
    with pytest.raises(RuntimeError, match="focal_loss has no second derivative"):
        torch.autograd.grad(loss, logits, create_graph=True)


def test_huber_loss() -> None:
    found = huber_loss(torch.tensor([0.05, 1.0, 5.0]), torch.tensor([0.1, 2.0, 0.0]))
    expected = 0.5 * 0.05**2 + 0.1 * (1 - 0.05)
    assert found.item() == pytest.approx(expected)


def test_detection_loss_adds_the_levels_up() -> None:
    classes = [torch.randn(2, 3 * 4, *size) for size in ((4, 3), (2, 2))]
    boxes = [torch.randn(2, 3 * 4, *size) for size in ((4, 3), (2, 2))]
    anchors = 3 * (12 + 4)
    labels = torch.randint(-2, 4, (2, anchors))
    regressions = torch.randn(2, anchors, 4) * (labels >= 0)[..., None]
    found = detection_loss(classes, boxes, Targets(labels, regressions))
    n = (labels >= 0).sum() + 1

    def rows(maps: list[Tensor]) -> Tensor:
        return torch.cat([x.permute(0, 2, 3, 1).reshape(2, -1, 4) for x in maps], 1)

    focal = published_focal(rows(classes), labels, 0.25, 1.5) / n
    huber = huber_loss(rows(boxes), regressions) / (4 * n)
    torch.testing.assert_close(found, Losses(focal + 50 * huber, focal, huber))
    with pytest.raises(ValueError, match="targets must be of 2 images and 36 anchors, got"):
        detection_loss(classes[:1], boxes[:1], Targets(labels, regressions))
    with pytest.raises(ValueError, match=r"labels must be \(2,\) for these logits, got \(3,\)"):
        focal_loss(torch.zeros(2, 5), torch.zeros(3, dtype=torch.int64))


def test_learning_rate() -> None:
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], 2.0)
    schedule = warmup_cosine(optimizer, 12, 4)
    rates = []
    for _ in range(14):
        rates.append(schedule.get_last_lr()[0])
        optimizer.step()
        schedule.step()
    assert rates[:5] == [0, 0.5, 1, 1.5, 2]
    assert rates[8] == pytest.approx(1 + math.cos(math.pi / 2))
    assert rates[12] == rates[13] == pytest.approx(0, abs=1e-12)
    with pytest.raises(ValueError, match=r"0 ≤ warmup_steps < steps \(4\), got 4"):
        warmup_cosine(optimizer, 4, 4)


def test_weight_decay_is_for_convolutions() -> None:
    model = edet.create_model("tf_efficientdet_d0", width=8, cells=1, head_repeats=1)
    decayed, rest = sgd(model, 0.1).param_groups
    assert decayed["weight_decay"] == 4e-5
    assert rest["weight_decay"] == 0
    assert {p.dim() for p in decayed["params"]} == {4}
    assert len(decayed["params"]) + len(rest["params"]) == len(list(model.parameters()))


def test_moving_average() -> None:
    model = nn.BatchNorm2d(2)
    average = MovingAverage(model, 0.5)
    expected = torch.ones(2)
    for n, value in enumerate((3.0, 5.0), 1):
        nn.init.constant_(model.weight, value)
        cast(Tensor, model.num_batches_tracked).add_(1)
        average.update(model)
        decay = min(0.5, (1 + n) / (10 + n))
        expected = decay * expected + (1 - decay) * value
    torch.testing.assert_close(average.model.weight, expected)
    assert average.model.num_batches_tracked == 2
    assert not average.model.training
    assert not average.model.weight.requires_grad
    with pytest.raises(ValueError, match=r"decay must be in \[0, 1\), got 1"):
        MovingAverage(model, 1.0)


def rectangles(count: int) -> tuple[Tensor, list[Tensor], list[Tensor]]:
    """Images of one bright or dark rectangle each, its box, and its class."""
    images, boxes, labels = torch.randn(count, 3, 64, 64) * 0.1, [], []
    for image in images:
        x, y = torch.randint(0, 32, (2,)).tolist()
        width, height = torch.randint(16, 32, (2,)).tolist()
        label = int(torch.randint(1, 3, ()))
        image[:, y : y + height, x : x + width] += 2.0 if label == 1 else -2.0
        boxes.append(torch.tensor([[x, y, x + width, y + height]], dtype=torch.float32))
        labels.append(torch.tensor([label]))
    return images, boxes, labels


def test_small_model_learns_rectangles_as_by_the_layers() -> None:
    fused = Trainer(small_model(), steps=50, batch_size=4, learning_rate=0.02)
    layers = copy.deepcopy(fused)
    layers.optimizer = sgd(layers.model, 0.02)
    layers.schedule = warmup_cosine(layers.optimizer, 50, 2)
    totals: list[float] = []
    for _ in range(50):
        # every step of the layers starts where the fused one did: rounding must not add up
        layers.model.load_state_dict(fused.model.state_dict())
        for p, q in zip(fused.model.parameters(), layers.model.parameters(), strict=True):
            state = fused.optimizer.state[p]
            layers.optimizer.state[q] = {k: v.clone() for k, v in state.items()}
        batch = rectangles(4)
        with edet_kernels.backend("reference"):
            expected = layers.step(*batch)
        losses = fused.step(*batch)
        torch.testing.assert_close(losses, expected, rtol=1e-4, atol=1e-5)
        for (name, x), y in zip(
            fused.model.state_dict().items(), layers.model.state_dict().values(), strict=True
        ):
            assert torch.allclose(x, y, rtol=1e-4, atol=1e-5), name
        totals.append(losses.total.item())
    first, last = sum(totals[:10]) / 10, sum(totals[-10:]) / 10
    assert last < 0.6 * first, totals
    assert fused.average.updates == 50


def test_bad_batches() -> None:
    trainer = Trainer(small_model(), steps=2, batch_size=1, warmup_steps=0)
    images, boxes, labels = rectangles(2)
    with pytest.raises(ValueError, match=r"boxes must hold one entry per image \(2\), got 1"):
        trainer.step(images, boxes[:1], labels[:1])
    with pytest.raises(ValueError, match=r"labels\[0\] must be 1 to 2, got 3 to 3"):
        trainer.step(images, boxes, [torch.tensor([3])] * 2)
    with pytest.raises(ValueError, match="batch_size must be at least 1, got 0"):
        Trainer(trainer.model, steps=2, batch_size=0)
