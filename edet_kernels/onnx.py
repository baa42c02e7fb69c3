"""``detect`` by standard operators, for ``torch.onnx.export``: no library is needed to run them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import cast

import torch
from torch import Tensor
from torch.nn import functional as F

#: Below every score: what is no box, or one of another label.
_NONE = -1.0


def in_onnx_export() -> bool:
    """Whether ``torch.onnx.export`` is recording what is called now."""
    return torch.compiler.is_exporting() and torch.onnx.is_in_onnx_export()


# the strict exporter takes the latter for False
in_onnx_export._dynamo_marked_constant = True  # type: ignore[attr-defined]


def _candidates(
    class_outputs: Sequence[Tensor], box_outputs: Sequence[Tensor], anchors: Tensor, most: int
) -> tuple[Tensor, Tensor, Tensor]:
    """The best ``most`` of anchors × classes: boxes (B, K, 4), scores (B, K) and labels (B, K)."""
    cell_anchors = box_outputs[0].shape[1] // 4
    classes = class_outputs[0].shape[1] // cell_anchors

    def flat(maps: Sequence[Tensor], values: int) -> Tensor:
        rows = [x.permute(0, 2, 3, 1).reshape(x.shape[0], -1, values) for x in maps]
        return torch.cat(rows, 1)

    logits, regressions = flat(class_outputs, classes).flatten(1), flat(box_outputs, 4)
    # of equal ones ONNX's TopK takes the first, as detect does
    best, order = logits.topk(min(most, logits.shape[1]))
    # one operator, where torch's division of integers becomes five, some of them in float32
    anchor = torch.onnx.ops.symbolic(
        "Div", (order, torch.tensor(classes)), dtype=order.dtype, shape=order.shape
    )
    labels = order - anchor * classes
    t = regressions.gather(1, anchor[..., None].expand(-1, -1, 4)).float()
    low, high = anchors.float().split(2, -1)
    centre, size = torch.cat([(low + high) / 2, high - low], -1)[anchor].split(2, -1)
    centre = t[..., :2] * size + centre
    half = t[..., 2:].exp() * size / 2
    y1, x1 = (centre - half).split(1, -1)
    y2, x2 = (centre + half).split(1, -1)
    return torch.cat([x1, y1, x2, y2], -1), best.float().sigmoid(), labels


def _suppressed(
    boxes: Tensor, scores: Tensor, iou_threshold: float, score_threshold: float, most: int
) -> Tensor:
    """The scores (B, K) of the boxes that NonMaxSuppression selects, :data:`_NONE` for the others.

    Args:
        boxes: (B, K, 4).
        scores: (B, classes, K); a box has a score of one class only.
    """
    symbolic = torch.onnx.ops.symbolic
    # The number of boxes that are selected is known when they are. A number that is just as unknown
    # stands for it in the shapes; nothing computes with it, so that it is not in the graph.
    count = cast(int, (scores > score_threshold).sum().item())
    selected = symbolic(
        "NonMaxSuppression",
        (
            boxes,
            scores,
            torch.tensor([most]),
            torch.tensor([iou_threshold], dtype=torch.float32),
            torch.tensor([score_threshold], dtype=torch.float32),
        ),
        dtype=torch.int64,
        shape=(count, 3),
    )
    scores = scores.amax(1)
    places = selected.index_select(1, torch.tensor([0, 2]))  # of image, class, box
    found = symbolic("GatherND", (scores, places), dtype=scores.dtype, shape=(count,))
    nothing = torch.full_like(scores, _NONE)
    return symbolic("ScatterND", (nothing, places, found), dtype=scores.dtype, shape=scores.shape)


def detect(
    class_outputs: Sequence[Tensor],
    box_outputs: Sequence[Tensor],
    anchors: Tensor,
    *,
    limits: Tensor | None,
    method: str,
    iou_threshold: float,
    sigma: float,
    score_threshold: float,
    max_detections: int,
    max_candidates: int,
    class_agnostic: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """See :func:`edet_kernels.detect`; the logits must not be NaN, and ``sigma`` is not used.

    Raises:
        ValueError: ``method`` is not ``hard``: ONNX has no operator for soft-NMS.
    """
    if method != "hard":
        raise ValueError(f"method must be hard in ONNX, which has no soft-NMS, got {method}")
    boxes, scores, labels = _candidates(class_outputs, box_outputs, anchors, max_candidates)
    if limits is not None:
        ends = limits.float().repeat(1, 2)[:, None]
        boxes = torch.minimum(boxes.clamp(min=0), ends)
    by_class = scores[:, None]
    if not class_agnostic:
        # each box competes in the row of its label: as if NonMaxSuppression knew of labels
        cell_anchors = box_outputs[0].shape[1] // 4
        classes = torch.arange(class_outputs[0].shape[1] // cell_anchors)
        by_class = torch.where(labels[:, None] == classes[:, None], by_class, _NONE)
    kept = _suppressed(boxes, by_class, iou_threshold, max(score_threshold, _NONE), max_detections)
    most = min(max_detections, kept.shape[1])
    scores, index = kept.topk(most)
    real = scores >= 0
    boxes = boxes.gather(1, index[..., None].expand(-1, -1, 4))
    boxes = torch.where(real[..., None], boxes, 0.0)
    scores = torch.where(real, scores, 0.0)
    labels = torch.where(real, labels.gather(1, index), -1)
    if most < max_detections:
        rest = (0, max_detections - most)
        boxes, scores = F.pad(boxes, (0, 0, *rest)), F.pad(scores, rest)
        labels = F.pad(labels, rest, value=-1)
    return boxes, scores, labels, real.sum(1)
