"""Anchor boxes of any image size and pyramid, and the box code between them and regressions.

Boxes in this module are (y1, x1, y2, x2) in pixels of the network's input, the order in which
EfficientDet's box head regresses.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache

import torch
from torch import Tensor

from ..models.configs import ModelConfig

#: (width, height) factors of the published checkpoints; a single float r stands for (√r, 1/√r).
ASPECT_RATIOS: tuple[tuple[float, float], ...] = ((1.0, 1.0), (1.4, 0.7), (0.7, 1.4))

_EPSILON = 1e-8  # keeps the logarithms of encode_boxes finite for empty boxes


def feature_sizes(
    image_size: tuple[int, int], min_level: int = 3, max_level: int = 7
) -> list[tuple[int, int]]:
    """(H, W) of each pyramid level: the image's size halved ``level`` times, rounded up."""
    height, width = image_size
    return [(-(-height >> n), -(-width >> n)) for n in range(min_level, max_level + 1)]


@lru_cache(maxsize=32)
def _anchors(
    image_size: tuple[int, int],
    min_level: int,
    max_level: int,
    num_scales: int,
    aspect_ratios: tuple[float | tuple[float, float], ...],
    anchor_scale: float,
    device: torch.device,
    dtype: torch.dtype,
) -> Tensor:
    factors = []  # (height, width) of each anchor of a cell, in strides
    for octave in range(num_scales):
        for aspect in aspect_ratios:
            x, y = aspect if isinstance(aspect, tuple) else (aspect**0.5, aspect**-0.5)
            strides = anchor_scale * 2 ** (octave / num_scales)
            factors.append((strides * y, strides * x))
    half = torch.tensor(factors, dtype=torch.float64, device="cpu") / 2
    whole = torch.tensor(image_size, dtype=torch.float64, device="cpu")
    levels = []
    for size in feature_sizes(image_size, min_level, max_level):
        # a stride is not whole when a side is not a multiple of 2**level
        stride = whole / torch.tensor(size, device="cpu")
        cells = torch.cartesian_prod(*(torch.arange(n, device="cpu") for n in size)).view(-1, 1, 2)
        centres = (cells.double() + 0.5) * stride
        levels.append(torch.cat([centres - half * stride, centres + half * stride], -1).view(-1, 4))
    return torch.cat(levels).to(device=device, dtype=dtype)


def generate_anchors(
    image_size: tuple[int, int],
    *,
    min_level: int = 3,
    max_level: int = 7,
    num_scales: int = 3,
    aspect_ratios: Sequence[float | Sequence[float]] = ASPECT_RATIOS,
    anchor_scale: float = 4.0,
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    """The anchors of all levels, in the order of the heads' outputs.

    The defaults are those of D0 to D6. Other models have others: :func:`model_anchors` takes them
    from a model's config, and so does :func:`edet.postprocess.postprocess` by itself.

    A cell of stride s carries anchors of size ``anchor_scale``·s·2^(octave/``num_scales``)·aspect
    around its centre (EfficientDet's published code; the idea is RetinaNet's, Lin et al. 2017,
    section 4).

    Args:
        image_size: (H, W) of the network's input; any positive size.
        min_level, max_level: the pyramid, P``min_level`` … P``max_level``.
        num_scales: octave steps per level.
        aspect_ratios: (width, height) factors, or a float r for (√r, 1/√r).
        anchor_scale: size of the first anchor, in strides.

    Returns:
        (N, 4) y1, x1, y2, x2 ordered by level, row, column, octave, aspect.

    Raises:
        ValueError: a size, level, scale or ratio that is not positive.
    """
    height, width = image_size
    if height < 1 or width < 1:
        raise ValueError(f"image_size must be two positive integers (H, W), got {image_size}")
    if not 0 <= min_level <= max_level:
        raise ValueError(f"levels must be 0 ≤ min_level ≤ max_level, got {min_level}, {max_level}")
    if num_scales < 1 or not anchor_scale > 0:
        raise ValueError(
            f"num_scales and anchor_scale must be positive, got {num_scales} and {anchor_scale}"
        )
    ratios = tuple(
        float(r) if isinstance(r, int | float) else (float(r[0]), float(r[1]))
        for r in aspect_ratios
    )
    if not ratios or not all(x > 0 for r in ratios for x in (r if isinstance(r, tuple) else (r,))):
        raise ValueError(f"aspect_ratios must be positive and not empty, got {aspect_ratios}")
    # while a graph is traced tensors are not real: they must not get into the cache
    make = _anchors.__wrapped__ if torch.compiler.is_compiling() else _anchors
    # a tensor made in inference mode could never again be used where gradients are recorded
    with torch.inference_mode(False):
        return make(
            (int(height), int(width)),
            min_level,
            max_level,
            num_scales,
            ratios,
            float(anchor_scale),
            torch.device(device),
            dtype,
        ).clone()  # the caller may write to it


def model_anchors(
    config: ModelConfig,
    image_size: tuple[int, int] | None = None,
    *,
    device: torch.device | str = "cpu",
) -> Tensor:
    """:func:`generate_anchors` of a model, for its own image size unless another is given."""
    return generate_anchors(
        config.image_size if image_size is None else image_size,
        min_level=config.min_level,
        max_level=config.max_level,
        num_scales=config.num_scales,
        aspect_ratios=config.aspect_ratios,
        anchor_scale=config.anchor_scale,
        device=device,
    )


def _centres(boxes: Tensor) -> tuple[Tensor, Tensor]:
    """Centres and sizes, (…, 2) each, of (…, 4) boxes."""
    low, high = boxes.split(2, -1)
    return (low + high) / 2, high - low


def decode_boxes(regression: Tensor, anchors: Tensor) -> Tensor:
    """Boxes from regressions: centre = t·size + centre, size = exp(t)·size of the anchor.

    Computed in float32 at least: exp overflows half precision. Nothing is clamped, as in the
    published models, so a regression above 88 gives an infinite box.

    Args:
        regression: (…, 4) ty, tx, th, tw in any float dtype.
        anchors: (…, 4) y1, x1, y2, x2, broadcast against ``regression``.

    Returns:
        (…, 4) y1, x1, y2, x2, float32 (float64 when an argument is).
    """
    dtype = torch.promote_types(torch.promote_types(regression.dtype, anchors.dtype), torch.float32)
    shift, scale = regression.to(dtype).split(2, -1)
    centre, size = _centres(anchors.to(dtype))
    centre = shift * size + centre
    half = scale.exp() * size / 2
    return torch.cat([centre - half, centre + half], -1)


def encode_boxes(boxes: Tensor, anchors: Tensor) -> Tensor:
    """Inverse of :func:`decode_boxes`: the regressions that turn ``anchors`` into ``boxes``.

    Args:
        boxes: (…, 4) y1, x1, y2, x2.
        anchors: (…, 4) y1, x1, y2, x2, broadcast against ``boxes``.

    Returns:
        (…, 4) ty, tx, th, tw. Sizes have 1e-8 added, so an empty box gives a finite regression.
    """
    centre, size = _centres(boxes)
    anchor_centre, anchor_size = _centres(anchors)
    size, anchor_size = size + _EPSILON, anchor_size + _EPSILON
    return torch.cat([(centre - anchor_centre) / anchor_size, (size / anchor_size).log()], -1)
