"""Post-processing: candidate order, clipping, scaling; both suppressions against plain loops."""

import math

import pytest
import torch

from edet.detection.anchors import (
    decode_boxes,
    feature_sizes,
    generate_anchors,
    model_anchors,
)
from edet.detection.postprocess import postprocess
from edet.models.configs import get_config

SIZE, CLASSES = (64, 96), 5


@pytest.fixture
def outputs():
    """Head outputs for a batch of two, with boxes near their anchors and a few clear objects."""
    generator = torch.Generator().manual_seed(0)
    class_outputs, box_outputs = [], []
    for level in range(3, 8):
        h, w = -(-SIZE[0] >> level), -(-SIZE[1] >> level)
        class_outputs.append(torch.randn(2, 9 * CLASSES, h, w, generator=generator) * 2 - 2)
        box_outputs.append(torch.randn(2, 36, h, w, generator=generator) * 0.3)
    return class_outputs, box_outputs


@pytest.fixture
def anchors():
    return generate_anchors(SIZE)


def iou(a, b):
    width = min(a[2], b[2]) - max(a[0], b[0])
    height = min(a[3], b[3]) - max(a[1], b[1])
    common = max(width, 0) * max(height, 0)
    area = [(r[2] - r[0]) * (r[3] - r[1]) for r in (a, b)]
    union = area[0] + area[1] - common
    return common / union if union > 0 else 0


def suppress(candidates, method, threshold, sigma, score_threshold, limit, class_agnostic=False):
    """Plain-Python NMS over (score, label, box) in order of preference."""
    left = [list(c) for c in candidates if c[0] > score_threshold]
    taken = []
    while left and len(taken) < limit:
        best = max(range(len(left)), key=lambda i: (left[i][0], -i))
        score, label, box = left.pop(best)
        taken.append((score, label, box))
        for other in left:
            if other[1] == label or class_agnostic:
                overlap = iou(box, other[2])
                if method == "gaussian":
                    other[0] *= math.exp(-overlap * overlap / sigma)
                elif overlap > threshold:
                    other[0] = -1
        left = [other for other in left if other[0] > score_threshold]
    return taken


def plain_postprocess(class_outputs, box_outputs, anchors, image, count, scale, size, **options):
    """The published steps for one image, written with lists."""
    candidates = []
    index = 0
    logits, regressions = [], []
    for c, b in zip(class_outputs, box_outputs, strict=True):
        for y in range(c.shape[2]):
            for x in range(c.shape[3]):
                for a in range(9):
                    logits.append(c[image, a * CLASSES : (a + 1) * CLASSES, y, x].tolist())
                    regressions.append(b[image, a * 4 : (a + 1) * 4, y, x])
    boxes = decode_boxes(torch.stack(regressions), anchors).tolist()
    for index, row in enumerate(logits):
        y1, x1, y2, x2 = boxes[index]
        box = (x1, y1, x2, y2)
        if size is not None:
            limits = (size[1] / scale, size[0] / scale) * 2
            box = tuple(min(max(v, 0), m) for v, m in zip(box, limits, strict=True))
        for label, logit in enumerate(row):
            candidates.append((logit, index * CLASSES + label, label, box))
    candidates = sorted(candidates, key=lambda c: (-c[0], c[1]))[:count]
    rows = [(1 / (1 + math.exp(-logit)), label, box) for logit, _, label, box in candidates]
    return [
        (score, label + 1, [v * scale for v in box])
        for score, label, box in suppress(rows, **options)
    ]


@pytest.mark.parametrize("method", ["hard", "gaussian"])
@pytest.mark.parametrize("clip", [False, True])
@pytest.mark.parametrize("score_threshold", [None, 0.4])
@pytest.mark.parametrize("class_agnostic", [False, True])
def test_agrees_with_plain_loops(outputs, anchors, method, clip, score_threshold, class_agnostic):
    scales = torch.tensor([0.5, 2.25])
    sizes = [(30, 44), (140, 216)] if clip else None
    boxes, scores, labels, counts = postprocess(
        *outputs,
        anchors,
        sizes=sizes,
        scales=scales,
        method=method,
        score_threshold=score_threshold,
        max_detections=40,
        max_candidates=300,
        class_agnostic=class_agnostic,
    )
    assert boxes.shape == (2, 40, 4)
    for image in range(2):
        expected = plain_postprocess(
            *outputs,
            anchors,
            image,
            300,
            float(scales[image]),
            sizes[image] if sizes else None,
            method=method,
            threshold=0.5,
            sigma=0.5,
            score_threshold=score_threshold or (0.001 if method == "gaussian" else 0),
            limit=40,
            class_agnostic=class_agnostic,
        )
        n = int(counts[image])
        assert n == len(expected) > 5
        assert labels[image, :n].tolist() == [label for _, label, _ in expected]
        torch.testing.assert_close(
            scores[image, :n], torch.tensor([score for score, _, _ in expected]), rtol=1e-5, atol=0
        )
        torch.testing.assert_close(
            boxes[image, :n], torch.tensor([box for _, _, box in expected]), rtol=1e-5, atol=1e-4
        )
        assert not boxes[image, n:].any()
        assert not scores[image, n:].any()
        assert not labels[image, n:].any()


def test_images_of_a_batch_do_not_mix(outputs, anchors):
    together = postprocess(*outputs, anchors, scales=torch.tensor([1.0, 3.0]))
    for i, scale in enumerate((1.0, 3.0)):
        alone = postprocess(
            [x[i : i + 1] for x in outputs[0]],
            [x[i : i + 1] for x in outputs[1]],
            anchors,
            scales=torch.tensor([scale]),
        )
        for a, b in zip(together, alone, strict=True):
            assert torch.equal(a[i], b[0])


def test_nothing_found(outputs, anchors):
    class_outputs = [torch.full_like(x, -20) for x in outputs[0]]
    boxes, scores, labels, counts = postprocess(
        class_outputs, outputs[1], anchors, score_threshold=0.5
    )
    assert counts.tolist() == [0, 0]
    assert not boxes.any()
    assert not scores.any()
    assert not labels.any()


def test_infinite_boxes_are_clipped(outputs, anchors):
    wild = [torch.full_like(x, 1000.0) for x in outputs[1]]
    boxes, _, _, counts = postprocess(outputs[0], wild, anchors, sizes=[SIZE, SIZE])
    assert (counts > 0).all()
    assert boxes.isfinite().all()
    assert boxes.amin() >= 0
    assert (boxes <= torch.tensor([SIZE[1], SIZE[0]] * 2)).all()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_other_dtypes(outputs, anchors, dtype):
    class_outputs, box_outputs = ([x.to(dtype) for x in maps] for maps in outputs)
    boxes, scores, labels, counts = postprocess(class_outputs, box_outputs, anchors)
    assert boxes.dtype == scores.dtype == torch.promote_types(dtype, torch.float32)
    assert labels.dtype == counts.dtype == torch.int64
    assert (counts > 0).all()


def test_inputs_are_not_changed(outputs, anchors):
    before = [x.clone() for maps in outputs for x in maps]
    postprocess(*outputs, anchors, sizes=[SIZE, SIZE], scales=torch.ones(2))
    for x, y in zip((x for maps in outputs for x in maps), before, strict=True):
        assert torch.equal(x, y)


def test_misfits_are_named(outputs, anchors):
    with pytest.raises(ValueError, match="anchors must be"):
        postprocess(*outputs, anchors[:-1])
    with pytest.raises(ValueError, match="sizes must hold one entry per image"):
        postprocess(*outputs, anchors, sizes=[SIZE])
    with pytest.raises(ValueError, match="scales must hold one entry per image"):
        postprocess(*outputs, anchors, scales=torch.ones(3))
    with pytest.raises(ValueError, match="method must be one of hard, gaussian, got 'soft'"):
        postprocess(*outputs, anchors, method="soft")
    with pytest.raises(ValueError, match="channels"):
        postprocess(outputs[0], [x[:, :35] for x in outputs[1]], anchors)
    with pytest.raises(ValueError, match="class_outputs"):
        postprocess([], [], anchors)


@pytest.mark.parametrize(
    "name", ["tf_efficientdet_lite0", "tf_efficientdet_d7x", "efficientdet_d7"]
)
def test_a_config_in_the_place_of_anchors(name):
    config = get_config(name)
    h, w = 100, 160
    outputs = [
        [torch.randn(1, 9 * n, *s) for s in feature_sizes((h, w), max_level=config.max_level)]
        for n in (4, 4)
    ]
    expected = postprocess(*outputs, model_anchors(config, (h, w)))
    found = postprocess(*outputs, config, image_size=(h, w))
    assert all(torch.equal(x, y) for x, y in zip(found, expected, strict=True))
    with pytest.raises(ValueError, match="image_size must be the"):
        postprocess(*outputs, config)
    with pytest.raises(ValueError, match="image_size must be None"):
        postprocess(*outputs, model_anchors(config, (h, w)), image_size=(h, w))
    with pytest.raises(TypeError, match="anchors must be a tensor or a model's config, got str"):
        postprocess(*outputs, name, image_size=(h, w))
