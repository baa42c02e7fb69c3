"""An EfficientDet small enough to be trained in a test."""

from __future__ import annotations

import itertools
from typing import Any

from torch import Tensor, nn
from torch.nn import functional as F

import edet


class Backbone(nn.Module):
    """Strided convolutions to strides 8, 16 and 32."""

    channels = (8, 16, 24)

    def __init__(self) -> None:
        super().__init__()
        widths = (3, 8, 8, 8, 16, 24)
        self.convs = nn.ModuleList(nn.Conv2d(a, b, 3, 2, 1) for a, b in itertools.pairwise(widths))

    def forward(self, x: Tensor) -> list[Tensor]:
        maps = []
        for conv in self.convs:
            x = F.silu(conv(x))
            maps.append(x)
        return maps[-3:]


def small_model(**options: Any) -> edet.EfficientDet:
    """D0's anchors and layers, 16 channels wide, one cell, one convolution in each head."""
    size = {"width": 16, "cells": 1, "head_repeats": 1, "num_classes": 2, "image_size": 64}
    return edet.create_model("tf_efficientdet_d0", backbone=Backbone(), **(size | options))
