"""What is exported: a predictor's network and post-processing as one module of plain tensors."""

from __future__ import annotations

import json
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from edet_kernels import __version__

from ..detection.anchors import model_anchors
from ..detection.postprocess import postprocess
from ..detection.predictor import Predictor
from ..detection.preprocess import letterbox_fill


class Detector(nn.Module):
    """From pixels to detections, or to the outputs of the heads.

    Everything but the reading and resizing of images is inside: the normalisation, the network, the
    anchors, the suppression and the way back to the original image. What comes out is what the
    predictor finds.

    Args:
        predictor: its model and options are taken.
        postprocess: whether detections come out; else the outputs of the heads.
        max_candidates: anchors × classes that enter the suppression of an image.
    """

    anchors: Tensor
    size: Tensor

    def __init__(self, predictor: Predictor, postprocess: bool, max_candidates: int) -> None:
        super().__init__()
        self.model = predictor.model
        self.network = predictor.network  # the model's calls; it is no module
        self.image_size = predictor.image_size
        self.postprocess = postprocess
        self.selection: dict[str, Any] = {
            "score_threshold": predictor.score_threshold,
            "method": predictor.nms,
            "iou_threshold": predictor.iou_threshold,
            "sigma": predictor.sigma,
            "max_detections": predictor.max_detections,
            "class_agnostic": predictor.class_agnostic,
            "max_candidates": max_candidates,
        }
        device = predictor.device
        anchors = model_anchors(self.model.config, self.image_size, device=device)
        self.register_buffer("anchors", anchors)
        self.register_buffer(
            "size", torch.tensor(self.image_size, dtype=torch.float32, device=device)
        )

    def forward(self, images: Tensor, sizes: Tensor | None = None) -> tuple[Tensor, ...]:
        """Detections in letterboxed images.

        Args:
            images: (B, 3, H, W) uint8, RGB.
            sizes: (B, 2) int64, height and width of each original image; with post-processing only.

        Returns:
            boxes (B, K, 4) float32 x1, y1, x2, y2 in pixels of the original, scores (B, K) float32,
            best first, labels (B, K) int64 from 1, all padded with 0, and counts (B,) int64; or the
            class logits of all levels, then their box regressions, as of
            :meth:`edet.EfficientDet.forward`.
        """
        *outputs, _ = self.network([images, images])
        if sizes is None:
            return tuple(outputs)
        levels = len(outputs) // 2
        sides = sizes.float()
        return postprocess(
            outputs[:levels],
            outputs[levels:],
            self.anchors,
            sizes=sides,
            scales=(sides / self.size).amax(1),
            **self.selection,
        )


class Interface(NamedTuple):
    """The inputs and outputs of a :class:`Detector`.

    Attributes:
        examples: inputs to record the graph with.
        inputs, outputs: their names.
    """

    examples: dict[str, Tensor]
    outputs: list[str]

    @property
    def inputs(self) -> list[str]:
        return list(self.examples)


def interface(detector: Detector, batch: int) -> Interface:
    """Names, and examples of ``batch`` images."""
    config, device = detector.model.config, detector.anchors.device
    height, width = detector.image_size
    examples = {"images": torch.zeros(batch, 3, height, width, dtype=torch.uint8, device=device)}
    if detector.postprocess:
        examples["sizes"] = torch.tensor([[height, width]] * batch, device=device)
        return Interface(examples, ["boxes", "scores", "labels", "counts"])
    levels = range(config.min_level, config.max_level + 1)
    return Interface(
        examples, [f"{part}_p{level}" for part in ("class", "box") for level in levels]
    )


def metadata(predictor: Predictor) -> dict[str, str]:
    """What a program must know beside the graph, as text."""
    config = predictor.model.config
    names = {str(label): name for label, name in predictor.label_names.items()}
    return {
        "model": config.name,
        "image_size": json.dumps(list(predictor.image_size)),
        "fill": json.dumps(letterbox_fill(config.mean)),
        "class_names": json.dumps(names, ensure_ascii=False),
        "edet_kernels": __version__,
    }
