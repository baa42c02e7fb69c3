"""Detections equal to effdet's, where its scores are far enough apart to say which comes first."""

import numpy as np
import pytest
import torch

from edet.detection.anchors import decode_boxes, model_anchors
from edet.detection.postprocess import postprocess
from golden_utils import DETECTION_NAMES, golden

#: Scores closer than this may come in either order; wider only where effdet's own float32 rounding
#: is, see `slack`.
SCORE_GAP = 1e-5
#: What decoding in float32 may round, as a fraction of a box's largest coordinate.
ROUNDING = 1e-6


def slack(fixture, head, dtype):
    """How far effdet's float32 logits of a head may be from ours.

    They are off by the fixture's ``float32_error``; ours in float32 may be off by three times that.
    """
    taps = fixture.meta["taps"]
    error = max(t["float32_error"] * t["absmax"] for n, t in taps.items() if n.startswith(head))
    return error if dtype == torch.float64 else 4 * error


def detect(fixture, dtype, max_detections):
    """Boxes, scores, labels and counts, and per image the anchors and all that they decode to."""
    model = fixture.model().to(dtype)
    images = fixture.images().to(dtype)
    anchors = model_anchors(model.config, tuple(images.shape[2:]))
    with torch.no_grad():
        class_outputs, box_outputs = model(images)
        found = postprocess(class_outputs, box_outputs, anchors, max_detections=max_detections)
    regressions = [x.permute(0, 2, 3, 1).reshape(len(images), -1, 4) for x in box_outputs]
    decoded = decode_boxes(torch.cat(regressions, 1), anchors)[..., [1, 0, 3, 2]]
    return [x.numpy() for x in found], anchors[:, [1, 0, 3, 2]].numpy(), decoded.numpy()


def tolerances(boxes, anchors, decoded, error):
    """How far the coordinates (N, 4) of found boxes may be off where regressions are by ``error``.

    A corner is t·a + c ± exp(s)·a/2 of an anchor's size a and centre c.
    """
    sizes = np.stack([x[:, 2:] - x[:, :2] for x in (anchors, decoded)])  # of anchors, of boxes
    own = [np.abs(decoded - box).max(1).argmin() for box in boxes]
    size, grown = sizes[:, own]
    rounding = ROUNDING * np.abs(boxes).max(1)
    return np.tile(error * (size + grown / 2), 2) + rounding[:, None]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("name", DETECTION_NAMES)
def test_detections_agree_with_effdet(name, dtype):
    fixture = golden(name)
    # more than effdet's 100: which of two equal scores comes last is open
    (boxes, scores, labels, counts), anchors, decoded = detect(fixture, dtype, 110)
    for image, expected in enumerate(fixture.detections):
        assert counts[image] >= 100
        wanted = expected[:, 4]
        # dσ(x)/dx = σ(1 − σ)
        gaps = np.maximum(SCORE_GAP, slack(fixture, "class", dtype) * wanted * (1 - wanted))
        differences = np.abs(expected[:, None, :4] - boxes[image])
        allowed = tolerances(boxes[image], anchors, decoded[image], slack(fixture, "box", dtype))
        distances = (differences / allowed).max(-1)
        distances[expected[:, None, 5] != labels[image]] = np.inf
        position = distances.argmin(1)
        assert len(set(position)) == len(position)
        assert (distances.min(1) <= 1).all()
        assert (np.abs(scores[image, position] - wanted) <= gaps).all()
        for i, j in zip(*np.triu_indices(100, 1), strict=True):
            assert position[i] < position[j] or wanted[i] - wanted[j] <= gaps[i]
