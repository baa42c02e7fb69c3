"""Non-maximum suppression against a plain Python loop, and its corner cases."""

import math

import pytest
import torch

import edet_kernels
from edet_kernels.testing.numeric import assert_identical
from edet_kernels.testing.samples import sample
from plain_nms import plain_nms

METHODS = ("hard", "gaussian")

pytestmark = pytest.mark.usefixtures("kernels_only")
backends = pytest.mark.usefixtures("backend")
methods = pytest.mark.parametrize("method", METHODS)


def boxes_of(*rows):
    """A batch of one image with these boxes."""
    return torch.tensor([rows], dtype=torch.float32)


def kept(result):
    """Indices that were kept in each image."""
    indices, _, counts = result
    return [row[:n].tolist() for row, n in zip(indices, counts, strict=True)]


@backends
@methods
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"iou_threshold": 0.3},
        {"iou_threshold": 0.0},
        {"score_threshold": 0.4},
        {"sigma": 0.1},
        {"max_detections": 3},
        {"class_agnostic": True},
        {"class_agnostic": True, "iou_threshold": 0.2, "sigma": 0.1, "max_detections": 9},
        {"iou_threshold": 1.0, "score_threshold": -1.0},
    ],
    ids=str,
)
def test_agrees_with_a_plain_loop(method, options):
    # integer corners: every IoU is a ratio of small integers, compared alike in any precision
    call = sample("nms", batch=3, count=60, method=method, **options)
    indices, scores, counts = call()
    limit = options.get("max_detections", 100)
    assert indices.shape == scores.shape == (3, limit)
    for b in range(3):
        image = [t[b].tolist() for t in (call.maps, *call.weights)]
        expected, expected_scores = plain_nms(*image, method=method, **options)
        count = int(counts[b])
        assert indices[b].tolist() == expected + [-1] * (limit - count)
        assert scores[b, :count].tolist() == pytest.approx(expected_scores, rel=1e-5)
        assert not scores[b, count:].any()


@methods
@pytest.mark.parametrize("class_agnostic", [False, True])
@pytest.mark.parametrize("count", [1, 15, 16, 17, 500])
def test_kernel_against_the_reference(method, count, class_agnostic):
    call = sample("nms", count=count, method=method, class_agnostic=class_agnostic)
    call.check(torch.float32)


@methods
def test_fractional_boxes_and_saturated_scores(method):
    call = sample("nms", count=200, method=method)
    call.maps.mul_(0.37).add_(torch.rand_like(call.maps))
    call.weights[0].round_(decimals=1)  # many ties
    call.check(torch.float32)


@backends
@methods
def test_the_first_of_equal_scores_wins(method):
    boxes = boxes_of([0, 0, 4, 4], [9, 9, 12, 12], [0, 0, 4, 4], [5, 0, 8, 3])
    result = edet_kernels.nms(
        boxes, torch.full((1, 4), 0.5), torch.zeros(1, 4, dtype=torch.int64), method=method
    )
    # gaussian: the duplicate comes last, its score decayed
    assert kept(result) == [[0, 1, 3] if method == "hard" else [0, 1, 3, 2]]


@backends
def test_equal_iou_does_not_suppress():
    boxes = boxes_of([0, 0, 2, 1], [0, 0, 1, 1])  # IoU is one half, exactly
    arguments = (boxes, torch.tensor([[0.9, 0.8]]), torch.zeros(1, 2, dtype=torch.int64))
    assert kept(edet_kernels.nms(*arguments, iou_threshold=0.5)) == [[0, 1]]
    assert kept(edet_kernels.nms(*arguments, iou_threshold=0.499)) == [[0]]


@backends
def test_gaussian_decay():
    boxes = boxes_of([0, 0, 2, 1], [0, 0, 1, 1], [0, 0, 2, 1])
    arguments = (boxes, torch.tensor([[0.9, 0.8, 0.7]]), torch.zeros(1, 3, dtype=torch.int64))
    indices, scores, _ = edet_kernels.nms(*arguments, method="gaussian", sigma=0.25)
    once, again = 0.8 * math.exp(-0.25 / 0.25), 0.7 * math.exp(-1 / 0.25)
    assert indices[0, :3].tolist() == [0, 1, 2]
    expected = [0.9, once, again * math.exp(-0.25 / 0.25)]
    assert scores[0, :3].tolist() == pytest.approx(expected, rel=1e-5)


@backends
@methods
def test_labels_do_not_suppress_each_other(method):
    boxes = torch.tensor([[[0.0, 0, 4, 4]] * 3])
    labels = torch.tensor([[2**40, -5, 2**40]])
    scores = torch.tensor([[0.5, 0.6, 0.7]])
    result = edet_kernels.nms(boxes, scores, labels, method=method, score_threshold=0.1)
    assert kept(result) == [[2, 1]]  # exp(−1/0.5)·0.5 is below the threshold, too


@backends
@methods
def test_labels_suppress_each_other_when_asked(method):
    boxes = torch.tensor([[[0.0, 0, 4, 4]] * 3])
    labels = torch.tensor([[2**40, -5, 2**40]])
    scores = torch.tensor([[0.5, 0.6, 0.7]])
    result = edet_kernels.nms(
        boxes, scores, labels, method=method, score_threshold=0.1, class_agnostic=True
    )
    assert kept(result) == [[2]]


@backends
@methods
def test_across_labels_is_as_with_one_label(method):
    call = sample("nms", batch=3, count=80, method=method)
    scores, labels = call.weights
    across = edet_kernels.nms(call.maps, scores, labels, class_agnostic=True, method=method)
    one = edet_kernels.nms(call.maps, scores, torch.zeros_like(labels), method=method)
    assert_identical(across, one)
    assert_identical(
        edet_kernels.nms(call.maps, scores, labels, class_agnostic=False, method=method),
        edet_kernels.nms(call.maps, scores, labels, method=method),
    )
    assert not torch.equal(across[1], edet_kernels.nms(call.maps, scores, labels, method=method)[1])


@backends
@methods
def test_nan_scores_are_never_kept(method):
    call = sample("nms", method=method, max_detections=40)
    call.weights[0][:, ::3] = torch.nan
    for row in kept(call()):
        assert row and all(i % 3 for i in row)


@backends
@methods
@pytest.mark.parametrize("threshold", [0.0, 0.5])
def test_scores_at_the_threshold_are_dropped(method, threshold):
    boxes = boxes_of([0, 0, 1, 1], [5, 5, 6, 6])
    scores = torch.tensor([[threshold, threshold + 0.25]])
    labels = torch.zeros(1, 2, dtype=torch.int64)
    result = edet_kernels.nms(boxes, scores, labels, method=method, score_threshold=threshold)
    assert kept(result) == [[1]]


@methods
@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf], ids=str)
def test_non_finite_boxes_and_scores(method, value):
    for number in (0, 1):  # boxes, scores
        call = sample("nms", method=method)
        (call.maps, *call.weights)[number].view(2, -1)[:, ::7] = value
        call.check(torch.float32)


@methods
def test_inverted_and_empty_boxes(method):
    call = sample("nms", method=method)
    call.maps[:, ::5] = call.maps[:, ::5, [2, 3, 0, 1]]
    call.maps[:, 1::5, 2:] = call.maps[:, 1::5, :2]
    call.check(torch.float32)


@backends
@methods
@pytest.mark.parametrize(("batch", "count"), [(0, 5), (2, 0), (0, 0)])
def test_no_images_or_no_boxes(method, batch, count):
    indices, scores, counts = edet_kernels.nms(
        torch.zeros(batch, count, 4),
        torch.zeros(batch, count),
        torch.zeros(batch, count, dtype=torch.int64),
        method=method,
        max_detections=7,
    )
    assert_identical(indices, torch.full((batch, 7), -1))
    assert_identical(scores, torch.zeros(batch, 7))
    assert_identical(counts, torch.zeros(batch, dtype=torch.int64))


def test_layouts_give_identical_results():
    call = sample("nms")
    expected = call()

    def strided(t):
        return torch.stack([t, t], -1)[..., 0]

    boxes, (scores, labels) = call.maps, call.weights
    assert_identical(edet_kernels.nms(strided(boxes), strided(scores), strided(labels)), expected)
    assert_identical(
        edet_kernels.nms(
            boxes.transpose(0, 1).contiguous().transpose(0, 1),
            scores.t().contiguous().t(),
            labels.t().contiguous().t(),
        ),
        expected,
    )


@methods
def test_float64_runs_the_reference(method, monkeypatch):
    monkeypatch.setenv("EDET_BACKEND", "auto")
    call = sample("nms", method=method)
    boxes, (scores, labels) = call.maps.double(), call.weights
    result = edet_kernels.nms(boxes, scores.double(), labels, method=method)
    assert result[1].dtype == torch.float64
    assert_identical(result[0], call()[0])


@methods
def test_symmetric_in_the_order_of_corners(method):
    # x1, y1, x2, y2 and y1, x1, y2, x2 mean the same to an IoU
    call = sample("nms", method=method)
    assert_identical(call(call.maps[..., [1, 0, 3, 2]].contiguous()), call())
