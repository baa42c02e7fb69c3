"""EfficientNet B0–B7 and Lite 0–4 as feature extractors, with timm's state-dict keys."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from edet_kernels.autocast import autocast_dtype
from edet_kernels.reference import activate

from ..fused.describe import BackboneBlocks, BlockLayers, Mismatch
from ..fused.int8 import Int8Backbone
from ..fused.module import PackedModule, check_exported_size
from ..fused.packed import PackedBackbone, pack_backbone
from ..fused.sources import own_weight
from .batch_norm import SharedBatchNorm2d, training_maps
from .block_training import OPS, forward_training

# kernel, stride, expansion, channels, repeats of each stage (Tan & Le 2019, table 1)
_STAGES = (
    (3, 1, 1, 16, 1),
    (3, 2, 6, 24, 2),
    (5, 2, 6, 40, 2),
    (3, 2, 6, 80, 3),
    (5, 1, 6, 112, 3),
    (5, 2, 6, 192, 4),
    (3, 1, 6, 320, 1),
)
_STEM_CHANNELS = 32

#: Width and depth multipliers of the compound scaling.
BACKBONES: dict[str, tuple[float, float]] = {
    "efficientnet_b0": (1.0, 1.0),
    "efficientnet_b1": (1.0, 1.1),
    "efficientnet_b2": (1.1, 1.2),
    "efficientnet_b3": (1.2, 1.4),
    "efficientnet_b4": (1.4, 1.8),
    "efficientnet_b5": (1.6, 2.2),
    "efficientnet_b6": (1.8, 2.6),
    "efficientnet_b7": (2.0, 3.1),
    "efficientnet_lite0": (1.0, 1.0),
    "efficientnet_lite1": (1.0, 1.1),
    "efficientnet_lite2": (1.1, 1.2),
    "efficientnet_lite3": (1.2, 1.4),
    "efficientnet_lite4": (1.4, 1.8),
}


class Stage(NamedTuple):
    """One stage of a scaled EfficientNet."""

    kernel: int
    stride: int
    expansion: int
    channels: int
    repeats: int


def round_channels(channels: float) -> int:
    """The multiple of 8 nearest to ``channels`` that is not more than 10 % below it."""
    rounded = max(8, int(channels + 4) // 8 * 8)
    return rounded + 8 if rounded < 0.9 * channels else rounded


def scaled_stages(name: str) -> tuple[int, list[Stage]]:
    """Stem channels and stages of the backbone ``name``: compound scaling of B0.

    The Lite networks keep B0's stem and the depth of the first and last stage.

    Raises:
        ValueError: unknown name.
    """
    if name not in BACKBONES:
        raise ValueError(f"backbone must be one of {', '.join(BACKBONES)}, got {name!r}")
    width, depth = BACKBONES[name]
    lite = "lite" in name
    stages = []
    for i, (kernel, stride, expansion, channels, repeats) in enumerate(_STAGES):
        fixed = lite and i in (0, len(_STAGES) - 1)
        stages.append(
            Stage(
                kernel,
                stride,
                expansion,
                round_channels(channels * width),
                repeats if fixed else math.ceil(repeats * depth),
            )
        )
    return _STEM_CHANNELS if lite else round_channels(_STEM_CHANNELS * width), stages


def normalise_pixels(pixels: Tensor, mean: Tensor, std: Tensor, dtype: torch.dtype) -> Tensor:
    """(x − mean)/std, channels_last in ``dtype``.

    Args:
        pixels: (B, 3, H, W) of :func:`edet.preprocess.letterbox`; uint8 is divided by 255.
        mean, std: (3,).
    """
    unit = pixels.float() / 255 if pixels.dtype == torch.uint8 else pixels
    images = (unit - mean.view(1, 3, 1, 1)) / std.view(1, 3, 1, 1)
    return images.to(dtype, memory_format=torch.channels_last)


class Conv2d(nn.Conv2d):
    """A convolution to ⌈n / stride⌉ pixels per side, whatever the input's size; no bias.

    ``pad`` places the zeros: ``symmetric`` k // 2 on every side, ``same`` as few as needed, the odd
    one at the bottom and right (TensorFlow's SAME).
    """

    def __init__(
        self, in_channels: int, out_channels: int, kernel: int, stride: int, groups: int, pad: str
    ) -> None:
        super().__init__(
            in_channels,
            out_channels,
            kernel,
            stride,
            # without a stride the two are the same
            padding=kernel // 2 if pad == "symmetric" or stride == 1 else 0,
            groups=groups,
            bias=False,
        )
        self.pad = pad

    def forward(self, x: Tensor) -> Tensor:
        kernel, stride = self.kernel_size[0], self.stride[0]
        if self.pad == "same" and stride > 1:
            rows, columns = (
                max((-(-n // stride) - 1) * stride + kernel - n, 0) for n in x.shape[-2:]
            )
            x = F.pad(x, (columns // 2, columns - columns // 2, rows // 2, rows - rows // 2))
        return super().forward(x)


class SqueezeExcite(nn.Module):
    """Gate of the channels: x · σ(W₂·act(W₁·mean(x))) (Hu et al. 2018)."""

    def __init__(self, channels: int, reduced: int, activation: str) -> None:
        super().__init__()
        self.conv_reduce = nn.Conv2d(channels, reduced, 1)
        self.conv_expand = nn.Conv2d(reduced, channels, 1)
        self.activation = activation

    def forward(self, x: Tensor) -> Tensor:
        gate = activate(self.conv_reduce(x.mean((2, 3), keepdim=True)), self.activation)
        gate = self.conv_expand(gate)
        return x * gate.sigmoid()


class MBConv(nn.Module):
    """Mobile inverted bottleneck: expand 1×1 → depthwise k×k → squeeze-excite → project 1×1.

    Without expansion (the first stage) timm calls the projection ``conv_pw``; otherwise the
    expansion is ``conv_pw`` and the projection ``conv_pwl``.
    """

    def __init__(
        self,
        in_channels: int,
        stage: Stage,
        stride: int,
        *,
        squeeze: bool,
        activation: str,
        padding: str,
        bn_eps: float,
        bn_momentum: float,
    ) -> None:
        super().__init__()
        middle, out = in_channels * stage.expansion, stage.channels
        self.expands = stage.expansion != 1
        self.shortcut = stride == 1 and in_channels == out
        self.activation = activation

        def norm(channels: int) -> nn.BatchNorm2d:
            return nn.BatchNorm2d(channels, bn_eps, bn_momentum)

        # the order of the attributes is the order of the state-dict keys
        if self.expands:
            self.conv_pw = Conv2d(in_channels, middle, 1, 1, 1, padding)
            self.bn1 = norm(middle)
        self.conv_dw = Conv2d(middle, middle, stage.kernel, stride, middle, padding)
        if self.expands:
            self.bn2 = norm(middle)
        else:
            self.bn1 = norm(middle)
        self.se = SqueezeExcite(middle, in_channels // 4, activation) if squeeze else None
        if self.expands:
            self.conv_pwl = Conv2d(middle, out, 1, 1, 1, padding)
            self.bn3 = norm(out)
        else:
            self.conv_pw = Conv2d(middle, out, 1, 1, 1, padding)
            self.bn2 = norm(out)

    @property
    def layers(self) -> BlockLayers:
        """Its convolutions and batch norms."""
        squeeze = None if self.se is None else (self.se.conv_reduce, self.se.conv_expand)
        if not self.expands:
            project = self.conv_pw, self.bn2
            return BlockLayers(None, (self.conv_dw, self.bn1), squeeze, project, self.shortcut)
        expand, depthwise = (self.conv_pw, self.bn1), (self.conv_dw, self.bn2)
        return BlockLayers(expand, depthwise, squeeze, (self.conv_pwl, self.bn3), self.shortcut)

    def forward(self, x: Tensor) -> Tensor:
        y, bn, project, project_bn = x, self.bn1, self.conv_pw, self.bn2
        if self.expands:
            y = activate(self.bn1(self.conv_pw(x)), self.activation)
            bn, project, project_bn = self.bn2, self.conv_pwl, self.bn3
        y = activate(bn(self.conv_dw(y)), self.activation)
        if self.se is not None:
            y = self.se(y)
        y = project_bn(project(y))
        return x + y if self.shortcut else y


def _check_convolution(name: str, conv: nn.Module, pad: str) -> None:
    """Checks that ``conv`` is a :class:`Conv2d` as it was made, padded by ``pad``.

    Raises:
        Mismatch: it is another one, or was changed.
    """
    if not isinstance(conv, Conv2d):
        raise Mismatch(f"{name} is a {type(conv).__name__}")
    kernel, stride = conv.kernel_size[0], conv.stride[0]
    zeros = kernel // 2 if conv.pad == "symmetric" or stride == 1 else 0
    if (stride > 1 and conv.pad != pad) or conv.padding != (zeros, zeros):
        raise Mismatch(f"{name} is padded in another way")
    if conv.dilation != (1, 1) or conv.padding_mode != "zeros":
        raise Mismatch(f"{name} is dilated, or not padded by zeros")


class EfficientNet(PackedModule):
    """EfficientNet without its head, giving the maps of strides 8, 16 and 32 (or other levels).

    Args:
        name: one of :data:`BACKBONES`.
        levels: pyramid levels to return, of 1 to 5; level l has stride 2^l.
        padding: ``same`` or ``symmetric``, see :class:`Conv2d`.
        activation: ``swish`` or ``relu6``.
        bn_eps, bn_momentum: of the batch norms.

    Attributes:
        channels: channels of each returned map.

    Raises:
        ValueError: unknown name, level or padding.
    """

    layer_types = frozenset(
        (
            *(Conv2d, nn.Conv2d, SqueezeExcite, MBConv, nn.ModuleList),
            *(nn.BatchNorm2d, nn.SyncBatchNorm, SharedBatchNorm2d),
        )
    )

    def __init__(
        self,
        name: str = "efficientnet_b0",
        *,
        levels: Sequence[int] = (3, 4, 5),
        padding: str = "same",
        activation: str = "swish",
        bn_eps: float = 1e-3,
        bn_momentum: float = 0.01,
    ) -> None:
        super().__init__()
        if padding not in ("same", "symmetric"):
            raise ValueError(f"padding must be same or symmetric, got {padding!r}")
        if not levels or not set(levels) <= {1, 2, 3, 4, 5}:
            raise ValueError(f"levels must be some of 1 … 5, got {tuple(levels)}")
        stem, stages = scaled_stages(name)
        self.activation = activation
        self.conv_stem = Conv2d(3, stem, 3, 2, 1, padding)
        self.bn1 = nn.BatchNorm2d(stem, bn_eps, bn_momentum)
        self.blocks = nn.ModuleList()
        channels, level = stem, 1
        last_stage = {}  # of each level
        for i, stage in enumerate(stages):
            level += stage.stride == 2
            last_stage[level] = i
            blocks = nn.ModuleList()
            for j in range(stage.repeats):
                blocks.append(
                    MBConv(
                        channels,
                        stage,
                        stage.stride if j == 0 else 1,
                        squeeze="lite" not in name,
                        activation=activation,
                        padding=padding,
                        bn_eps=bn_eps,
                        bn_momentum=bn_momentum,
                    )
                )
                channels = stage.channels
            self.blocks.append(blocks)
        self._returned = [last_stage[level] for level in sorted(levels)]
        self.channels = [stages[i].channels for i in self._returned]
        self._initialise()

    def _initialise(self) -> None:
        """Normal weights of variance 2 / fan-out, as in the code of Tan & Le 2019; zero biases."""
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                fan_out = module.weight.shape[0] // module.groups * module.weight[0, 0].numel()
                nn.init.normal_(module.weight, std=math.sqrt(2 / fan_out))
                if module.bias is not None:
                    nn.init.zeros_(module.bias)

    def stages(self) -> list[list[MBConv]]:
        """The blocks of each stage, in the order they run."""
        # a stage may have been exchanged for one layer
        lists = (nn.ModuleList, nn.Sequential)
        stages = (list(s) if isinstance(s, lists) else [s] for s in self.blocks)
        return cast("list[list[MBConv]]", list(stages))

    def _check(self, images: Any) -> None:
        if not isinstance(images, Tensor):
            raise TypeError(f"images must be a tensor, got {type(images).__name__}")
        if images.dim() != 4 or images.shape[1] != 3:
            layout = " (channels last? use images.permute(0, 3, 1, 2))"
            hint = layout if images.dim() == 4 and images.shape[-1] == 3 else ""
            raise ValueError(f"images must be (N, 3, H, W), got {tuple(images.shape)}{hint}")
        check_exported_size("images", images)
        if 0 in images.shape[2:]:
            raise ValueError(f"images must have at least one pixel, got {tuple(images.shape)}")
        weight = own_weight(self)
        if weight is None:
            return
        if images.device != weight.device:
            raise ValueError(
                f"images must be on {weight.device} like the model, got {images.device}"
            )
        if images.dtype != weight.dtype and autocast_dtype(images) is None:
            raise TypeError(f"images must be {weight.dtype} like the model, got {images.dtype}")

    def forward(self, images: Tensor) -> list[Tensor]:
        """Images (N, 3, H, W), normalised, of any size and the model's dtype, to one map per level.

        Raises:
            TypeError, ValueError: ``images`` is of another type, shape, dtype or device.
        """
        self._check(images)
        packed = self.packed(images)
        if packed is not None:
            weights, dtype = packed
            return weights.run(images, dtype)
        if training_maps(self, [images], OPS) is not None:
            return forward_training(self, images)
        x = activate(self.bn1(self.conv_stem(images)), self.activation)
        maps = []
        for i, stage in enumerate(self.stages()):
            for block in stage:
                x = block(x)
            if i in self._returned:
                maps.append(x)
        return maps

    def forward_pixels(self, pixels: Tensor, mean: Tensor, std: Tensor) -> list[Tensor]:
        """As :meth:`forward`, from pixels as they are read: the first layer normalises them.

        Args:
            pixels: (N, 3, H, W) uint8.
            mean, std: (3,) for values of 0 … 255.
        """
        weight = own_weight(self)
        packed = None if weight is None else self.packed(weight)  # computes in the weight's dtype
        if packed is None:
            dtype = torch.float32 if weight is None else weight.dtype
            images = normalise_pixels(pixels.float(), mean, std, dtype)
            return cast("list[Tensor]", self(images))
        weights, dtype = packed
        return weights.run(pixels, dtype, mean, std)

    def as_backbone_blocks(self) -> BackboneBlocks:
        """The backbone's convolutions and batch norms, for :mod:`edet.describe`."""
        stages = self.stages()
        last = list(itertools.accumulate(len(stage) for stage in stages))
        return BackboneBlocks(
            stem=(self.conv_stem, self.bn1),
            blocks=[block.layers for stage in stages for block in stage],
            returned=[last[i] - 1 for i in self._returned],
            padding=self.conv_stem.pad,
            activation=self.activation,
        )

    def check_layers(self) -> None:
        pad = self.conv_stem.pad
        _check_convolution("conv_stem", self.conv_stem, pad)
        for i, block in enumerate(block for stage in self.stages() for block in stage):
            for part in (block.layers.expand, block.layers.depthwise, block.layers.project):
                if part is not None:
                    _check_convolution(f"a convolution of block {i}", part[0], pad)
            acts = [block.activation] + ([] if block.se is None else [block.se.activation])
            if set(acts) != {self.activation}:
                raise Mismatch(f"block {i} has another activation")
        self.as_backbone_blocks().check()

    def pack(self, dtype: torch.dtype) -> PackedBackbone | Int8Backbone:
        weights = pack_backbone(self.as_backbone_blocks(), dtype)
        return weights if self.int8 is None else Int8Backbone(weights, self.int8, dtype)
