"""Which anchor is to predict what: the published matching, case by case."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from edet.detection.anchors import decode_boxes, generate_anchors
from edet.training.targets import BACKGROUND, IGNORED, assign_targets, match_anchors, pairwise_iou

SQUARES = torch.tensor([[0.0, 0, 10, 10], [0, 0, 10, 20], [20, 20, 30, 30], [50, 50, 60, 60]])


def test_pairwise_iou() -> None:
    boxes = torch.tensor([[0.0, 0, 10, 10], [5, 0, 15, 10], [7, 7, 7, 7]])
    expected = torch.tensor([[1, 1 / 3, 0], [1 / 3, 1, 0], [0, 0, 0]])
    torch.testing.assert_close(pairwise_iou(boxes, boxes), expected)


def test_best_overlap_wins_and_thresholds_hold() -> None:
    objects = torch.tensor([[0.0, 0, 10, 10], [0, 0, 10, 18]])
    match = match_anchors(objects, SQUARES)
    assert match.tolist() == [0, 1, BACKGROUND, BACKGROUND]
    objects = torch.tensor([[0.0, 0, 10, 10]])
    # an IoU of exactly 0.5 is enough
    assert match_anchors(objects, SQUARES).tolist() == [0, 0, BACKGROUND, BACKGROUND]
    assert match_anchors(objects, SQUARES, low=0.4, high=0.6).tolist()[1] == IGNORED


def test_every_object_gets_its_best_anchor() -> None:
    objects = torch.tensor([[22.0, 22, 24, 24], [100, 100, 110, 110]])  # the second touches none
    assert match_anchors(objects, SQUARES).tolist() == [BACKGROUND, BACKGROUND, 0, BACKGROUND]
    # the first of two objects with one best anchor
    objects = torch.tensor([[50.0, 50, 52, 52], [50, 50, 53, 53]])
    assert match_anchors(objects, SQUARES)[3] == 0


def test_no_objects() -> None:
    targets = assign_targets(SQUARES, [torch.zeros(0, 4)], [torch.zeros(0, dtype=torch.int64)])
    assert (targets.labels == BACKGROUND).all()
    assert not targets.regressions.any()
    assert targets.positives.tolist() == [0]


def test_targets_decode_to_the_objects() -> None:
    anchors = generate_anchors((128, 96))
    boxes = torch.tensor([[10.0, 20, 50, 90], [60, 5, 90, 30]])  # x1, y1, x2, y2
    labels = torch.tensor([3, 1])
    targets = assign_targets(anchors, [boxes, boxes[:1]], [labels, labels[:1]], num_classes=3)
    assert targets.labels.shape == (2, len(anchors))
    assert targets.labels.dtype == torch.int64
    assert set(targets.labels[1].tolist()) == {BACKGROUND, 2}
    for i in range(2):
        positive = targets.labels[i] >= 0
        decoded = decode_boxes(targets.regressions[i][positive], anchors[positive])
        classes = targets.labels[i][positive]
        expected = boxes[torch.where(classes == 2, 0, 1)][:, [1, 0, 3, 2]]
        torch.testing.assert_close(decoded, expected, rtol=1e-4, atol=1e-3)
        assert targets.positives[i] == positive.sum() > 0
        assert not targets.regressions[i][~positive].any()


BOX, LABEL = torch.tensor([[0.0, 0, 5, 5]]), torch.tensor([1])


@pytest.mark.parametrize(
    ("boxes", "labels", "error", "message"),
    [
        ([BOX], [], ValueError, "one entry per image, got 1 and 0"),
        ([BOX[0]], [LABEL], ValueError, r"boxes\[0\] must be \(M, 4\), got \(4,\)"),
        ([BOX.long()], [LABEL], TypeError, r"boxes\[0\] must be float, got torch.int64"),
        ([BOX], [LABEL.float()], TypeError, r"labels\[0\] must be torch.int64"),
        ([BOX], [torch.tensor([1, 1])], ValueError, r"labels\[0\] must be \(1,\), got \(2,\)"),
        ([BOX], [LABEL - 1], ValueError, r"labels\[0\] must be 1 to 4, got 0 to 0"),
        ([BOX], [LABEL + 4], ValueError, r"labels\[0\] must be 1 to 4, got 5 to 5"),
        ([BOX[:, [2, 3, 0, 1]]], [LABEL], ValueError, "x1 ≤ x2 and y1 ≤ y2"),
        ([BOX * float("nan")], [LABEL], ValueError, "must be finite"),
    ],
)
def test_bad_objects(
    boxes: list[Tensor], labels: list[Tensor], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        assign_targets(SQUARES, boxes, labels, num_classes=4)


def test_bad_thresholds() -> None:
    with pytest.raises(ValueError, match=r"0 ≤ low ≤ high ≤ 1, got 0.6 and 0.5"):
        assign_targets(SQUARES, [BOX], [LABEL], low=0.6)
