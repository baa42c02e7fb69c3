"""From head outputs to boxes: nms and detect."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from .. import onnx, reference
from ..backend import runs_reference
from ..fakes import fake
from ..operators import run
from .checks import (
    check_integer,
    check_maps,
    check_number,
    check_weight,
    numbers_of,
    refuse_gradients,
    shape_of,
)

#: The most boxes or candidates of an image: memory is taken for as many as are asked for.
MOST_BOXES = 1 << 20


def _check_nms(
    iou_threshold: float,
    sigma: float,
    score_threshold: float,
    class_agnostic: bool,
    **counts: int,
) -> None:
    """Checks the settings of a non-maximum suppression; ``counts`` must be positive integers."""
    if not isinstance(class_agnostic, bool):
        raise TypeError(f"class_agnostic must be True or False, got {class_agnostic!r}")
    numbers = {"iou_threshold": iou_threshold, "sigma": sigma, "score_threshold": score_threshold}
    for name, value in numbers.items():
        check_number(name, value)
        if value != value and name != "sigma":
            raise ValueError(f"{name} must be a number, got {value!r}")
    if not sigma > 0:
        raise ValueError(f"sigma must be positive, got {sigma}")
    for name, value in counts.items():
        check_integer(name, value, 1, MOST_BOXES)


def nms(
    boxes: Tensor,
    scores: Tensor,
    labels: Tensor,
    *,
    method: str = "hard",
    iou_threshold: float = 0.5,
    sigma: float = 0.5,
    score_threshold: float = 0.0,
    max_detections: int = 100,
    class_agnostic: bool = False,
) -> tuple[Tensor, Tensor, Tensor]:
    """Non-maximum suppression of a whole batch, per class or across classes.

    Repeatedly takes the best remaining box (the first one of equals). ``hard`` drops the boxes of
    its label whose IoU with it is above ``iou_threshold``; ``gaussian`` multiplies their scores by
    exp(−IoU²/sigma) instead (soft-NMS, Bodla et al. 2017, equation 3). With ``class_agnostic``
    boxes of all labels are treated alike, so that an object is not found as two kinds.

    Args:
        boxes: (B, N, 4) float32 or float64, x1, y1, x2, y2 (or y1, x1, y2, x2), in any unit.
        scores: (B, N) of the boxes' dtype. Boxes with a score ≤ ``score_threshold`` (or NaN) are
            never returned.
        labels: (B, N) int64. Boxes of different labels do not suppress each other,
            unless ``class_agnostic``.
        method: ``hard`` or ``gaussian``.
        max_detections: K, the most boxes returned for an image, at most 2²⁰.
        class_agnostic: suppress across labels.

    Returns:
        indices (B, K) int64 padded with −1, scores (B, K) padded with 0 (decayed for
        ``gaussian``), counts (B,) int64, in the order the boxes were taken.

    Raises:
        ValueError, TypeError: naming the argument, what it must be and what it was.
    """
    (number,) = numbers_of(method=method)
    for name, t in (("boxes", boxes), ("scores", scores), ("labels", labels)):
        if not isinstance(t, Tensor):
            raise TypeError(f"{name} must be a tensor, got {type(t).__name__}")
    if boxes.dim() != 3 or boxes.shape[-1] != 4:
        raise ValueError(f"boxes must be (B, N, 4), got {shape_of(boxes)}")
    if boxes.dtype not in (torch.float32, torch.float64):
        raise TypeError(f"boxes must be float32 or float64, got {boxes.dtype}")
    for name, t, dtype in (("scores", scores, boxes.dtype), ("labels", labels, torch.int64)):
        if t.shape != boxes.shape[:2]:
            raise ValueError(f"{name} must be {tuple(boxes.shape[:2])}, got {shape_of(t)}")
        if t.dtype != dtype:
            raise TypeError(f"{name} must be {dtype}, got {t.dtype}")
        if t.device != boxes.device:
            raise ValueError(f"{name} must be on {boxes.device} like boxes, got {t.device}")
    _check_nms(iou_threshold, sigma, score_threshold, class_agnostic, max_detections=max_detections)
    refuse_gradients("nms", boxes=[boxes], scores=[scores])
    if runs_reference("nms", [boxes, scores]):
        return reference.nms(
            boxes,
            scores,
            labels,
            method=method,
            iou_threshold=iou_threshold,
            sigma=sigma,
            score_threshold=score_threshold,
            max_detections=max_detections,
            class_agnostic=class_agnostic,
        )
    return run(
        "nms",
        boxes,
        scores,
        labels,
        number,
        iou_threshold,
        sigma,
        score_threshold,
        max_detections,
        class_agnostic,
    )


@fake("nms")
def _fake_nms(
    boxes: Tensor,
    scores: Tensor,
    labels: Tensor,
    method: int,
    iou_threshold: float,
    sigma: float,
    score_threshold: float,
    max_detections: int,
    class_agnostic: bool = False,
) -> tuple[Tensor, Tensor, Tensor]:
    batch = boxes.shape[0]
    return (
        boxes.new_empty((batch, max_detections), dtype=torch.int64),
        scores.new_empty((batch, max_detections)),
        boxes.new_empty((batch,), dtype=torch.int64),
    )


def _check_heads(
    class_outputs: Sequence[Tensor],
    box_outputs: Sequence[Tensor],
    anchors: Tensor,
    limits: Tensor | None,
) -> None:
    """Checks that head outputs, anchors and limits are of one pyramid."""
    check_maps("class_outputs", class_outputs)
    check_maps("box_outputs", box_outputs)
    if box_outputs[0].device != class_outputs[0].device:
        raise ValueError(
            f"box_outputs must be on {class_outputs[0].device} like class_outputs, got "
            f"{box_outputs[0].device}"
        )
    regressions = box_outputs[0].shape[1]
    cell_anchors = regressions // 4
    if regressions % 4 or class_outputs[0].shape[1] % cell_anchors:
        raise ValueError(
            "class_outputs and box_outputs must have A·classes and A·4 channels, got "
            f"{class_outputs[0].shape[1]} and {regressions}"
        )
    sizes = [tuple(x.shape[-2:]) for x in class_outputs]
    if sizes != [tuple(x.shape[-2:]) for x in box_outputs] or (
        class_outputs[0].shape[0] != box_outputs[0].shape[0]
        or class_outputs[0].dtype != box_outputs[0].dtype
    ):
        raise ValueError(
            "box_outputs must have the levels, batch and dtype of class_outputs, got "
            f"{[shape_of(x) for x in box_outputs]} for {[shape_of(x) for x in class_outputs]}"
        )
    x = class_outputs[0]
    count = sum(h * w for h, w in sizes) * cell_anchors
    check_weight("anchors", anchors, [(count, 4)], x)
    if limits is not None:
        check_weight("limits", limits, [(x.shape[0], 2)], x)


def detect(
    class_outputs: Sequence[Tensor],
    box_outputs: Sequence[Tensor],
    anchors: Tensor,
    *,
    limits: Tensor | None = None,
    method: str = "hard",
    iou_threshold: float = 0.5,
    sigma: float = 0.5,
    score_threshold: float = 0.0,
    max_detections: int = 100,
    max_candidates: int = 5000,
    class_agnostic: bool = False,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The published post-processing of a batch: top candidates → decode → clip → suppress.

    The ``max_candidates`` largest logits over anchors × classes (the first of equal ones; NaN never
    counts) get a sigmoid and a box, centre = t·size + centre and size = exp(t)·size of the anchor,
    in float32, and go through :func:`nms`.

    Args:
        class_outputs: logits (B, A·classes, H, W) for each level.
        box_outputs: regressions ty, tx, th, tw (B, A·4, H, W) for each level.
        anchors: (N, 4) float32 y1, x1, y2, x2, in the order level, y, x, anchor of the cell.
        limits: (B, 2) float32, the largest x and y that boxes are clipped to; None: not clipped.
        method, iou_threshold, sigma, score_threshold, max_detections: as for :func:`nms`.
        max_candidates: that enter suppression.
        class_agnostic: as for :func:`nms`.

    Returns:
        boxes (B, K, 4) float32 x1, y1, x2, y2 padded with 0, scores (B, K) padded with 0, labels
        (B, K) int64 from 0, padded with −1, counts (B,) int64.

    Raises:
        ValueError, TypeError: naming the argument, what it must be and what it was.
    """
    (number,) = numbers_of(method=method)
    _check_heads(class_outputs, box_outputs, anchors, limits)
    _check_nms(
        iou_threshold,
        sigma,
        score_threshold,
        class_agnostic,
        max_detections=max_detections,
        max_candidates=max_candidates,
    )
    refuse_gradients(
        "detect", class_outputs=class_outputs, box_outputs=box_outputs, anchors=[anchors, limits]
    )
    exporting = onnx.in_onnx_export()
    if exporting or runs_reference("detect", [*class_outputs, *box_outputs, anchors, limits]):
        return (onnx if exporting else reference).detect(
            class_outputs,
            box_outputs,
            anchors,
            limits=limits,
            method=method,
            iou_threshold=iou_threshold,
            sigma=sigma,
            score_threshold=score_threshold,
            max_detections=max_detections,
            max_candidates=max_candidates,
            class_agnostic=class_agnostic,
        )
    return run(
        "detect",
        list(class_outputs),
        list(box_outputs),
        anchors.float(),
        None if limits is None else limits.float(),
        number,
        iou_threshold,
        sigma,
        score_threshold,
        max_detections,
        max_candidates,
        class_agnostic,
    )


@fake("detect")
def _fake_detect(
    class_outputs: Sequence[Tensor],
    box_outputs: Sequence[Tensor],
    anchors: Tensor,
    limits: Tensor | None,
    method: int,
    iou_threshold: float,
    sigma: float,
    score_threshold: float,
    max_detections: int,
    max_candidates: int,
    class_agnostic: bool = False,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    shape = (class_outputs[0].shape[0], max_detections)
    return (
        anchors.new_empty((*shape, 4)),
        anchors.new_empty(shape),
        anchors.new_empty(shape, dtype=torch.int64),
        anchors.new_empty(shape[:1], dtype=torch.int64),
    )
