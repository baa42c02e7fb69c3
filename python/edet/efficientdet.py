"""EfficientDet: backbone, BiFPN and heads put together from a configuration."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import replace
from typing import NamedTuple

import torch
from torch import Tensor, nn

from .bifpn import BiFPN
from .checkpoints import load_checkpoint
from .configs import ModelConfig, get_config
from .efficientnet import EfficientNet
from .heads import CLASS_PRIOR_BIAS, Head
from .packing import PackedModule


class EfficientDet(nn.Module):
    """EfficientDet (Tan, Pang & Le 2020) with effdet's state-dict keys.

    In training mode, or when a gradient is needed, it is made of PyTorch's layers. In eval mode
    without gradients (``torch.no_grad()`` or ``torch.inference_mode()``) each part runs on fused
    ops, with batch norms folded and weights packed once; see :class:`edet.packing.PackedModule`.

    Args:
        config: the network's configuration.
        backbone: a module that maps images to one map per pyramid level from ``config.min_level``
            up, instead of the EfficientNet that ``config`` names.
        backbone_channels: the channels of its maps; ``backbone.channels`` when None.

    Attributes:
        backbone, fpn, class_net, box_net: the parts.

    Raises:
        ValueError: the configuration's levels do not fit the backbone, or the channels of a
            backbone are not known.
    """

    def __init__(
        self,
        config: ModelConfig,
        *,
        backbone: nn.Module | None = None,
        backbone_channels: Sequence[int] | None = None,
    ) -> None:
        super().__init__()
        if backbone is None:
            if config.max_level < 5 or config.min_level > 5:
                raise ValueError(
                    f"levels of {config.backbone} must be min_level ≤ 5 ≤ max_level, "
                    f"got {config.min_level} and {config.max_level}"
                )
            backbone = EfficientNet(
                config.backbone,
                levels=range(config.min_level, 6),
                padding=config.padding,
                activation=config.activation,
                bn_eps=config.backbone_bn_eps,
                bn_momentum=config.backbone_bn_momentum,
            )
        channels = backbone_channels or getattr(backbone, "channels", None)
        if channels is None:
            raise ValueError(
                "backbone_channels must give the channels of the backbone's maps, "
                f"got None and {type(backbone).__name__} has no attribute `channels`"
            )
        self.config = config
        self.backbone = backbone
        self.fpn = BiFPN(
            channels,
            config.width,
            config.cells,
            levels=config.levels,
            fusion=config.fusion,
            fusion_per_channel=config.fusion_per_channel,
            pool=config.padding,
            activation=config.activation,
            redundant_bias=config.redundant_bias,
        )

        def head(outputs: int, prior_bias: float) -> Head:
            return Head(
                config.width,
                config.num_anchors * outputs,
                repeats=config.head_repeats,
                levels=config.levels,
                activation=config.activation,
                redundant_bias=config.redundant_bias,
                bn_level_first=config.head_bn_level_first,
                prior_bias=prior_bias,
            )

        self.class_net = head(config.num_classes, CLASS_PRIOR_BIAS)
        self.box_net = head(4, 0.0)

    def forward(self, images: Tensor) -> tuple[list[Tensor], list[Tensor]]:
        """Class logits and box regressions of every anchor.

        Args:
            images: (N, 3, H, W) of the model's dtype, normalised by ``config.mean`` and ``std``;
                any height and width.

        Returns:
            Per level class logits (N, anchors·classes, H_l, W_l) and box regressions
            (N, anchors·4, H_l, W_l); channels are anchor-major, a box is ty, tx, th, tw.

        Raises:
            TypeError, ValueError: naming the argument, what it must be and what it was.
        """
        pyramid = self.fpn(self.backbone(images))
        return self.class_net(pyramid), self.box_net(pyramid)

    def freeze(self) -> EfficientDet:
        """Makes the weights constants for the fastest repeated calls; returns the model.

        See :meth:`edet.packing.PackedModule.freeze`, which this calls for every part.
        """
        for module in self.modules():
            if isinstance(module, PackedModule):
                module.freeze()
        return self

    def unfreeze(self) -> EfficientDet:
        """Undoes :meth:`freeze`, except for the eval mode; returns the model."""
        for module in self.modules():
            if isinstance(module, PackedModule):
                module.unfreeze()
        return self


def create_model(
    name: str,
    *,
    num_classes: int = 90,
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
        name: one of :func:`edet.list_models`.
        num_classes: number of classes.
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
    size = (image_size, image_size) if isinstance(image_size, int) else image_size
    changes = {
        "image_size": size,
        "fusion": fusion,
        "width": width,
        "cells": cells,
        "head_repeats": head_repeats,
        "min_level": min_level,
        "max_level": max_level,
    }
    config = replace(
        get_config(name),
        num_classes=num_classes,
        fusion_per_channel=fusion_per_channel,
        **{key: value for key, value in changes.items() if value is not None},  # type: ignore[arg-type]
    )
    model = EfficientDet(config, backbone=backbone, backbone_channels=backbone_channels)
    if checkpoint is not None:
        load_checkpoint(model, checkpoint, reinit_head=reinit_head)
    return model


class Counts(NamedTuple):
    """A number for each part of a model."""

    backbone: int
    fpn: int
    class_net: int
    box_net: int

    @property
    def total(self) -> int:
        """Their sum."""
        return sum(self)


def count_parameters(model: EfficientDet) -> Counts:
    """Parameters of each part."""
    return Counts(
        *(sum(p.numel() for p in getattr(model, part).parameters()) for part in Counts._fields)
    )


def count_macs(model: EfficientDet, image_size: tuple[int, int] | None = None) -> Counts:
    """Multiply-adds of each part's convolutions for one image, without computing any.

    The paper's "FLOPs" are multiply-adds of everything, a little more than these.

    Args:
        image_size: (H, W); ``model.config.image_size`` when None.
    """
    macs = dict.fromkeys(Counts._fields, 0)
    hooks = []
    for part in macs:
        for module in getattr(model, part).modules():
            if isinstance(module, nn.Conv2d):

                def hook(conv: nn.Module, _: object, out: Tensor, part: str = part) -> None:
                    macs[part] += out.numel() * conv.weight[0].numel()  # type: ignore[index]

                hooks.append(module.register_forward_hook(hook))
    parameters = dict(model.named_parameters())
    meta = {
        name: torch.empty_like(tensor, device="meta")
        for name, tensor in (*parameters.items(), *model.named_buffers())
    }
    images = torch.empty(
        1,
        3,
        *(image_size or model.config.image_size),
        device="meta",
        dtype=next(iter(parameters.values())).dtype,
        requires_grad=True,  # so that the layers run which the hooks are on
    )
    training = [module for module in model.modules() if module.training]
    try:
        with torch.enable_grad():
            torch.func.functional_call(model.eval(), meta, (images,))
    finally:
        for module in training:
            module.training = True
        for handle in hooks:
            handle.remove()
    return Counts(**macs)
