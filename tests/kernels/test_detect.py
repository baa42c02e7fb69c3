"""Head outputs to detections: against the reference, and against lists and loops."""

import math

import pytest
import torch

import edet_kernels
from edet_kernels.testing.numeric import assert_identical
from edet_kernels.testing.samples import DTYPES, sample
from plain_nms import plain_nms

pytestmark = pytest.mark.usefixtures("kernels_only")
dtypes = pytest.mark.parametrize("dtype", DTYPES, ids=str)
methods = pytest.mark.parametrize("method", ["hard", "gaussian"])


def plain_detect(call, image, max_candidates, limits):
    """Boxes, scores and labels that enter suppression, with float64 lists."""
    box_outputs, anchors = call.weights
    candidates, start = [], 0
    for logits, regressions in zip(call.maps, box_outputs, strict=True):
        cell_anchors = regressions.shape[1] // 4
        classes = logits.shape[1] // cell_anchors
        for y in range(logits.shape[2]):
            for x in range(logits.shape[3]):
                for a in range(cell_anchors):
                    t = regressions[image, 4 * a : 4 * a + 4, y, x].tolist()
                    for c in range(classes):
                        logit = float(logits[image, a * classes + c, y, x])
                        candidates.append((logit, len(candidates), c, t, anchors[start].tolist()))
                    start += 1
    candidates.sort(key=lambda c: (-c[0], c[1]))
    boxes = []
    for _, _, _, (ty, tx, th, tw), (y1, x1, y2, x2) in candidates[:max_candidates]:
        cy, cx = ty * (y2 - y1) + (y1 + y2) / 2, tx * (x2 - x1) + (x1 + x2) / 2
        h, w = math.exp(th) * (y2 - y1) / 2, math.exp(tw) * (x2 - x1) / 2
        box = [cx - w, cy - h, cx + w, cy + h]
        if limits is not None:
            box = [min(max(v, 0), limits[i % 2]) for i, v in enumerate(box)]
        boxes.append(box)
    best = candidates[:max_candidates]
    return boxes, [1 / (1 + math.exp(-c[0])) for c in best], [c[2] for c in best]


@pytest.mark.usefixtures("backend")
@methods
@pytest.mark.parametrize("limits", [False, True])
@pytest.mark.parametrize("max_candidates", [1, 50, 5000])
@pytest.mark.parametrize("class_agnostic", [False, True])
def test_agrees_with_plain_loops(max_candidates, limits, method, class_agnostic):
    call = sample(
        "detect",
        limits=limits,
        method=method,
        max_candidates=max_candidates,
        class_agnostic=class_agnostic,
    )
    boxes, scores, labels, counts = call()
    for b in range(2):
        extents = call.options["limits"][b].tolist() if limits else None
        rows = plain_detect(call, b, max_candidates, extents)
        index, kept_scores = plain_nms(
            *rows, method=method, max_detections=20, class_agnostic=class_agnostic
        )
        count = len(index)
        assert int(counts[b]) == count
        assert labels[b].tolist() == [rows[2][i] for i in index] + [-1] * (20 - count)
        assert scores[b, :count].tolist() == pytest.approx(kept_scores, rel=1e-5)
        expected = torch.tensor([rows[0][i] for i in index])
        torch.testing.assert_close(boxes[b, :count], expected, rtol=1e-5, atol=1e-4)
        assert not boxes[b, count:].any() and not scores[b, count:].any()


@dtypes
@methods
@pytest.mark.parametrize("classes", [1, 3, 16, 90])
@pytest.mark.parametrize("class_agnostic", [False, True])
def test_kernel_against_the_reference(classes, method, dtype, class_agnostic):
    call = sample("detect", dtype, classes=classes, method=method, class_agnostic=class_agnostic)
    call.check(torch.float32)


@pytest.mark.usefixtures("backend")
@methods
def test_an_object_of_two_classes_is_one_when_asked(method):
    """Every anchor scores alike in two classes: per class both are found, across them the first."""
    logits = torch.full((1, 2, 2, 2), 3.0)
    regressions = torch.zeros(1, 4, 2, 2)
    anchors = torch.tensor([[20.0 * i, 0, 20 * i + 10, 10] for i in range(4)])
    options = {"method": method, "score_threshold": 0.2}
    _, _, labels, counts = edet_kernels.detect([logits], [regressions], anchors, **options)
    assert counts.tolist() == [8] and labels[0, :8].tolist() == [0, 1] * 4
    _, scores, labels, counts = edet_kernels.detect(
        [logits], [regressions], anchors, class_agnostic=True, **options
    )
    assert counts.tolist() == [4] and labels[0, :5].tolist() == [0] * 4 + [-1]
    assert scores[0, :4].tolist() == pytest.approx([1 / (1 + math.exp(-3))] * 4)


@dtypes
@pytest.mark.parametrize("max_candidates", [7, 100, 10**6])
def test_the_first_of_equal_logits_wins(max_candidates, dtype):
    # logits of five values: which of the equal ones are candidates decides the result
    call = sample("detect", dtype, classes=7, max_candidates=max_candidates, max_detections=500)
    for x in call.maps:
        x.copy_(torch.randint(-2, 3, x.shape))
    call.check(torch.float32)


@methods
@pytest.mark.parametrize("threshold", [-1.0, 0.0, 0.5, 0.999])
def test_score_threshold(threshold, method):
    sample("detect", method=method, score_threshold=threshold).check(torch.float32)


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf], ids=str)
def test_non_finite_logits(value):
    call = sample("detect")
    call.maps[0][0, 3, 2:4] = value
    call.maps[2][:] = value
    call.check(torch.float32)


@pytest.mark.usefixtures("backend")
@pytest.mark.parametrize("threshold", [-1.0, 0.0])
def test_nan_logits_are_never_kept(threshold):
    # below zero even a score of 0 passes, but a NaN has no score at all
    call = sample("detect", max_detections=2000, max_candidates=2000, score_threshold=threshold)
    for x in call.maps:
        x[:, 1:] = torch.nan
    _, _, labels, counts = call()
    assert (counts > 0).all()
    assert labels.unique().tolist() == [-1, 0]


@pytest.mark.parametrize("value", [torch.nan, torch.inf, 200.0], ids=str)
def test_non_finite_boxes(value):
    call = sample("detect", limits=False)
    call.weights[0][0][:, 2, 2:4] = value
    call.check(torch.float32)


@pytest.mark.parametrize("sizes", [[(1, 1)], [(3, 5), (1, 1)], [(40, 33)]], ids=str)
def test_levels(sizes):
    sample("detect", sizes=sizes).check(torch.float32)


@pytest.mark.parametrize("batch", [0, 1, 3])
def test_batch(batch):
    sample("detect", batch=batch).check(torch.float32)


@dtypes
def test_layouts_give_identical_results(dtype):
    call = sample("detect", dtype)
    planar = edet_kernels.detect(
        [x.contiguous() for x in call.maps],
        [x.contiguous() for x in call.weights[0]],
        call.weights[1].t().contiguous().t(),
        **call.options,
    )
    assert_identical(planar, call())


@pytest.mark.parametrize("where", ["sampled", "not sampled", "everywhere", "nan"])
@dtypes
def test_many_logits_whose_sample_misleads(dtype, where):
    """The kernel guesses from every 24th run of four logits what the best ones reach."""
    torch.manual_seed(0)
    side, classes = 16, 90
    flat = torch.rand(side * side * 9 * classes)
    sampled = torch.arange(len(flat)) % 24 < 4
    if where == "nan":  # fewer numbers than candidates
        flat[1000:] = float("nan")
    elif where != "everywhere":
        flat[sampled == (where == "sampled")] += 5
    logits = flat.view(1, side, side, 9 * classes).permute(0, 3, 1, 2).to(dtype)
    boxes = (0.1 * torch.randn(1, side, side, 36)).permute(0, 3, 1, 2).to(dtype)
    corner = 100 * torch.rand(side * side * 9, 2)
    anchors = torch.cat([corner, corner + 10], 1)
    options = {"max_candidates": 2000, "max_detections": 2000, "iou_threshold": 1.0}
    found = edet_kernels.detect([logits], [boxes], anchors, **options)
    with edet_kernels.backend("reference"):
        expected = edet_kernels.detect([logits], [boxes], anchors, **options)
    assert_identical(found[2:], expected[2:])
    torch.testing.assert_close(found[:2], expected[:2], rtol=1e-5, atol=1e-4)
