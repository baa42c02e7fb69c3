"""Parameters and multiply-adds of a model, part by part."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn

from ..fused.module import PackedModule
from .efficientdet import EfficientDet


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
    )
    training = [module for module in model.modules() if module.training]
    fused = [m for m in model.modules() if isinstance(m, PackedModule) and "fused" not in vars(m)]
    for packed in fused:
        packed.fused = False  # the layers run, which the hooks are on; what is packed stays
    try:
        torch.func.functional_call(model.eval(), meta, (images,))
    finally:
        for packed in fused:
            del packed.fused
        for module in training:
            module.training = True
        for handle in hooks:
            handle.remove()
    return Counts(**macs)
