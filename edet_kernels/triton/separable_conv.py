"""separable_conv in Triton, forward and backward: all pyramid levels in one launch.

Floor of the forward: each input and output once through memory, 2·C·(9 + C_out) operations a pixel.
A program owns a tile of pixels of one level × output channels: for each block of input channels it
makes the depthwise sums, whose nine loads of a pixel meet in the L1 cache, and multiplies them.
Output channels beyond one tile repeat the depthwise sums, 9 of 9 + BLOCK_N operations.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import triton
import triton.language as tl
from torch import Tensor

from . import configs
from .device import (
    activate,
    activation_gradient,
    affine,
    depthwise,
    dot,
    find_level,
    load_pointwise,
    load_tap,
    neighbour,
    select,
    split_pixel,
    tile_offsets,
)
from .host import (
    cdiv,
    channels_last,
    empty_map,
    extents,
    first_tiles,
    launch,
    pixel_count,
    tile_width,
)
from .pointwise import input_gradients, weight_gradients


@triton.jit(do_not_specialize=["heights", "widths", "first", "pixels"])
def forward(
    outs,
    maps,
    out_grads,
    moments,
    dw,
    pw,
    scale,
    shift,
    heights,
    widths,
    first,
    pixels,
    C: tl.constexpr,
    C_OUT: tl.constexpr,
    ACTIVATION: tl.constexpr,
    BACKWARD: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """``outs``: the convolution, or if BACKWARD the gradient before its activation.

    ``moments`` (tiles, 2, C_OUT), where given, receives of each tile the mean of the convolution
    and the sum of squared deviations from it.
    """
    tile = tl.program_id(0)
    level = find_level(tile, first)
    map, out = select(level, maps), select(level, outs)
    h, w = select(level, heights), select(level, widths)
    pixel = (tile - select(level, first)) * BLOCK_P + tl.arange(0, BLOCK_P)
    inside = pixel < select(level, pixels)
    out_channel = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    dtype: tl.constexpr = maps[0].dtype.element_ty
    acc = tl.zeros([BLOCK_P, BLOCK_N], tl.float32)
    for k in range(0, C, BLOCK_K):
        channel = k + tl.arange(0, BLOCK_K)
        sums = depthwise(map, pixel, inside, channel, dw, h, w, C)
        acc = dot(sums, load_pointwise(pw, channel, out_channel, C, C_OUT), acc, dtype)
    value = affine(acc, out_channel, scale + level * C_OUT, shift + level * C_OUT, C_OUT)
    offsets = tile_offsets(pixel, out_channel, C_OUT)
    mask = inside[:, None] & (out_channel < C_OUT)[None, :]
    if BACKWARD:
        grad = tl.load(select(level, out_grads) + offsets, mask=mask, other=0.0).to(tl.float32)
        value = activation_gradient(value, grad, ACTIVATION)
    else:
        value = activate(value, ACTIVATION)
    value = value.to(dtype)
    tl.store(out + offsets, value, mask=mask)
    if moments is not None:
        count = tl.sum(inside.to(tl.float32), axis=0)
        value = tl.where(mask, value.to(tl.float32), 0.0)
        mean = tl.sum(value, axis=0) / count
        deviation = tl.where(mask, value - mean[None, :], 0.0)
        row = moments + tile.to(tl.int64) * (2 * C_OUT) + out_channel
        tl.store(row, mean, mask=out_channel < C_OUT)
        tl.store(row + C_OUT, tl.sum(deviation * deviation, axis=0), mask=out_channel < C_OUT)


@triton.jit(do_not_specialize=["heights", "widths", "first", "pixels"])
def backward_depthwise(
    grads,
    weight_sums,
    maps,
    sum_grads,
    dw,
    heights,
    widths,
    first,
    pixels,
    C: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """From ``sum_grads``, of the depthwise sums: ``grads`` of the maps, and ``weight_sums``
    (tiles, 9, C), the part of each tile in the gradient of ``dw``."""
    tile = tl.program_id(0)
    level = find_level(tile, first)
    h, w = select(level, heights), select(level, widths)
    pixel = (tile - select(level, first)) * BLOCK_P + tl.arange(0, BLOCK_P)
    inside = pixel < select(level, pixels)
    _, y, x = split_pixel(pixel, h, w)
    channel = tl.program_id(1) * BLOCK_K + tl.arange(0, BLOCK_K)
    here = tile_offsets(pixel, channel, C)
    mask = inside[:, None] & (channel < C)[None, :]
    grad, sum_grad = select(level, grads), select(level, sum_grads)
    value = tl.load(select(level, maps) + here, mask=mask, other=0.0).to(tl.float32)
    total = tl.zeros([BLOCK_P, BLOCK_K], tl.float32)
    for dy in range(-1, 2):
        for dx in tl.static_range(-1, 2):
            # the output pixel that reads this one at the tap (dy, dx)
            row, valid = neighbour(pixel, y, x, h, w, -dy, -dx)
            reads = (inside & valid)[:, None] & (channel < C)[None, :]
            d = tl.load(sum_grad + tile_offsets(row, channel, C), mask=reads, other=0.0)
            d = d.to(tl.float32)
            total += d * load_tap(dw, dy, dx, channel, C)[None, :]
            part = (tile * 9 + dy * 3 + dx + 4).to(tl.int64) * C + channel
            tl.store(weight_sums + part, tl.sum(d * value, axis=0), mask=channel < C)
    tl.store(grad + here, total.to(grad.dtype.element_ty), mask=mask)


class Moments(NamedTuple):
    """What a convolution's tiles say of its values, for the statistics of batch norms.

    Attributes:
        tiles: (tiles, 2, C_out), of each tile the mean and the sum of squared deviations from it.
        first: the first tile of each level, and the number of all.
        pixels: of each level.
        block: pixels of a tile; the last one of a level may have fewer.
    """

    tiles: Tensor
    first: tuple[int, ...]
    pixels: tuple[int, ...]
    block: int


def convolve(
    maps: tuple[Tensor, ...],
    out_grads: tuple[Tensor, ...],
    dw_weight: Tensor,
    pw_weight: Tensor,
    scale: Tensor,
    shift: Tensor,
    activation: int,
    statistics: bool = False,
) -> tuple[list[Tensor], Moments]:
    """The forward or, given ``out_grads``, the gradient before its activation.

    Its arguments are contiguous. The moments are computed with ``statistics`` only.
    """
    (n, c), c_out = maps[0].shape[:2], scale.shape[1]
    outs = tuple(empty_map(x, c_out, *x.shape[-2:]) for x in maps)
    pixels = tuple(pixel_count(n, *x.shape[-2:]) for x in maps)
    config = configs.find("separable_conv", maps[0], c, sum(pixels))
    config["BLOCK_K"] = tile_width(c, config["BLOCK_K"])
    config["BLOCK_N"] = tile_width(c_out, config["BLOCK_N"])
    first, total = first_tiles([cdiv(count, config["BLOCK_P"]) for count in pixels])
    moments = scale.new_empty((total if statistics else 0, 2, c_out))
    launch(
        forward,
        (total, cdiv(c_out, config["BLOCK_N"])),
        outs,
        maps,
        out_grads,
        moments if statistics else None,
        dw_weight,
        pw_weight,
        scale,
        shift,
        *extents(maps),
        first,
        pixels,
        C=c,
        C_OUT=c_out,
        ACTIVATION=activation,
        BACKWARD=bool(out_grads),
        **config,
    )
    return list(outs), Moments(moments, (*first, total), pixels, config["BLOCK_P"])


def separable_conv(
    inputs: Sequence[Tensor],
    dw_weight: Tensor,
    pw_weight: Tensor,
    scale: Tensor,
    shift: Tensor,
    activation: int,
) -> list[Tensor]:
    """The operator ``separable_conv``; see :func:`edet_kernels.separable_conv`."""
    maps = tuple(channels_last(x) for x in inputs)
    dw, pw, scale, shift = (t.contiguous() for t in (dw_weight, pw_weight, scale, shift))
    return convolve(maps, (), dw, pw, scale, shift, activation)[0]


def separable_conv_backward(
    grads: Sequence[Tensor],
    inputs: Sequence[Tensor],
    dw_weight: Tensor,
    pw_weight: Tensor,
    scale: Tensor,
    shift: Tensor,
    activation: int,
) -> list[Tensor]:
    """Gradients of :func:`separable_conv`.

    Args:
        grads: (N, C_out, H_l, W_l) for each level, of the results.
        inputs, dw_weight, pw_weight, scale, shift, activation: those of the forward.

    Returns:
        The gradients of the inputs, channels_last in their dtype, and in float32 those of
        dw_weight (9, C), pw_weight (⌈C_out/16⌉, C, 16; its padding 0), scale and shift
        (levels, C_out).
    """
    maps = tuple(channels_last(x) for x in inputs)
    dw, pw, scale, shift = (t.contiguous() for t in (dw_weight, pw_weight, scale, shift))
    out_grads = tuple(channels_last(g) for g in grads)
    if activation:
        out_grads = tuple(convolve(maps, out_grads, dw, pw, scale, shift, activation)[0])
    d_pw, d_scale, d_shift = weight_gradients(maps, out_grads, dw, pw, scale)
    sum_grads = tuple(empty_map(x, *x.shape[1:]) for x in maps)
    input_gradients(out_grads, sum_grads, pw, scale)

    n, c = maps[0].shape[:2]
    pixels = tuple(pixel_count(n, *x.shape[-2:]) for x in maps)
    config = configs.find("depthwise_backward", maps[0], c, sum(pixels))
    config["BLOCK_K"] = tile_width(c, config["BLOCK_K"])
    first, total = first_tiles([cdiv(count, config["BLOCK_P"]) for count in pixels])
    in_grads = tuple(empty_map(x, *x.shape[1:]) for x in maps)
    weight_sums = dw.new_empty((total, 9, c))
    launch(
        backward_depthwise,
        (total, cdiv(c, config["BLOCK_K"])),
        in_grads,
        weight_sums,
        maps,
        sum_grads,
        dw,
        *extents(maps),
        first,
        pixels,
        C=c,
        **config,
    )
    return [*in_grads, weight_sums.sum(0), d_pw, d_scale, d_shift]
