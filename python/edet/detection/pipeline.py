"""From resized pixels to boxes, in stages: letterbox, network, post-processing.

A stage is a function of the list of tensors that the one before returned, so that a row of them can
be run, recorded or captured.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from ..fused.plan import Stage
from ..models.efficientdet import EfficientDet
from ..models.efficientnet import EfficientNet, normalise_pixels
from .anchors import model_anchors
from .postprocess import postprocess
from .preprocess import geometry, letterbox, letterbox_fill


class Selection(NamedTuple):
    """Which boxes are kept; see :func:`edet.postprocess.postprocess`."""

    score_threshold: float = 0.0
    method: str = "hard"
    iou_threshold: float = 0.5
    sigma: float = 0.5
    max_detections: int = 100
    class_agnostic: bool = False


class Network:
    """A model and its normalisation as a stage: pixels and geometry to head outputs and geometry.

    What a call needs beside the model lies on its device already: nothing is brought there, which a
    capture forbids.

    Args:
        model: the detector.
        runs_python: whether its hooks are to see the calls that it makes by itself.
    """

    def __init__(self, model: EfficientDet, runs_python: Callable[[], bool]) -> None:
        parameter = next(model.parameters())
        self.runs_python = runs_python
        self.model, self.device, self.dtype = model, parameter.device, parameter.dtype
        self.mean = torch.tensor(model.config.mean, dtype=torch.float32, device=self.device)
        self.std = torch.tensor(model.config.std, dtype=torch.float32, device=self.device)
        self.mean_of_bytes, self.std_of_bytes = 255 * self.mean, 255 * self.std

    def __call__(self, inputs: list[Tensor]) -> list[Tensor]:
        """(B, 3, H, W) pixels, uint8 or in [0, 1], and (B, 3) geometry to outputs of each level.

        Returns:
            the class outputs of all levels, the box outputs of all levels, and the geometry.
        """
        pixels, where = inputs
        if self.runs_python():
            images = normalise_pixels(pixels, self.mean, self.std, self.dtype)
            classes, boxes = self.model(images)
            return [*classes, *boxes, where]
        backbone = self.model.backbone
        if pixels.dtype == torch.uint8 and isinstance(backbone, EfficientNet):
            maps = backbone.forward_pixels(pixels, self.mean_of_bytes, self.std_of_bytes)
        else:
            maps = backbone(normalise_pixels(pixels, self.mean, self.std, self.dtype))
        pyramid = self.model.fpn(maps)
        return [*self.model.class_net(pyramid), *self.model.box_net(pyramid), where]


def stages(
    network: Network,
    sizes: Sequence[tuple[int, int]],
    image_size: tuple[int, int],
    selection: Selection,
) -> tuple[Stage, Stage, Stage]:
    """The way from images of ``sizes`` to boxes: letterbox, network, post-processing.

    The first takes images (3, h, w) on the network's device and gives pixels (B, 3, H, W) and
    geometry; the last gives one tensor (B, K, 6) of box in pixels of the image, score and label;
    label 0 is no box. See :func:`columns`.

    Args:
        network: the model.
        sizes: (height, width) of each image before it was resized.
        image_size: (H, W) of the network's input.
        selection: which boxes are kept.
    """
    config = network.model.config
    fill, levels = letterbox_fill(config.mean), config.levels
    where = geometry(sizes, image_size).to(network.device)
    anchors = model_anchors(config, image_size, device=network.device)

    def prepare(images: list[Tensor]) -> list[Tensor]:
        return [letterbox(images, image_size, fill), where]

    def finish(outputs: list[Tensor]) -> list[Tensor]:
        where = outputs[-1]
        boxes, scores, labels, _ = postprocess(
            outputs[:levels],
            outputs[levels:-1],
            anchors,
            sizes=where[:, :2],
            scales=where[:, 2],
            **selection._asdict(),
        )
        return [torch.cat([boxes, scores[..., None], labels[..., None].to(boxes.dtype)], -1)]

    return prepare, network, finish


def columns(rows: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Boxes (N, 4), scores (N,) and labels (N,) of an image's rows (K, 6), without the empty."""
    found = rows[rows[:, 5] > 0]
    return found[:, :4].contiguous(), found[:, 4].contiguous(), found[:, 5].long()
