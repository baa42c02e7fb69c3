"""What a module is made of: by its own description, or by the recogniser of its code base."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeAlias, cast

from torch import nn

from ..fused.describe import (
    BackboneBlocks,
    FusionNodes,
    HeadLayers,
)
from . import effdet, timm, zylo

Description: TypeAlias = FusionNodes | HeadLayers | BackboneBlocks

#: The methods of the protocol.
METHODS = ("as_fusion_nodes", "as_head_layers", "as_backbone_blocks")


def protocol(module: nn.Module) -> Description | None:
    """What a module says of itself."""
    for method in METHODS:
        if hasattr(module, method):
            return cast(Description, getattr(module, method)())
    return None


#: Each gives a module's description, None when it does not know it, or raises Mismatch.
RECOGNISERS: tuple[Callable[[nn.Module], Description | None], ...] = (
    protocol,
    timm.backbone,
    effdet.fpn,
    effdet.head,
    zylo.fpn,
    zylo.head,
)


def describe(module: nn.Module) -> Description | None:
    """What a backbone, BiFPN or head is made of; None for any other module.

    Raises:
        Mismatch: it is one, but the fused ops cannot compute it.
    """
    for recognise in RECOGNISERS:
        description = recognise(module)
        if description is not None:
            description.check()
            return description
    return None
