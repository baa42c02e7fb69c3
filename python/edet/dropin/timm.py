"""Recognises timm's EfficientNets, the backbones of effdet."""

from __future__ import annotations

from typing import Any, cast

from torch import nn

from ..fused.describe import (
    BackboneBlocks,
    BlockLayers,
    Mismatch,
)
from .attributes import activation, attributes


def _norm(bn: nn.Module) -> tuple[nn.Module, str]:
    """A batch norm and the activation behind it."""
    drop = getattr(bn, "drop", None)
    if isinstance(drop, nn.Module) and not isinstance(drop, nn.Identity):
        raise Mismatch(f"a batch norm with {type(drop).__name__}")
    return bn, activation(getattr(bn, "act", None))


def _padding(conv: nn.Conv2d) -> str | None:
    """How a convolution is padded; None when both ways are the same."""
    if conv.stride == (1, 1):
        if conv.padding != tuple(k // 2 for k in conv.kernel_size):
            raise Mismatch(f"a convolution padded by {conv.padding}")
        return None
    if "Same" in type(conv).__name__:
        return "same"
    if conv.padding != tuple(k // 2 for k in conv.kernel_size):
        raise Mismatch(f"a convolution with a stride padded by {conv.padding}")
    return "symmetric"


def _block(
    block: nn.Module,
) -> tuple[BlockLayers, set[str], set[str | None]]:
    """A DepthwiseSeparableConv or InvertedResidual; its activations and paddings."""
    expands = hasattr(block, "conv_pwl")
    convs = ("conv_pw", "conv_dw", "conv_pwl") if expands else ("conv_dw", "conv_pw")
    parts = []
    activations = []
    for i, name in enumerate(convs, 1):
        conv, bn = attributes(block, name, f"bn{i}")
        if not isinstance(conv, nn.Conv2d):
            raise Mismatch(f"a block with {type(conv).__name__}")
        parts.append((conv, _norm(bn)[0]))
        activations.append(_norm(bn)[1])
    if activations.pop() != "none":
        raise Mismatch("an activation after a projection")
    for name in ("aa", "conv_s2d"):
        other = getattr(block, name, None)
        if other is not None and not isinstance(other, nn.Identity):
            raise Mismatch(f"a block with {type(other).__name__}")
    squeeze = None
    se = getattr(block, "se", None)
    if se is not None and not isinstance(se, nn.Identity):
        reduce, act, excite, gate = attributes(se, "conv_reduce", "act1", "conv_expand", "gate")
        if not isinstance(gate, nn.Sigmoid) and type(gate).__name__ != "Sigmoid":
            raise Mismatch(f"squeeze-excite with {type(gate).__name__}")
        squeeze = reduce, excite
        activations.append(activation(act))
    layers = BlockLayers(
        parts[0] if expands else None,
        parts[-2],
        squeeze,
        parts[-1],
        bool(attributes(block, "has_skip")[0]),
    )
    return layers, set(activations), {_padding(parts[-2][0])}


def backbone(module: nn.Module) -> BackboneBlocks | None:
    if not all(hasattr(module, name) for name in ("conv_stem", "bn1", "blocks", "_stage_out_idx")):
        return None
    if getattr(module, "feature_hooks", None) is not None or 0 in cast(Any, module._stage_out_idx):
        raise Mismatch("it returns maps from inside of blocks")
    stem, bn, stages = attributes(module, "conv_stem", "bn1", "blocks")
    bn, activation = _norm(bn)
    activations, paddings = {activation}, {_padding(stem)}
    blocks, returned = [], []
    for i, stage in enumerate(stages):
        for block in stage:
            layers, more, padded = _block(block)
            blocks.append(layers)
            activations |= more
            paddings |= padded
        if i + 1 in cast(Any, module._stage_out_idx):
            returned.append(len(blocks) - 1)
    paddings.discard(None)
    if len(activations) > 1 or len(paddings) != 1:
        raise Mismatch("blocks with different activations or paddings")
    return BackboneBlocks((stem, bn), blocks, returned, cast(str, paddings.pop()), activation)
