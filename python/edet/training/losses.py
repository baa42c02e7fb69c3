"""The losses EfficientDet was trained with: focal loss of the classes, Huber loss of the boxes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from .targets import IGNORED, Targets


class Losses(NamedTuple):
    """Scalars in float32 (float64 of float64 outputs); ``total`` is what training minimises."""

    total: Tensor
    classes: Tensor
    boxes: Tensor


def _at_least_float32(x: Tensor) -> Tensor:
    return x.to(torch.promote_types(x.dtype, torch.float32))


#: Logits that the focal loss of a CPU takes at a time, so that what it writes stays in the cache.
_PIECE = 1 << 17


def _power(p: Tensor, gamma: float) -> Tensor:
    """p^γ; for the published γ by a root, several times faster."""
    return p.sqrt().mul_(p) if gamma == 1.5 else p.pow(gamma)


def _focal_piece(
    logits: Tensor, labels: Tensor, alpha: float, gamma: float, gradient: Tensor | None
) -> Tensor:
    """The loss of a piece, a scalar; d loss / d logits is written to ``gradient``."""
    x = _at_least_float32(logits)
    p, entropy = x.sigmoid(), F.softplus(x)
    factor = _power(p, gamma).mul_(1 - alpha)
    # every entry as that of a class which is not there: (1 − α)·p^γ·(−log(1 − p))
    loss = factor * entropy
    if gradient is not None:
        # d/dx: (1 − α)·p^γ·(γ·(1 − p)·softplus(x) + p)
        torch.mul(entropy.mul_(1 - p).mul_(gamma).add_(p), factor, out=gradient)
    anchors = torch.nonzero(labels >= 0, as_tuple=True)
    there = (*anchors, labels[anchors])
    y = x[there]  # α·(1 − p)^γ·(−log p)
    p, q = y.sigmoid(), (-y).sigmoid()
    ignored = labels == IGNORED
    loss[ignored] = 0
    loss[there] = alpha * q.pow(gamma) * F.softplus(-y)
    if gradient is not None:
        gradient[ignored] = 0
        gradient[there] = -alpha * q.pow(gamma) * (gamma * p * F.softplus(-y) + q)
    return loss.sum()


class _FocalSum(torch.autograd.Function):
    """Sum of the focal loss of (anchors, classes), with its gradient; keeps the gradient only."""

    @staticmethod
    def forward(ctx: Any, logits: Tensor, labels: Tensor, alpha: float, gamma: float) -> Tensor:
        ctx.dtype = logits.dtype
        gradient = None
        if ctx.needs_input_grad[0]:
            wide = torch.promote_types(logits.dtype, torch.float32)
            gradient = torch.empty(logits.shape, dtype=wide, device=logits.device)
            ctx.save_for_backward(gradient)
        rows = max(len(labels), 1)
        if logits.device.type == "cpu":
            rows = max(_PIECE // max(logits.shape[1], 1), 1)
        pieces = [
            _focal_piece(x, y, alpha, gamma, None if gradient is None else gradient[i : i + rows])
            for i, x, y in zip(
                range(0, len(labels), rows), logits.split(rows), labels.split(rows), strict=True
            )
        ]
        total = logits.new_zeros((), dtype=torch.promote_types(logits.dtype, torch.float32))
        return torch.stack(pieces).sum() if pieces else total

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        if torch.is_grad_enabled():
            raise RuntimeError(
                "edet.losses.focal_loss has no second derivative (create_graph=True)"
            )
        [gradient] = ctx.saved_tensors
        return (gradient * grad).to(ctx.dtype), None, None, None


def focal_loss(
    logits: Tensor, labels: Tensor, *, alpha: float = 0.25, gamma: float = 1.5
) -> Tensor:
    """Sum of the focal loss (Lin et al. 2017, equation 5) over anchors × classes, in float32.

    Σ −α·(1 − p)^γ·log p where the class is there, −(1 − α)·p^γ·log(1 − p) where it is not.

    Args:
        logits: (…, classes).
        labels: (…) int64: the class from 0, −1 for background, −2 for anchors left out.
        alpha, gamma: as published for EfficientDet.
    """
    if labels.shape != logits.shape[:-1]:
        raise ValueError(
            f"labels must be {tuple(logits.shape[:-1])} for these logits, got {tuple(labels.shape)}"
        )
    flat = logits.reshape(-1, logits.shape[-1])
    return _FocalSum.apply(flat, labels.reshape(-1), alpha, gamma)


def huber_loss(regressions: Tensor, targets: Tensor, *, delta: float = 0.1) -> Tensor:
    """Sum of the Huber loss over the regressions whose target is not 0, in float32 or float64.

    As published, a target of exactly 0 counts as none, also on a positive anchor.
    """
    mask = targets != 0
    wide = _at_least_float32(regressions)
    wide = wide.to(torch.promote_types(wide.dtype, targets.dtype))
    return F.huber_loss(wide[mask], targets[mask].to(wide.dtype), reduction="sum", delta=delta)


def detection_loss(
    class_outputs: Sequence[Tensor],
    box_outputs: Sequence[Tensor],
    targets: Targets,
    *,
    alpha: float = 0.25,
    gamma: float = 1.5,
    delta: float = 0.1,
    box_weight: float = 50.0,
    normaliser: Tensor | None = None,
) -> Losses:
    """The published loss of a batch: focal / n + box_weight · Huber / 4n, n = positives + 1.

    Args:
        class_outputs, box_outputs: a model's predictions, (B, A·classes, H, W) and (B, A·4, H, W)
            for each level.
        targets: from :func:`edet.targets.assign_targets`, for anchors of these levels.
        alpha, gamma: of :func:`focal_loss`.
        delta: of :func:`huber_loss`.
        normaliser: n, a scalar, of a larger batch that this one is part of.

    Raises:
        ValueError: the targets are of another number of anchors.
    """
    cell_anchors = box_outputs[0].shape[1] // 4
    counts = [x.shape[-2] * x.shape[-1] * cell_anchors for x in box_outputs]
    shape = (box_outputs[0].shape[0], sum(counts))
    if tuple(targets.labels.shape) != shape:
        raise ValueError(
            f"targets must be of {shape[0]} images and {shape[1]} anchors, "
            f"got labels {tuple(targets.labels.shape)}"
        )

    def rows(x: Tensor) -> Tensor:
        return x.permute(0, 2, 3, 1).reshape(x.shape[0], -1, x.shape[1] // cell_anchors)

    if normaliser is None:
        normaliser = targets.positives.sum().float() + 1  # 1.0 would have the default dtype
    labels = targets.labels.split(counts, 1)
    regressions = targets.regressions.split(counts, 1)
    focal = [
        focal_loss(rows(x), level, alpha=alpha, gamma=gamma)
        for x, level in zip(class_outputs, labels, strict=True)
    ]
    huber = [
        huber_loss(rows(x), level, delta=delta)
        for x, level in zip(box_outputs, regressions, strict=True)
    ]
    classes = torch.stack(focal).sum() / normaliser
    boxes = torch.stack(huber).sum() / (4 * normaliser)
    return Losses(classes + box_weight * boxes, classes, boxes)
