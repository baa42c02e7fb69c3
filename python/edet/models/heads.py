"""Class and box heads: convolutions shared by the pyramid levels, a batch norm for each level."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import cast

import torch
from torch import Tensor, nn

import edet_kernels
from edet_kernels.reference import activate

from ..fused.describe import HeadLayers, Mismatch
from ..fused.int8 import Int8Head
from ..fused.module import PackedModule
from ..fused.packed import PackedHead, pack_head
from ..fused.sources import own_weight
from .batch_norm import SharedBatchNorm2d, normalise, training_maps
from .bifpn import SeparableConv, batch_norm, check_maps, check_separable_layers

#: Bias of the class logits: every class starts at probability 0.01 (Lin et al. 2017, section 4.1).
CLASS_PRIOR_BIAS = -math.log((1 - 0.01) / 0.01)


class LevelNorm(nn.Module):
    """The batch norm after one layer on one level."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.bn = batch_norm(channels)

    def forward(self, x: Tensor) -> Tensor:
        return cast(Tensor, self.bn(x))


class Head(PackedModule):
    """One head: ``repeats`` × (separable convolution → batch norm → activation), then ``predict``.

    The convolutions are shared by the levels, the batch norms are not. Without gradients all layers
    on all levels are one ``edet_kernels.head``, in training each layer on all levels is one
    ``edet_kernels.training_node``.

    Args:
        width: channels of the pyramid.
        out_channels: channels of the prediction: anchors × classes, or anchors × 4.
        repeats: layers before the prediction.
        levels: pyramid levels.
        activation: after each batch norm.
        redundant_bias: convolutions before a batch norm carry a bias; the prediction always does.
        bn_level_first: index ``bn_rep`` by level, then layer.
        prior_bias: initial bias of the prediction.
    """

    layer_types = frozenset(
        (
            *(SeparableConv, LevelNorm, nn.Conv2d, nn.ModuleList),
            *(nn.BatchNorm2d, nn.SyncBatchNorm, SharedBatchNorm2d),
        )
    )

    def __init__(
        self,
        width: int,
        out_channels: int,
        *,
        repeats: int = 3,
        levels: int = 5,
        activation: str = "swish",
        redundant_bias: bool = True,
        bn_level_first: bool = False,
        prior_bias: float = 0.0,
    ) -> None:
        super().__init__()
        self.width, self.levels = width, levels
        self.activation, self.bn_level_first = activation, bn_level_first
        self.conv_rep = nn.ModuleList(
            SeparableConv(width, width, bias=redundant_bias) for _ in range(repeats)
        )
        outer, inner = (levels, repeats) if bn_level_first else (repeats, levels)
        self.bn_rep = nn.ModuleList(
            nn.ModuleList(LevelNorm(width) for _ in range(inner)) for _ in range(outer)
        )
        self.predict = SeparableConv(width, out_channels, bias=True)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):  # variance 1 / fan-in
                nn.init.normal_(module.weight, std=module.weight[0].numel() ** -0.5)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
        nn.init.constant_(cast(Tensor, self.predict.conv_pw.bias), prior_bias)

    def norm(self, layer: int, level: int) -> LevelNorm:
        """The batch norm after ``layer`` on ``level``."""
        outer, inner = (level, layer) if self.bn_level_first else (layer, level)
        return cast(LevelNorm, cast(nn.ModuleList, self.bn_rep[outer])[inner])

    def forward(self, maps: Sequence[Tensor]) -> list[Tensor]:
        """Maps (N, width, H, W), one per level, to predictions (N, out_channels, H, W).

        Raises:
            TypeError, ValueError: not one map of ``width`` channels per level.
        """
        check_maps(maps, [self.width] * self.levels, own_weight(self))
        packed = self.packed(maps[0])
        if packed is not None:
            weights, dtype = packed
            return cast("list[Tensor]", weights.run(maps, dtype))
        training = training_maps(self, maps)
        if training is not None:
            return self._forward_training(training)
        predictions = []
        for level, x in enumerate(maps):
            for layer, conv in enumerate(self.conv_rep):
                x = activate(self.norm(layer, level)(conv(x)), self.activation)
            predictions.append(self.predict(x))
        return predictions

    def _forward_training(self, maps: list[Tensor]) -> list[Tensor]:
        scales: Tensor | None = None
        offsets: Tensor | None = None
        sizes = [(x.shape[-2], x.shape[-1]) for x in maps]
        counts = [x.shape[0] * h * w for x, (h, w) in zip(maps, sizes, strict=True)]
        layers = cast("list[SeparableConv]", [*self.conv_rep, self.predict])
        for i, layer in enumerate(layers):
            maps, mean, deviations = edet_kernels.training_node(
                maps,
                scales,
                offsets,
                None,
                *layer.training_weights(),
                edge_counts=[1] * len(maps),
                sizes=sizes,
                activation=self.activation if i else "none",
                statistics=i < len(layers) - 1,
            )
            if i < len(layers) - 1:
                norms = [self.norm(i, level).bn for level in range(self.levels)]
                scales, offsets = normalise(norms, mean, deviations, counts)
        return maps

    def as_head_layers(self) -> HeadLayers:
        """What this head is made of, for the fused ops."""
        convs = cast("list[SeparableConv]", [*self.conv_rep, self.predict])
        return HeadLayers(
            [(conv.conv_dw, conv.conv_pw) for conv in convs[:-1]],
            [
                [self.norm(layer, level).bn for level in range(self.levels)]
                for layer in range(len(convs) - 1)
            ],
            (self.predict.conv_dw, self.predict.conv_pw),
            self.activation,
        )

    def check_layers(self) -> None:
        for i, conv in enumerate(cast("list[SeparableConv]", [*self.conv_rep, self.predict])):
            if conv.bn is not None:
                raise Mismatch(f"layer {i} has a batch norm of its own")
            check_separable_layers(f"layer {i}", conv)
        self.as_head_layers().check()

    def pack(self, dtype: torch.dtype) -> PackedHead | Int8Head:
        weights = pack_head(self.as_head_layers(), dtype)
        return weights if self.int8 is None else Int8Head(weights, self.int8, dtype)
