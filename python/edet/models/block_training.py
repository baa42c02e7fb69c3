"""An EfficientNet in training on the ops of its blocks, which keep little for the backward pass.

A block keeps its input, the map behind its depthwise convolution and its projection, each in front
of its batch norm; the expanded map, the largest, is never written.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor, nn

import edet_kernels
from edet_kernels.reference import activate

from .batch_norm import Normalised, normalise

if TYPE_CHECKING:
    from ..fused.describe import BlockLayers
    from .efficientnet import EfficientNet

#: The ops that run here; where one has no kernel, PyTorch's layers run.
OPS = ("training_moments", "training_depthwise", "training_project")


class _Affine(NamedTuple):
    """A batch norm as scale and offset, (C,)."""

    scale: Tensor
    offset: Tensor


def _affine(norm: nn.Module, mean: Tensor, deviations: Tensor, count: int) -> _Affine:
    """The batch norm over a map with these statistics, which are not read in eval mode."""
    scale, offset = normalise([norm], mean[None], deviations[None], [count])  # type: ignore[list-item]
    return _Affine(scale[0], offset[0])


def _no_statistics(x: Tensor) -> tuple[Tensor, Tensor]:
    """In the place of what a norm in eval mode does not read."""
    return x.new_empty(0, dtype=torch.float32), x.new_empty(0, dtype=torch.float32)


def _expanded(x: Tensor, conv: nn.Module, norm: nn.Module) -> _Affine:
    """The batch norm behind a 1×1 convolution of ``x``, without the convolution itself."""
    count = x.numel() // x.shape[1]
    if not norm.training:
        return _affine(norm, *_no_statistics(x), count)
    mean, products = edet_kernels.training_moments(x)
    # in double: of products as small as a channel's variance may be, much cancels
    weight = conv.weight.flatten(1).double()  # type: ignore[operator]
    deviations = (weight @ products.double() * weight).sum(1)
    return _affine(norm, (weight @ mean.double()).float(), deviations.float(), count)


class _Start(NamedTuple):
    """What a block reads: a map as it is, or the stem's, in front of its norm and activation."""

    x: Tensor
    norm: _Affine | None = None


def _block(start: _Start, layers: BlockLayers, padding: str, activation: str) -> Tensor:
    x = start.x
    conv, bn = layers.depthwise
    expand = None
    norm, before = start.norm, "none" if start.norm is None else activation
    if layers.expand is not None:
        expand = layers.expand[0].weight
        norm, before = _expanded(x, *layers.expand), activation
    middle, mean, deviations = edet_kernels.training_depthwise(
        x,
        expand,
        None if norm is None else norm.scale,
        None if norm is None else norm.offset,
        conv.weight,
        stride=conv.stride[0],
        padding=padding,
        activation=before,
        statistics=bn.training,
    )
    pixels = middle.numel() // middle.shape[1]
    squeeze = layers.squeeze and [t for c in layers.squeeze for t in (c.weight, c.bias)]
    project, project_bn = layers.project
    out, mean, deviations = edet_kernels.training_project(
        middle,
        *_affine(bn, mean, deviations, pixels),
        squeeze,  # type: ignore[arg-type]
        project.weight,
        activation=activation,
        statistics=project_bn.training,
    )
    y = Normalised(out, *_affine(project_bn, mean, deviations, pixels)).tensor()
    return x + y if layers.residual else y


def forward_training(backbone: EfficientNet, images: Tensor) -> list[Tensor]:
    """What the layers of ``backbone`` compute in training."""
    described = backbone.as_backbone_blocks()
    stem, bn = described.stem
    x = stem(images)
    statistics = (
        edet_kernels.training_moments(x, products=False) if bn.training else _no_statistics(x)
    )
    norm = _affine(bn, *statistics, x.numel() // x.shape[1])
    start, first = _Start(x, norm), described.blocks[0]
    if first.residual or first.expand is not None:  # which read the map itself
        start = _Start(activate(Normalised(x, *norm).tensor(), described.activation))
    maps = []
    for i, layers in enumerate(described.blocks):
        x = _block(start, layers, described.padding, described.activation)
        start = _Start(x)
        if i in described.returned:
            maps.append(x)
    return maps
