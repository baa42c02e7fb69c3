"""Head outputs to boxes in pixels of the original images."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

import edet_kernels

from ..models.configs import ModelConfig
from .anchors import model_anchors

#: Scores at or below these are dropped in the published post-processing.
SCORE_THRESHOLDS = {"hard": 0.0, "gaussian": 0.001}


def _made(
    anchors: Tensor | ModelConfig, image_size: tuple[int, int] | None, outputs: Sequence[Tensor]
) -> Tensor:
    """The anchors themselves, or those of a config."""
    if isinstance(anchors, Tensor):
        if image_size is not None:
            raise ValueError("image_size must be None with anchors that are made already")
    elif not isinstance(anchors, ModelConfig):
        raise TypeError(
            f"anchors must be a tensor or a model's config, got {type(anchors).__name__}"
        )
    elif image_size is None:
        raise ValueError("image_size must be the (H, W) of the network's input with a config")
    else:
        device = outputs[0].device if outputs else "cpu"
        return model_anchors(anchors, image_size, device=device)
    return anchors


def postprocess(
    class_outputs: Sequence[Tensor],
    box_outputs: Sequence[Tensor],
    anchors: Tensor | ModelConfig,
    *,
    image_size: tuple[int, int] | None = None,
    sizes: Sequence[tuple[int, int]] | Tensor | None = None,
    scales: Tensor | None = None,
    method: str = "hard",
    iou_threshold: float = 0.5,
    sigma: float = 0.5,
    score_threshold: float | None = None,
    max_detections: int = 100,
    max_candidates: int = 5000,
    class_agnostic: bool = False,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The published post-processing, on a whole batch.

    The ``max_candidates`` best logits over anchors × classes are decoded in float32, clipped to
    the image, suppressed per class or across them (all by :func:`edet_kernels.detect`) and scaled
    to the original image.

    Args:
        class_outputs: logits, (B, A·classes, H, W) for each level.
        box_outputs: regressions, (B, A·4, H, W) for each level.
        anchors: the model's ``config``, whose anchors are taken; or (N, 4) from
            :func:`edet.anchors.model_anchors`. Those of another model give wrong boxes.
        image_size: (H, W) of the network's input, with a ``config`` only.
        sizes: (height, width) of each original image, or (B, 2) on the anchors' device, to clip to;
            None: boxes are not clipped.
        scales: (B,) pixels of the original image per pixel of the network's input; None: 1.
        method: ``hard``, or ``gaussian`` for soft-NMS; see :func:`edet_kernels.nms`.
        iou_threshold: ``hard`` drops boxes that overlap a better one more than this.
        sigma: width of ``gaussian``'s decay exp(−IoU²/sigma).
        score_threshold: boxes with a score at or below it are dropped; None: the published 0 for
            ``hard`` and 0.001 for ``gaussian``.
        max_detections: K.
        max_candidates: that enter suppression.
        class_agnostic: boxes of all classes suppress each other, so that an object is found as one
            kind only; published is per class.

    Returns:
        boxes (B, K, 4) x1, y1, x2, y2 in pixels of the original, scores (B, K), both float32
        (float64 for float64 outputs), labels (B, K) int64 (class index + 1), all padded with 0, and
        counts (B,) int64.

    Raises:
        ValueError, TypeError: outputs, anchors, sizes or scales do not fit one another; see also
            :func:`edet_kernels.detect`.
    """
    anchors = _made(anchors, image_size, class_outputs)
    batch = class_outputs[0].shape[0] if class_outputs else 0
    for name, given in (("sizes", sizes), ("scales", scales)):
        if given is None:
            continue
        entries = given.shape[0] if isinstance(given, Tensor) else len(given)  # may be dynamic
        if entries != batch:
            raise ValueError(f"{name} must hold one entry per image ({batch}), got {entries}")
    if scales is None:
        scales = torch.ones(batch, dtype=torch.float32, device=anchors.device)
    limits = None
    if sizes is not None:
        ends = sizes if isinstance(sizes, Tensor) else torch.tensor(sizes, device=anchors.device)
        limits = ends.flip(-1) / scales[:, None]
    if score_threshold is None:
        score_threshold = SCORE_THRESHOLDS.get(method, 0.0)
    boxes, scores, labels, counts = edet_kernels.detect(
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
    return boxes * scales[:, None, None], scores, labels + 1, counts
