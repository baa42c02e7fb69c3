"""training_node in Triton, forward and backward: nodes in front of their batch norm.

The forward is one launch for each node's fusion, unless its map goes in as it is, one for the
convolution of all nodes, whose epilogue leaves the moments of each tile behind, and one that merges
them. The backward fuses again; it keeps nothing but what the operator was given and gave.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..names import ACTIVATIONS, FUSIONS
from . import configs
from .device import find_level, load_channels, select, tile_offsets
from .host import cdiv, channels_last, empty_map, first_tiles, launch, pixel_count, tile_width
from .separable_conv import Moments, convolve, separable_conv_backward
from .weighted_fusion import normalised_fusion, normalised_fusion_backward

_SUM, _NONE = FUSIONS.index("sum"), ACTIVATIONS.index("none")


@triton.jit(do_not_specialize=["first", "pixels"])
def merge_moments(
    mean,
    m2,
    moments,
    first,
    pixels,
    C_OUT: tl.constexpr,
    TILE: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """``mean`` and sum of squared deviations, (levels, C_OUT), from those of tiles of TILE pixels.

    Level l has the tiles first[l] up to first[l + 1].
    """
    level = tl.program_id(0)
    channel = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    begin, count = select(level, first), select(level, pixels)
    end = select(level + 1, first)
    total = tl.zeros([BLOCK_N], tl.float64)
    for start in range(begin, end, BLOCK_T):
        tile = start + tl.arange(0, BLOCK_T)
        size = tl.minimum(count - (tile - begin) * TILE, TILE).to(tl.float64)
        mask = (tile < end)[:, None] & (channel < C_OUT)[None, :]
        row = moments + tile_offsets(2 * tile, channel, C_OUT)
        total += tl.sum(tl.load(row, mask=mask, other=0.0).to(tl.float64) * size[:, None], axis=0)
    average = total / tl.maximum(count, 1).to(tl.float64)
    squares = tl.zeros([BLOCK_N], tl.float64)
    for start in range(begin, end, BLOCK_T):
        tile = start + tl.arange(0, BLOCK_T)
        size = tl.minimum(count - (tile - begin) * TILE, TILE).to(tl.float64)
        mask = (tile < end)[:, None] & (channel < C_OUT)[None, :]
        row = moments + tile_offsets(2 * tile, channel, C_OUT)
        step = tl.load(row, mask=mask, other=0.0).to(tl.float64) - average[None, :]
        own = tl.load(row + C_OUT, mask=mask, other=0.0).to(tl.float64)
        squares += tl.sum(tl.where(mask, own + step * step * size[:, None], 0.0), axis=0)
    tl.store(mean + level * C_OUT + channel, average.to(tl.float32), mask=channel < C_OUT)
    tl.store(m2 + level * C_OUT + channel, squares.to(tl.float32), mask=channel < C_OUT)


@triton.jit(do_not_specialize=["first", "pixels"])
def add_statistics_gradient(
    sums,
    grads,
    outs,
    mean,
    grad_mean,
    grad_m2,
    first,
    pixels,
    C: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """``sums``: the gradients of maps and, through their statistics, (levels, C), of ``outs``."""
    tile = tl.program_id(0)
    level = find_level(tile, first)
    count = select(level, pixels)
    pixel = (tile - select(level, first)) * BLOCK_P + tl.arange(0, BLOCK_P)
    channel = tl.program_id(1) * BLOCK_K + tl.arange(0, BLOCK_K)
    here = tile_offsets(pixel, channel, C)
    mask = (pixel < count)[:, None] & (channel < C)[None, :]
    d = tl.load(select(level, grads) + here, mask=mask, other=0.0).to(tl.float32)
    value = tl.load(select(level, outs) + here, mask=mask, other=0.0).to(tl.float32)
    slope = 2.0 * load_channels(grad_m2, level, channel, C)
    d += slope * (value - load_channels(mean, level, channel, C))
    d += load_channels(grad_mean, level, channel, C) / count
    out = select(level, sums)
    tl.store(out + here, d.to(out.dtype.element_ty), mask=mask)


def _statistics(moments: Moments, c_out: int) -> tuple[Tensor, Tensor]:
    """Mean and sum of squared deviations of each level, (levels, c_out)."""
    levels = len(moments.pixels)
    mean, m2 = (moments.tiles.new_empty((levels, c_out)) for _ in range(2))
    block = tile_width(c_out, 64)
    launch(
        merge_moments,
        (levels, cdiv(c_out, block)),
        mean,
        m2,
        moments.tiles,
        moments.first,
        moments.pixels,
        C_OUT=c_out,
        TILE=moments.block,
        BLOCK_T=32,
        BLOCK_N=block,
        num_warps=4,
    )
    return mean, m2


def _through_statistics(
    grads: tuple[Tensor, ...],
    grad_mean: Tensor,
    grad_m2: Tensor,
    outputs: Sequence[Tensor],
    mean: Tensor,
) -> tuple[Tensor, ...]:
    """Gradients of the outputs, the part in that flows back through their statistics."""
    outs = tuple(channels_last(x) for x in outputs)
    n, c = outs[0].shape[:2]
    pixels = tuple(pixel_count(n, *x.shape[-2:]) for x in outs)
    sums = tuple(empty_map(x, *x.shape[1:]) for x in outs)
    config = configs.find("weighted_fusion_backward", outs[0], c, sum(pixels))
    config["BLOCK_K"] = tile_width(c, config["BLOCK_K"])
    first, total = first_tiles([cdiv(count, config["BLOCK_P"]) for count in pixels])
    launch(
        add_statistics_gradient,
        (total, cdiv(c, config["BLOCK_K"])),
        sums,
        grads,
        outs,
        mean.contiguous(),
        grad_mean.contiguous(),
        grad_m2.contiguous(),
        first,
        pixels,
        C=c,
        **config,
    )
    return sums


def _nodes(edge_counts: Sequence[int], sizes: Sequence[int]) -> Iterator[tuple[slice, list[int]]]:
    """Of each node the inputs that it fuses, and its size."""
    first = 0
    for i, count in enumerate(edge_counts):
        yield slice(first, first + count), list(sizes[2 * i : 2 * i + 2])
        first += count


def _rows(norm: Tensor | None, own: slice) -> Tensor | None:
    return None if norm is None else norm[own]


def _fuse(
    inputs: Sequence[Tensor],
    scales: Tensor | None,
    offsets: Tensor | None,
    edge_weights: Tensor | None,
    edge_counts: Sequence[int],
    sizes: Sequence[int],
    fusion: int,
    pool: int,
    activation: int,
) -> tuple[Tensor, ...]:
    """The activated fusion of each node, channels_last."""
    fused = []
    for own, size in _nodes(edge_counts, sizes):
        maps = inputs[own]
        plain = scales is None and fusion == _SUM and activation == _NONE
        if plain and len(maps) == 1 and list(maps[0].shape[-2:]) == size:
            fused.append(channels_last(maps[0]))
            continue
        fused.append(
            normalised_fusion(
                maps, _rows(scales, own), _rows(offsets, own), edge_weights, size, fusion, pool,
                activation,
            )
        )  # fmt: skip
    return tuple(fused)


def training_node(
    inputs: Sequence[Tensor],
    scales: Tensor | None,
    offsets: Tensor | None,
    edge_weights: Tensor | None,
    dw_weight: Tensor,
    pw_weight: Tensor,
    shift: Tensor,
    edge_counts: Sequence[int],
    sizes: Sequence[int],
    fusion: int,
    pool: int,
    activation: int,
    statistics: bool,
) -> list[Tensor]:
    """The operator ``training_node``; see :func:`edet_kernels.training_node`."""
    fused = _fuse(
        inputs, scales, offsets, edge_weights, edge_counts, sizes, fusion, pool, activation
    )
    shifts = shift.expand(len(fused), -1).contiguous()
    maps, moments = convolve(
        fused, (), dw_weight.contiguous(), pw_weight.contiguous(), torch.ones_like(shifts), shifts,
        _NONE, statistics,
    )  # fmt: skip
    if not statistics:
        return [*maps, *(shifts.new_empty((0, shift.shape[0])) for _ in range(2))]
    return [*maps, *_statistics(moments, shift.shape[0])]


def training_node_backward(
    grads: Sequence[Tensor],
    grad_mean: Tensor,
    grad_m2: Tensor,
    outputs: Sequence[Tensor],
    mean: Tensor | None,
    inputs: Sequence[Tensor],
    scales: Tensor | None,
    offsets: Tensor | None,
    edge_weights: Tensor | None,
    dw_weight: Tensor,
    pw_weight: Tensor,
    shift: Tensor,
    edge_counts: Sequence[int],
    sizes: Sequence[int],
    fusion: int,
    pool: int,
    activation: int,
) -> list[Tensor]:
    """Gradients of :func:`training_node`.

    Args:
        grads, grad_mean, grad_m2: of its results.
        outputs, mean: its maps and their mean; none without statistics.
        inputs, …, activation: those of the forward.

    Returns:
        The gradients of the inputs, channels_last in their dtype, and in float32 those of scales,
        offsets and edge_weights (empty for none), dw_weight (9, C), pw_weight (⌈C_out/16⌉, C, 16;
        its padding 0) and shift (C_out,).
    """
    out_grads = tuple(channels_last(g) for g in grads)
    if mean is not None:
        out_grads = _through_statistics(out_grads, grad_mean, grad_m2, outputs, mean)
    fused = _fuse(
        inputs, scales, offsets, edge_weights, edge_counts, sizes, fusion, pool, activation
    )
    shifts = shift.expand(len(fused), -1)
    *d_fused, d_dw, d_pw, _, d_shifts = separable_conv_backward(
        out_grads, fused, dw_weight, pw_weight, torch.ones_like(shifts), shifts, _NONE
    )
    d_inputs: list[Tensor] = []
    d_scales: list[Tensor] = []
    d_offsets: list[Tensor] = []
    for (own, size), d in zip(_nodes(edge_counts, sizes), d_fused, strict=True):
        d_maps, d_edges, d_scale, d_offset = normalised_fusion_backward(
            d, inputs[own], _rows(scales, own), _rows(offsets, own), edge_weights, size, fusion,
            pool, activation,
        )  # fmt: skip
        d_inputs += d_maps
        d_scales.append(d_scale)
        d_offsets.append(d_offset)
    # where there are edge weights, there is one node
    return [
        *d_inputs, torch.cat(d_scales), torch.cat(d_offsets), d_edges, d_dw, d_pw, d_shifts.sum(0)
    ]  # fmt: skip
