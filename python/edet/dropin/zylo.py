"""Recognises zylo117's Yet-Another-EfficientDet-Pytorch: a BiFPN is a module for each cell."""

from __future__ import annotations

import functools
from typing import Any, cast

import torch
from torch import Tensor, nn

from ..fused.describe import (
    Edge,
    FusionNodes,
    HeadLayers,
    Mismatch,
    NodeLayers,
)
from .attributes import activation, attributes


def _inner(conv: object) -> Any:
    """The convolution inside a wrapper that pads it."""
    return getattr(conv, "conv", conv)


def _separable(block: nn.Module) -> tuple[Any, Any, nn.Module | None]:
    """Depthwise, pointwise and batch norm of a SeparableConvBlock without activation."""
    dw, pw = attributes(block, "depthwise_conv", "pointwise_conv")
    if getattr(block, "activation", False):
        raise Mismatch("a separable convolution with an activation")
    bn = cast(nn.Module, block.bn) if getattr(block, "norm", False) else None
    return _inner(dw), _inner(pw), bn


def _projection(layers: Any) -> tuple[Any, nn.Module | None]:
    """Convolution and batch norm, the first two of a Sequential."""
    return _inner(layers[0]), layers[1]


def fpn(module: nn.Module) -> FusionNodes | None:
    if not all(hasattr(module, name) for name in ("conv6_up", "conv3_up", "conv4_down", "p4_w2")):
        return None
    first, attention = attributes(module, "first_time", "attention")
    activation(attributes(module, "swish")[0])
    top = 8 if hasattr(module, "conv8_down") else 7
    levels = top - 2
    above: list[Edge] = []
    projections: dict[tuple[int, bool], tuple[Any, nn.Module | None]] = {}
    if first:
        above = [Edge(2, *_projection(module.p5_to_p6)), *map(Edge, range(3, levels - 1))]
        for level in (3, 4, 5):
            layers = getattr(module, f"p{level}_down_channel")
            projections[level, True] = _projection(layers)
        for level in (4, 5):
            layers = getattr(module, f"p{level}_down_channel_2")
            projections[level, False] = _projection(layers)
    last = {level: level - 3 for level in range(3, top + 1)}  # the newest map of each level
    nodes: list[NodeLayers] = []

    def node(level: int, other: int, up: bool) -> None:
        block = getattr(module, f"conv{level}_{'up' if up else 'down'}")
        own = Edge(level - 3, *projections.get((level, up), ()))
        edges = [own]
        if last[level] != level - 3:
            edges.append(Edge(last[level]))
        edges.append(Edge(last[other]))
        weights = getattr(module, f"p{level}_w{1 if up else 2}") if attention else None
        dw, pw, bn = _separable(block)
        fusion = "fast" if attention else "sum"
        nodes.append(NodeLayers(level - 3, edges, dw, pw, bn, weights, fusion))
        last[level] = levels + len(nodes) - 1

    for level in range(top - 1, 2, -1):
        node(level, level + 1, True)
    for level in range(4, top + 1):
        node(level, level - 1, False)
    outputs = [last[level] for level in range(3, top + 1)]
    inputs = 3 if first else levels
    return FusionNodes(inputs, nodes, outputs, above, "zero", finish=tuple)


def _flat(maps: list[Tensor], values: int, sigmoid: bool) -> Tensor:
    """Maps (N, anchors·values, H, W) of all levels as (N, anchors of all levels, values)."""
    flat = torch.cat([x.permute(0, 2, 3, 1).reshape(x.shape[0], -1, values) for x in maps], dim=1)
    return flat.sigmoid() if sigmoid else flat


def head(module: nn.Module) -> HeadLayers | None:
    if not all(hasattr(module, name) for name in ("conv_list", "bn_list", "header")):
        return None
    convs, norms, header = attributes(module, "conv_list", "bn_list", "header")
    layers = [_separable(block) for block in [*convs, header]]
    if any(bn is not None for _, _, bn in layers):
        raise Mismatch("a separable convolution with a batch norm of its own")
    classes = getattr(module, "num_classes", None)
    return HeadLayers(
        [(dw, pw) for dw, pw, _ in layers[:-1]],
        [list(layer) for layer in zip(*norms, strict=True)],
        layers[-1][:2],
        activation(attributes(module, "swish")[0]),
        functools.partial(_flat, values=classes or 4, sigmoid=classes is not None),
    )
