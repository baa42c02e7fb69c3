"""What each anchor should predict, from the objects of the images: for training.

Max-IoU matching as published (EfficientDet's code; RetinaNet, Lin et al. 2017, section 4).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from ..detection.anchors import encode_boxes

#: Labels of anchors without a class.
BACKGROUND, IGNORED = -1, -2


class Targets(NamedTuple):
    """What the N anchors of each of B images should predict.

    Attributes:
        labels: (B, N) int64, the class from 0, or :data:`BACKGROUND` or :data:`IGNORED`.
        regressions: (B, N, 4) ty, tx, th, tw; 0 where the label is no class.
    """

    labels: Tensor
    regressions: Tensor

    @property
    def positives(self) -> Tensor:
        """(B,) anchors that have a class."""
        return (self.labels >= 0).sum(1)


def pairwise_iou(a: Tensor, b: Tensor) -> Tensor:
    """Intersection over union (M, N) of (M, 4) with (N, 4) boxes; 0 where the union is 0."""
    low = torch.maximum(a[:, None, :2], b[:, :2])
    high = torch.minimum(a[:, None, 2:], b[:, 2:])
    intersection = (high - low).clamp(min=0).prod(-1)
    area_a, area_b = ((x[:, 2:] - x[:, :2]).prod(-1) for x in (a, b))
    union = area_a[:, None] + area_b - intersection
    return torch.where(union > 0, intersection / union, 0)


def match_anchors(boxes: Tensor, anchors: Tensor, *, low: float = 0.5, high: float = 0.5) -> Tensor:
    """The object that each anchor stands for.

    An anchor takes the object it overlaps most (the first of equal ones) when their IoU is at least
    ``high``; below ``low`` it is background, in between it is ignored. Then the best anchor of each
    object takes that object, whatever their IoU, unless it is 0; the first of several objects wins.

    Args:
        boxes: (M, 4) objects.
        anchors: (N, 4), in the same order of coordinates.

    Returns:
        (N,) int64: index of the object, :data:`BACKGROUND` or :data:`IGNORED`.
    """
    if not len(boxes):
        return torch.full((len(anchors),), BACKGROUND, device=anchors.device)
    iou = pairwise_iou(boxes, anchors)
    best, match = iou.max(0)
    match = match.where(best >= high, torch.where(best < low, BACKGROUND, IGNORED))
    largest, forced = iou.max(1)
    for i in reversed(torch.nonzero(largest > 0).flatten().tolist()):
        match[forced[i]] = i
    return match


def assign_targets(
    anchors: Tensor,
    boxes: Sequence[Tensor],
    labels: Sequence[Tensor],
    *,
    num_classes: int | None = None,
    low: float = 0.5,
    high: float = 0.5,
) -> Targets:
    """The targets of a batch.

    Args:
        anchors: (N, 4) from :func:`edet.anchors.generate_anchors`.
        boxes: for each image (M, 4) float x1, y1, x2, y2 in pixels of the network's input, the
            corners in order.
        labels: for each image (M,) int64 from 1, as :class:`edet.Predictor` gives them.
        num_classes: the largest label allowed.
        low, high: as for :func:`match_anchors`.

    Raises:
        ValueError, TypeError: naming the argument, what it must be and what it was.
    """
    if len(boxes) != len(labels):
        raise ValueError(
            f"boxes and labels must hold one entry per image, got {len(boxes)} and {len(labels)}"
        )
    if not 0 <= low <= high <= 1:
        raise ValueError(f"low and high must be 0 ≤ low ≤ high ≤ 1, got {low} and {high}")
    found = []
    for i, (box, label) in enumerate(zip(boxes, labels, strict=True)):
        _check_objects(i, box, label, num_classes)
        yxyx = box.to(anchors)[:, [1, 0, 3, 2]]
        match = match_anchors(yxyx, anchors, low=low, high=high)
        positive = match >= 0
        classes = torch.where(positive, BACKGROUND, match)
        classes[positive] = label.to(match.device)[match[positive]] - 1
        regressions = torch.zeros_like(anchors)
        regressions[positive] = encode_boxes(yxyx[match[positive]], anchors[positive])
        found.append((classes, regressions))
    return Targets(*(torch.stack(tensors) for tensors in zip(*found, strict=True)))


def _check_objects(i: int, boxes: Tensor, labels: Tensor, num_classes: int | None) -> None:
    for name, value in (("boxes", boxes), ("labels", labels)):
        if not isinstance(value, Tensor):
            raise TypeError(
                f"{name}[{i}] must be a tensor, got {type(value).__name__}: torch.as_tensor it"
            )
    if boxes.dim() != 2 or boxes.shape[1] != 4:
        hint = "" if boxes.numel() else ": torch.zeros(0, 4) for an image without objects"
        raise ValueError(f"boxes[{i}] must be (M, 4), got {tuple(boxes.shape)}{hint}")
    if not boxes.is_floating_point():
        raise TypeError(f"boxes[{i}] must be float, got {boxes.dtype}")
    if labels.shape != boxes.shape[:1]:
        raise ValueError(f"labels[{i}] must be ({len(boxes)},), got {tuple(labels.shape)}")
    if labels.dtype != torch.int64:
        raise TypeError(f"labels[{i}] must be torch.int64, got {labels.dtype}")
    if not len(boxes):
        return
    if not bool(boxes.isfinite().all()) or bool((boxes[:, 2:] < boxes[:, :2]).any()):
        raise ValueError(f"boxes[{i}] must be finite x1, y1, x2, y2 with x1 ≤ x2 and y1 ≤ y2")
    smallest, largest = (int(n) for n in labels.aminmax())
    if smallest < 1 or (num_classes is not None and largest > num_classes):
        allowed = "1 or more" if num_classes is None else f"1 to {num_classes}"
        raise ValueError(f"labels[{i}] must be {allowed}, got {smallest} to {largest}")
