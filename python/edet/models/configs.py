"""The model table: what distinguishes one EfficientDet from another, and how to change it."""

from __future__ import annotations

import difflib
import operator
from dataclasses import dataclass
from typing import Any

from edet_kernels.names import FUSIONS

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)
#: Pixels in −1…1: the AdvProp and lite checkpoints.
HALF = (0.5, 0.5, 0.5)


def checked_size(size: Any, name: str = "image_size") -> tuple[int, int]:
    """(H, W), of two integers of any kind or of one for both.

    Raises:
        ValueError: not one or two positive integers; a float is none, whole or not.
    """
    one = hasattr(size, "__index__") and not getattr(size, "ndim", 0)  # arrays have it too
    given = (size, size) if one else size
    try:
        height, width = (operator.index(n) for n in given)
    except (TypeError, ValueError):
        height = width = 0
    if height < 1 or width < 1 or isinstance(size, bool):
        raise ValueError(
            f"{name} must be two positive integers, got {given!r}: (H, W), or one number for both"
        )
    return height, width


@dataclass(frozen=True)
class ModelConfig:
    """One EfficientDet: its network, its anchors and its normalisation.

    Attributes:
        name: the name given to :func:`edet.create_model`.
        image_size: (H, W) that images are resized to; the network itself takes any size.
        width: channels of the BiFPN and the heads (W of paper table 1).
        cells: BiFPN cells (D).
        head_repeats: convolutions before the last one of each head.
        backbone: a name of :data:`edet.efficientnet.BACKBONES`.
        fusion: how the maps of an edge are combined, one of :data:`FUSIONS` (paper, section 3.3).
        fusion_per_channel: one edge weight per channel instead of one per edge.
        min_level, max_level: the pyramid, P3 … P7 in the paper; level l has stride 2^l.
        padding: ``same`` (TensorFlow's: the odd pixel at the bottom and right) or ``symmetric``.
        redundant_bias: convolutions before a batch norm carry a bias too, as in the checkpoints
            that were trained with TensorFlow.
        activation: ``swish`` or ``relu6``.
        backbone_bn_eps, backbone_bn_momentum: batch norm of the backbone (PyTorch's momentum); the
            BiFPN's and the heads' are 1e-3 and 0.01 in all models.
        head_bn_level_first: the order of the indices in the heads' ``bn_rep`` keys.
        num_classes: classes, 90 for COCO's ids.
        anchor_scale: size of the first anchor of a level, in strides.
        num_scales: anchor octave steps per level.
        aspect_ratios: (width, height) factors of the anchors, or a float r for (√r, 1/√r).
        mean, std: of the pixels divided by 255, R, G, B.
    """

    name: str
    image_size: tuple[int, int]
    width: int
    cells: int
    head_repeats: int
    backbone: str
    fusion: str = "fast"
    fusion_per_channel: bool = False
    min_level: int = 3
    max_level: int = 7
    padding: str = "same"
    redundant_bias: bool = True
    activation: str = "swish"
    backbone_bn_eps: float = 1e-3
    backbone_bn_momentum: float = 0.01
    head_bn_level_first: bool = False
    num_classes: int = 90
    anchor_scale: float = 4.0
    num_scales: int = 3
    aspect_ratios: tuple[float | tuple[float, float], ...] = ((1.0, 1.0), (1.4, 0.7), (0.7, 1.4))
    mean: tuple[float, float, float] = IMAGENET_MEAN
    std: tuple[float, float, float] = IMAGENET_STD

    def __post_init__(self) -> None:
        for field in ("width", "cells", "num_classes", "num_scales"):
            value = getattr(self, field)
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise ValueError(f"{field} must be an integer ≥ 1, got {value!r}")
        if not isinstance(self.head_repeats, int) or self.head_repeats < 0:
            raise ValueError(f"head_repeats must be an integer ≥ 0, got {self.head_repeats!r}")
        object.__setattr__(self, "image_size", checked_size(self.image_size))
        if self.fusion not in FUSIONS:
            raise ValueError(f"fusion must be one of {', '.join(FUSIONS)}, got {self.fusion!r}")
        if not 1 <= self.min_level < self.max_level:
            raise ValueError(
                "levels must be 1 ≤ min_level < max_level, "
                f"got min_level {self.min_level} and max_level {self.max_level}"
            )

    @property
    def levels(self) -> int:
        """Number of pyramid levels."""
        return self.max_level - self.min_level + 1

    @property
    def level_sizes(self) -> list[tuple[int, int]]:
        """(H, W) of each pyramid level for an image of ``image_size``, from the lowest level up."""
        h, w = self.image_size
        sizes = []
        for level in range(self.max_level + 1):
            if level >= self.min_level:
                sizes.append((h, w))
            h, w = -(-h // 2), -(-w // 2)
        return sizes

    @property
    def num_anchors(self) -> int:
        """Anchors per cell of a level."""
        return self.num_scales * len(self.aspect_ratios)


# name: image size, width, cells, head repeats (paper, table 1), backbone
_SCALES: dict[str, tuple[int, int, int, int, str]] = {
    "d0": (512, 64, 3, 3, "efficientnet_b0"),
    "d1": (640, 88, 4, 3, "efficientnet_b1"),
    "d2": (768, 112, 5, 3, "efficientnet_b2"),
    "d3": (896, 160, 6, 4, "efficientnet_b3"),
    "d4": (1024, 224, 7, 4, "efficientnet_b4"),
    "d5": (1280, 288, 7, 4, "efficientnet_b5"),
    "d6": (1280, 384, 8, 5, "efficientnet_b6"),
    "d7": (1536, 384, 8, 5, "efficientnet_b6"),
    "d7x": (1536, 384, 8, 5, "efficientnet_b7"),
    "lite0": (320, 64, 3, 3, "efficientnet_lite0"),
    "lite1": (384, 88, 4, 3, "efficientnet_lite1"),
    "lite2": (448, 112, 5, 3, "efficientnet_lite2"),
    "lite3": (512, 160, 6, 4, "efficientnet_lite3"),
    "lite3x": (640, 200, 6, 4, "efficientnet_lite3"),
    "lite4": (640, 224, 7, 4, "efficientnet_lite4"),
}


def _config(prefix: str, scale: str, suffix: str = "", **changes: object) -> ModelConfig:
    size, width, cells, head_repeats, backbone = _SCALES[scale]
    return ModelConfig(
        name=f"{prefix}efficientdet_{scale}{suffix}",
        image_size=(size, size),
        width=width,
        cells=cells,
        head_repeats=head_repeats,
        backbone=backbone,
        # the largest models and the lite ones were trained without edge weights, for stability
        fusion="sum" if scale in ("d6", "d7", "d7x") or scale.startswith("lite") else "fast",
        max_level=8 if scale == "d7x" else 7,
        anchor_scale={"d7": 5.0, "lite0": 3.0, "lite1": 3.0, "lite2": 3.0, "lite3x": 3.0}.get(
            scale, 4.0
        ),
        **changes,  # type: ignore[arg-type]
    )


def _table() -> dict[str, ModelConfig]:
    regular = [f"d{i}" for i in range(8)]
    configs = [_config("tf_", scale) for scale in [*regular, "d7x"]]
    configs += [
        # effdet's normalisation; the TensorFlow code used (x − 127) / 128
        _config("tf_", scale, activation="relu6", mean=HALF, std=HALF)
        for scale in _SCALES
        if scale.startswith("lite")
    ]
    configs += [_config("tf_", scale, "_ap", mean=HALF, std=HALF) for scale in regular[:6]]
    configs += [
        _config(
            "",
            scale,
            padding="symmetric",
            redundant_bias=False,
            backbone_bn_eps=1e-5,
            backbone_bn_momentum=0.1,
        )
        for scale in regular
    ]
    return {config.name: config for config in configs}


_CONFIGS = _table()


def list_models() -> list[str]:
    """Names that :func:`edet.create_model` takes."""
    return list(_CONFIGS)


def get_config(name: str) -> ModelConfig:
    """The configuration of the model ``name``.

    Raises:
        ValueError: unknown name; the message gives the nearest ones.
    """
    if name in _CONFIGS:
        return _CONFIGS[name]
    # compared without the family, so that "d0" is near to tf_efficientdet_d0
    given = str(name).lower().replace("-", "_")
    short = {config.split("efficientdet_")[-1]: config for config in reversed(_CONFIGS)}
    found = difflib.get_close_matches(given.split("efficientdet_")[-1], short, n=3, cutoff=0.5)
    near = [short[match] for match in found]
    hint = f"did you mean {', '.join(near)}?" if near else "edet.list_models() lists them"
    raise ValueError(f"name must be a known model, got {name!r}: {hint}")


__all__ = ["FUSIONS", "ModelConfig", "get_config", "list_models"]
