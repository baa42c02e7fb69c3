"""Detections equal to effdet's, where its scores are far enough apart to say which comes first."""

import numpy as np
import pytest
import torch

from edet.detection.anchors import model_anchors
from edet.detection.postprocess import postprocess
from golden_utils import DETECTION_NAMES, golden

#: Scores closer than this may come in either order, boxes this close (as a fraction of their own
#: largest coordinate) are equal; wider only where effdet's own float32 rounding is, see `slack`.
SCORE_GAP, BOX_TOLERANCE = 1e-5, 1e-4


def slack(fixture, head, dtype):
    """How far effdet's float32 logits of a head may be from ours.

    They are off by the fixture's ``float32_error``; ours in float32 may be off by three times that.
    """
    taps = fixture.meta["taps"]
    error = max(t["float32_error"] * t["absmax"] for n, t in taps.items() if n.startswith(head))
    return error if dtype == torch.float64 else 4 * error


def detect(fixture, dtype, max_detections):
    model = fixture.model().to(dtype)
    config = model.config
    images = fixture.images().to(dtype)
    anchors = model_anchors(config, tuple(images.shape[2:]))
    with torch.no_grad():
        return postprocess(*model(images), anchors, max_detections=max_detections)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("name", DETECTION_NAMES)
def test_detections_agree_with_effdet(name, dtype):
    fixture = golden(name)
    tolerance = max(BOX_TOLERANCE, slack(fixture, "box", dtype))
    # more than effdet's 100: which of two equal scores comes last is open
    boxes, scores, labels, counts = (x.numpy() for x in detect(fixture, dtype, 110))
    for image, expected in enumerate(fixture.detections):
        assert counts[image] >= 100
        wanted = expected[:, 4]
        # dσ(x)/dx = σ(1 − σ)
        gaps = np.maximum(SCORE_GAP, slack(fixture, "class", dtype) * wanted * (1 - wanted))
        distances = np.abs(expected[:, None, :4] - boxes[image]).max(-1)
        distances[expected[:, None, 5] != labels[image]] = np.inf
        position = distances.argmin(1)
        assert len(set(position)) == len(position)
        assert (distances.min(1) <= tolerance * np.abs(expected[:, :4]).max(1)).all()
        assert (np.abs(scores[image, position] - wanted) <= gaps).all()
        for i, j in zip(*np.triu_indices(100, 1), strict=True):
            assert position[i] < position[j] or wanted[i] - wanted[j] <= gaps[i]
