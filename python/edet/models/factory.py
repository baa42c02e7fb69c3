"""Models by their name: :func:`create_model`."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import replace

from torch import nn

from .checkpoints import load_checkpoint
from .configs import ModelConfig, checked_size, get_config
from .described import read_description
from .efficientdet import EfficientDet
from .pretrained import pretrained_file


def model_config(name: str) -> ModelConfig:
    """The configuration of any model :func:`create_model` knows, those with their weights included.

    Raises:
        ValueError: unknown name.
    """
    weights = pretrained_file(name)
    if weights is None:
        return get_config(name)
    description = read_description(weights)
    assert description is not None  # a test reads each
    return description.config


def create_model(
    name: str,
    *,
    num_classes: int | None = None,
    image_size: int | tuple[int, int] | None = None,
    fusion: str | None = None,
    fusion_per_channel: bool = False,
    width: int | None = None,
    cells: int | None = None,
    head_repeats: int | None = None,
    min_level: int | None = None,
    max_level: int | None = None,
    backbone: nn.Module | None = None,
    backbone_channels: Sequence[int] | None = None,
    checkpoint: str | os.PathLike[str] | None = None,
    reinit_head: bool = False,
) -> EfficientDet:
    """An EfficientDet in training mode, with random weights or those of ``checkpoint``.

    Args:
        name: one of :func:`edet.list_models`, or ``edet_lite0_person``, which comes with its
            weights (extra ``safetensors``): a detector of people.
        num_classes: number of classes; COCO's 90 when None, or those of the model's own weights.
        image_size: (H, W), or one number for both, that images are resized to.
        fusion: ``fast``, ``softmax``, ``unbounded`` or ``sum``.
        fusion_per_channel: one edge weight per channel instead of one per edge.
        width, cells, head_repeats, min_level, max_level: change the network of that name.
        backbone, backbone_channels: a module used instead of the EfficientNet, and the channels of
            its maps, one per pyramid level from ``min_level`` up.
        checkpoint: a file for :func:`edet.load_checkpoint`.
        reinit_head: with ``checkpoint``, keep new weights in the class prediction when the
            checkpoint has another number of classes.

    Raises:
        ValueError: unknown name (the message gives the nearest ones) or an impossible value.
        edet.CheckpointError: the checkpoint does not fit.
    """
    changes = {
        "image_size": None if image_size is None else checked_size(image_size),
        "fusion": fusion,
        "width": width,
        "cells": cells,
        "head_repeats": head_repeats,
        "min_level": min_level,
        "max_level": max_level,
    }
    base = model_config(name)
    config = replace(
        base,
        num_classes=base.num_classes if num_classes is None else num_classes,
        fusion_per_channel=fusion_per_channel,
        **{key: value for key, value in changes.items() if value is not None},  # type: ignore[arg-type]
    )
    model = EfficientDet(config, backbone=backbone, backbone_channels=backbone_channels)
    path = pretrained_file(name) if checkpoint is None else checkpoint
    if path is not None:
        load_checkpoint(model, path, reinit_head=reinit_head)
    return model
