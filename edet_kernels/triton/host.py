"""What the Triton ops share on the host: memory layouts, resize geometry and the launch itself."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ..packing import PANEL
from ..reference import pool_geometry
from .device import NEAREST, NONE, POOL

_MOST_PIXELS = 2**31 - 2**16  # a tile may begin before the end and go beyond it


def cdiv(a: int, b: int) -> int:
    """a / b, rounded up."""
    return -(-a // b)


def tile_width(channels: int, most: int) -> int:
    """The power of two that covers ``channels``, at least 16 and at most ``most``."""
    return max(16, min(most, 1 << (channels - 1).bit_length()))


def channels_last(x: Tensor) -> Tensor:
    """``x`` itself or a copy, its memory (N, H, W, C)."""
    return x.contiguous(memory_format=torch.channels_last)


def empty_map(like: Tensor, channels: int, height: int, width: int) -> Tensor:
    """A new map (N, channels, height, width), channels_last, with dtype and device of ``like``."""
    shape = (like.shape[0], channels, height, width)
    return torch.empty(
        shape, dtype=like.dtype, device=like.device, memory_format=torch.channels_last
    )


def pixel_count(batch: int, height: int, width: int) -> int:
    """Pixels of a batch of maps.

    Raises:
        ValueError: more than a 32-bit index can number.
    """
    count = batch * height * width
    if count > _MOST_PIXELS:
        raise ValueError(
            f"inputs must have at most {_MOST_PIXELS} pixels in a batch for the Triton kernels, "
            f"got {batch} maps of {(height, width)}"
        )
    return count


def geometry(in_size: Sequence[int], size: Sequence[int], pool: str) -> tuple[int, ...]:
    """How a map of ``in_size`` is brought to ``size``, as the kernels read it when compiling.

    (NONE,); (NEAREST, row factor, column factor), factors 0 when not whole; or (POOL, kernel,
    stride, padding before, of the rows and then of the columns).
    """
    if tuple(in_size) == tuple(size):
        return (NONE.value,)
    if in_size[0] <= size[0] and in_size[1] <= size[1]:
        factors = [out // n if out % n == 0 else 0 for n, out in zip(in_size, size, strict=True)]
        return (NEAREST.value, *(factors if all(factors) else (0, 0)))
    axes = [pool_geometry(n, out, pool) for n, out in zip(in_size, size, strict=True)]
    return (POOL.value, *axes[0], *axes[1])


def geometries(maps: Sequence[Tensor], size: Sequence[int], pool: str) -> tuple[Any, ...]:
    """:func:`geometry` of each of ``maps``."""
    return tuple(geometry(x.shape[-2:], size, pool) for x in maps)


def extents(maps: Sequence[Tensor]) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Heights and widths of ``maps``, none of them too large."""
    for x in maps:
        pixel_count(x.shape[0], *x.shape[-2:])
    return tuple(x.shape[-2] for x in maps), tuple(x.shape[-1] for x in maps)


def first_tiles(counts: Sequence[int]) -> tuple[tuple[int, ...], int]:
    """The first tile of each level and the number of all, for levels of ``counts`` tiles."""
    starts, total = [], 0
    for count in counts:
        starts.append(total)
        total += count
    return tuple(starts), total


def panels(channels: int) -> int:
    """Panels of a packed pointwise weight with ``channels`` outputs."""
    return cdiv(channels, PANEL)


def launch(kernel: Any, grid: tuple[int, ...], *args: Any, num_warps: int, num_stages: int = 1,
           **constants: Any) -> None:  # fmt: skip
    """Runs ``kernel``, unless its grid is empty, on its result's device and current stream.

    The result is the first of ``args``, a map or a tuple of maps.
    """
    if math.prod(grid) == 0:
        return
    device = (args[0] if isinstance(args[0], Tensor) else args[0][0]).device
    # enable_fp_fusion: a·b + c in one rounding, which newer Tritons do only when asked to
    options = {"num_warps": num_warps, "num_stages": num_stages, "enable_fp_fusion": True}
    with torch.cuda.device(device) if device.type == "cuda" else contextlib.nullcontext():
        kernel[grid](*args, **constants, **options)
