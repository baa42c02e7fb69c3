"""The backward of a pointwise convolution with batch norm, which separable_conv and lateral share.

y = scale · (x·W) + shift, with x the depthwise sums or a map. With M = xᵀ·dy, a product over all
pixels, dW = M · scale, d_scale = Σ_k W·M and d_shift = Σ dy: the product x·W is not needed again.
M is computed by a fixed number of programs for each tile, each over its own pixels, and their parts
are added in order afterwards, so that results do not depend on the order of programs.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..packing import PANEL
from . import configs
from .device import (
    depthwise,
    dot,
    find_level,
    load_pointwise,
    select,
    tile_offsets,
)
from .host import cdiv, extents, first_tiles, launch, panels, pixel_count, tile_width

_PANEL = tl.constexpr(PANEL)


@triton.jit
def add_input_gradient(
    acc,
    grad,
    pixel,
    inside,
    channel,
    pw,
    scale,
    C: tl.constexpr,
    C_OUT: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """acc + (grad · scale)·Wᵀ for a tile [pixels, channels]."""
    dtype: tl.constexpr = grad.dtype.element_ty
    for first in range(0, C_OUT, BLOCK_N):
        out_channel = first + tl.arange(0, BLOCK_N)
        mask = inside[:, None] & (out_channel < C_OUT)[None, :]
        d = tl.load(grad + tile_offsets(pixel, out_channel, C_OUT), mask=mask, other=0.0)
        s = tl.load(scale + out_channel, mask=out_channel < C_OUT, other=0.0)
        weight = load_pointwise(pw, channel, out_channel, C, C_OUT)
        acc = dot(d.to(tl.float32) * s[None, :], tl.trans(weight), acc, dtype)
    return acc


@triton.jit(do_not_specialize=["first", "pixels"])
def backward_input(
    grads,
    out_grads,
    pw,
    scale,
    first,
    pixels,
    C: tl.constexpr,
    C_OUT: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """The gradient of the pointwise product's input, for all levels; ``scale`` (levels, C_OUT)."""
    tile = tl.program_id(0)
    level = find_level(tile, first)
    pixel = (tile - select(level, first)) * BLOCK_P + tl.arange(0, BLOCK_P)
    inside = pixel < select(level, pixels)
    channel = tl.program_id(1) * BLOCK_K + tl.arange(0, BLOCK_K)
    grad = select(level, grads)
    acc = tl.zeros([BLOCK_P, BLOCK_K], tl.float32)
    acc = add_input_gradient(
        acc, select(level, out_grads), pixel, inside, channel,
        pw, scale + level * C_OUT, C, C_OUT, BLOCK_N,
    )  # fmt: skip
    mask = inside[:, None] & (channel < C)[None, :]
    tl.store(grad + tile_offsets(pixel, channel, C), acc.to(grad.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=["heights", "widths", "first", "pixels", "strides"])
def backward_weight_sums(
    products,
    shift_sums,
    maps,
    out_grads,
    dw,
    heights,
    widths,
    first,
    pixels,
    strides,
    C: tl.constexpr,
    C_OUT: tl.constexpr,
    DEPTHWISE: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """``products`` (parts, C, C_OUT): xᵀ·dy over the pixels of a part; ``shift_sums``: those of dy.

    Part ``first[level] + i`` takes every ``strides[level]``-th pixel from tile i of its level on.
    """
    part = tl.program_id(0)
    level = find_level(part, first)
    map, grad = select(level, maps), select(level, out_grads)
    h, w = select(level, heights), select(level, widths)
    count, stride = select(level, pixels), select(level, strides)
    channel = tl.program_id(1) * BLOCK_K + tl.arange(0, BLOCK_K)
    out_channel = tl.program_id(2) * BLOCK_N + tl.arange(0, BLOCK_N)
    dtype: tl.constexpr = maps[0].dtype.element_ty
    acc = tl.zeros([BLOCK_K, BLOCK_N], tl.float32)
    shift_sum = tl.zeros([BLOCK_N], tl.float32)
    for start in range((part - select(level, first)) * BLOCK_P, count, stride):
        pixel = start + tl.arange(0, BLOCK_P)
        inside = pixel < count
        if DEPTHWISE:
            value = depthwise(map, pixel, inside, channel, dw, h, w, C)
        else:
            mask = inside[:, None] & (channel < C)[None, :]
            value = tl.load(map + tile_offsets(pixel, channel, C), mask=mask, other=0.0)
        mask = inside[:, None] & (out_channel < C_OUT)[None, :]
        d = tl.load(grad + tile_offsets(pixel, out_channel, C_OUT), mask=mask, other=0.0)
        acc = dot(tl.trans(value.to(dtype)), d, acc, dtype)
        shift_sum += tl.sum(d.to(tl.float32), axis=0)
    rows = part.to(tl.int64) * C + channel
    mask = (channel < C)[:, None] & (out_channel < C_OUT)[None, :]
    tl.store(products + rows[:, None] * C_OUT + out_channel[None, :], acc, mask=mask)
    if tl.program_id(1) == 0:
        tl.store(shift_sums + part * C_OUT + out_channel, shift_sum, mask=out_channel < C_OUT)


@triton.jit(do_not_specialize=["first"])
def backward_weight(
    grad,
    scale_sums,
    products,
    pw,
    scale,
    first,
    C: tl.constexpr,
    C_OUT: tl.constexpr,
    LEVELS: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """``grad``, packed, from ``products``; ``scale_sums`` (levels, blocks of channels, C_OUT).

    Level l has the parts first[l] up to first[l + 1].
    """
    panel = tl.program_id(0)
    channel = tl.program_id(1) * BLOCK_K + tl.arange(0, BLOCK_K)
    out_channel = panel * _PANEL + tl.arange(0, _PANEL)
    mask = (channel < C)[:, None] & (out_channel < C_OUT)[None, :]
    weight = load_pointwise(pw, channel, out_channel, C, C_OUT)
    total = tl.zeros([BLOCK_K, _PANEL], tl.float32)
    for level in tl.static_range(LEVELS):
        product = tl.zeros([BLOCK_K, _PANEL], tl.float32)
        for part in range(first[level], first[level + 1]):
            offsets = (part * C + channel)[:, None] * C_OUT + out_channel[None, :]
            product += tl.load(products + offsets, mask=mask, other=0.0)
        s = tl.load(scale + level * C_OUT + out_channel, mask=out_channel < C_OUT, other=0.0)
        total += product * s[None, :]
        row = level * tl.num_programs(1) + tl.program_id(1)
        d_scale = tl.sum(weight * product, axis=0)
        tl.store(scale_sums + row * C_OUT + out_channel, d_scale, mask=out_channel < C_OUT)
    offsets = (panel * C + channel)[:, None] * _PANEL + tl.arange(0, _PANEL)[None, :]
    tl.store(grad + offsets, total, mask=(channel < C)[:, None])


def weight_gradients(
    maps: tuple[Tensor, ...],
    out_grads: tuple[Tensor, ...],
    dw: Tensor | None,
    pw: Tensor,
    scale: Tensor,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of a packed pointwise weight, its scale and its shift.

    Args:
        maps: (N, C, H_l, W_l) channels_last: what the pointwise product, or before it the depthwise
            convolution with ``dw`` (9, C), was applied to.
        out_grads: (N, C_out, H_l, W_l) channels_last, of scale · product + shift.
        pw: (⌈C_out/16⌉, C, 16).
        scale: (levels, C_out).
    """
    levels, c_out = scale.shape
    n, c = maps[0].shape[:2]
    pixels = tuple(pixel_count(n, *x.shape[-2:]) for x in maps)
    config = configs.find("weight_backward", maps[0], c, sum(pixels))
    splits = config.pop("splits")
    block_k, block_n = tile_width(c, config["BLOCK_K"]), tile_width(c_out, config["BLOCK_N"])
    config.update(BLOCK_K=block_k, BLOCK_N=block_n)
    tiles = [cdiv(count, config["BLOCK_P"]) for count in pixels]
    # parts in proportion to the pixels of a level, and at least one where there are any
    parts = [min(t, cdiv(t * splits, max(1, sum(tiles)))) for t in tiles]
    first, total = first_tiles(parts)
    products = scale.new_empty((total, c, c_out))
    shift_sums = scale.new_empty((total, c_out))
    launch(
        backward_weight_sums,
        (total, cdiv(c, block_k), cdiv(c_out, block_n)),
        products,
        shift_sums,
        maps,
        out_grads,
        dw,
        *extents(maps),
        first,
        pixels,
        tuple(count * config["BLOCK_P"] for count in parts),
        C=c,
        C_OUT=c_out,
        DEPTHWISE=dw is not None,
        **config,
    )
    grad = torch.empty_like(pw)
    block = tile_width(c, 64)
    scale_sums = scale.new_empty((levels, cdiv(c, block), c_out))
    launch(
        backward_weight,
        (panels(c_out), cdiv(c, block)),
        grad,
        scale_sums,
        products,
        pw,
        scale,
        (*first, total),
        C=c,
        C_OUT=c_out,
        LEVELS=levels,
        BLOCK_K=block,
        num_warps=4,
    )
    shifts = [part.sum(0) for part in shift_sums.split(parts)]
    return grad, scale_sums.sum(1), torch.stack(shifts)


def input_gradients(
    out_grads: tuple[Tensor, ...], grads: tuple[Tensor, ...], pw: Tensor, scale: Tensor
) -> None:
    """Writes (out_grads · scale)·Wᵀ, a map (N, C, H_l, W_l) for each level, to ``grads``."""
    (n, c), c_out = grads[0].shape[:2], scale.shape[1]
    pixels = tuple(pixel_count(n, *x.shape[-2:]) for x in grads)
    config = configs.find("pointwise_backward", grads[0], c, sum(pixels))
    config["BLOCK_K"] = tile_width(c, config["BLOCK_K"])
    config["BLOCK_N"] = tile_width(c_out, config["BLOCK_N"])
    first, total = first_tiles([cdiv(count, config["BLOCK_P"]) for count in pixels])
    launch(
        backward_input,
        (total, cdiv(c, config["BLOCK_K"])),
        grads,
        out_grads,
        pw,
        scale,
        first,
        pixels,
        C=c,
        C_OUT=c_out,
        **config,
    )
