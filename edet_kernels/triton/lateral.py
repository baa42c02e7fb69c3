"""lateral in Triton, forward and backward: all projections of one map in one launch.

Floor of the forward: the map and the projections once through memory, 2·C·ΣC_out operations a
pixel. A program owns a tile of pixels × output channels of one projection; the programs of a tile
of pixels are neighbours, so that the map is read from memory once and then from the L2 cache.
Each pooled map is one more launch, of weighted_fusion.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import triton
import triton.language as tl
from torch import Tensor

from ..names import ACTIVATIONS, FUSIONS
from . import configs
from .device import affine, dot, find_level, load_pointwise, select, tile_offsets
from .host import cdiv, channels_last, empty_map, first_tiles, launch, pixel_count, tile_width
from .pointwise import add_input_gradient, weight_gradients
from .weighted_fusion import weighted_fusion, weighted_fusion_backward


@triton.jit(do_not_specialize=["pixels", "first", "units"])
def forward(
    outs,
    map,
    pws,
    scales,
    shifts,
    pixels,
    first,
    units,
    C: tl.constexpr,
    UNIT: tl.constexpr,
    TILES: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """Projection i has units[i] · UNIT output channels; its tiles start with first[i] of TILES."""
    tile = tl.program_id(0) % TILES
    i = find_level(tile, first)
    out, pw, c_out = select(i, outs), select(i, pws), select(i, units) * UNIT
    pixel = tl.program_id(0) // TILES * BLOCK_P + tl.arange(0, BLOCK_P)
    out_channel = (tile - select(i, first)) * BLOCK_N + tl.arange(0, BLOCK_N)
    inside = pixel < pixels
    dtype: tl.constexpr = map.dtype.element_ty
    acc = tl.zeros([BLOCK_P, BLOCK_N], tl.float32)
    for k in range(0, C, BLOCK_K):
        channel = k + tl.arange(0, BLOCK_K)
        mask = inside[:, None] & (channel < C)[None, :]
        value = tl.load(map + tile_offsets(pixel, channel, C), mask=mask, other=0.0)
        acc = dot(value, load_pointwise(pw, channel, out_channel, C, c_out), acc, dtype)
    value = affine(acc, out_channel, select(i, scales), select(i, shifts), c_out)
    mask = inside[:, None] & (out_channel < c_out)[None, :]
    tl.store(out + tile_offsets(pixel, out_channel, c_out), value.to(dtype), mask=mask)


@triton.jit(do_not_specialize=["pixels"])
def backward_input(
    grad,
    out_grads,
    pws,
    scales,
    pixels,
    C: tl.constexpr,
    C_OUTS: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """The gradient of the map: the sum of those of all projections."""
    pixel = tl.program_id(0) * BLOCK_P + tl.arange(0, BLOCK_P)
    channel = tl.program_id(1) * BLOCK_K + tl.arange(0, BLOCK_K)
    inside = pixel < pixels
    acc = tl.zeros([BLOCK_P, BLOCK_K], tl.float32)
    for i in tl.static_range(len(pws)):
        acc = add_input_gradient(
            acc, out_grads[i], pixel, inside, channel, pws[i], scales[i], C, C_OUTS[i], BLOCK_N
        )
    mask = inside[:, None] & (channel < C)[None, :]
    tl.store(grad + tile_offsets(pixel, channel, C), acc.to(grad.dtype.element_ty), mask=mask)


def _project(
    map: Tensor, pws: Sequence[Tensor], scales: Sequence[Tensor], shifts: Sequence[Tensor]
) -> list[Tensor]:
    """All projections of a channels_last map."""
    n, c, h, w = map.shape
    pixels = pixel_count(n, h, w)
    c_outs = [s.shape[0] for s in scales]
    outs = tuple(empty_map(map, c_out, h, w) for c_out in c_outs)
    config = configs.find("lateral", map, c, pixels)
    config["BLOCK_K"] = tile_width(c, config["BLOCK_K"])
    config["BLOCK_N"] = tile_width(max(c_outs), config["BLOCK_N"])
    first, total = first_tiles([cdiv(c_out, config["BLOCK_N"]) for c_out in c_outs])
    unit = math.gcd(16, *c_outs)  # tells the compiler how aligned a pixel's channels are
    launch(
        forward,
        (total * cdiv(pixels, config["BLOCK_P"]),),
        outs,
        map,
        tuple(t.contiguous() for t in pws),
        tuple(t.contiguous() for t in scales),
        tuple(t.contiguous() for t in shifts),
        pixels,
        first,
        tuple(c_out // unit for c_out in c_outs),
        C=c,
        UNIT=unit,
        TILES=total,
        **config,
    )
    return list(outs)


def _pool_arguments(map: Tensor, pool: int) -> tuple[object, ...]:
    """Arguments of a weighted_fusion that max-pools ``map`` with stride 2."""
    size = [cdiv(n, 2) for n in map.shape[-2:]]
    return [map], None, size, FUSIONS.index("sum"), pool, ACTIVATIONS.index("none")


def lateral(
    input: Tensor,
    pw_weights: Sequence[Tensor],
    scales: Sequence[Tensor],
    shifts: Sequence[Tensor],
    pooled: int,
    pool: int,
) -> list[Tensor]:
    """The operator ``lateral``; see :func:`edet_kernels.lateral`."""
    maps = _project(channels_last(input), pw_weights, scales, shifts)
    if pooled:
        map = maps.pop()
        for _ in range(pooled):
            map = weighted_fusion(*_pool_arguments(map, pool))  # type: ignore[arg-type]
            maps.append(map)
    return maps


def lateral_backward(
    grads: Sequence[Tensor],
    input: Tensor,
    pw_weights: Sequence[Tensor],
    scales: Sequence[Tensor],
    shifts: Sequence[Tensor],
    pooled: int,
    pool: int,
) -> list[Tensor]:
    """Gradients of :func:`lateral`.

    Args:
        grads: of the results: of each projection, the last one's in the form of ``pooled`` maps.
        input, pw_weights, scales, shifts, pooled, pool: those of the forward.

    Returns:
        The gradient of the input, channels_last in its dtype, and in float32 those of all
        pw_weights (⌈C_out/16⌉, C, 16; their padding 0), all scales and all shifts (C_out,).
    """
    map = channels_last(input)
    pws = tuple(t.contiguous() for t in pw_weights)
    wide_scales = tuple(t.contiguous() for t in scales)
    out_grads = [channels_last(g) for g in grads]
    if pooled:
        chain = _project(map, pws[-1:], scales[-1:], shifts[-1:])
        for _ in range(pooled - 1):
            arguments = _pool_arguments(chain[-1], pool)
            chain.append(weighted_fusion(*arguments))  # type: ignore[arg-type]
        grad = out_grads.pop()
        for i in range(pooled - 1, -1, -1):
            arguments = _pool_arguments(chain[i], pool)
            grad, _ = weighted_fusion_backward(grad, *arguments)  # type: ignore[arg-type]
            if i:
                grad = grad + out_grads.pop()
        out_grads.append(grad)

    weights = [
        weight_gradients((map,), (g,), None, pw, scale[None])
        for g, pw, scale in zip(out_grads, pws, wide_scales, strict=True)
    ]
    n, c, h, w = map.shape
    pixels = pixel_count(n, h, w)
    config = configs.find("pointwise_backward", map, c, pixels)
    config["BLOCK_K"] = tile_width(c, config["BLOCK_K"])
    config["BLOCK_N"] = tile_width(max(s.shape[0] for s in scales), config["BLOCK_N"])
    d_map = empty_map(map, c, h, w)
    launch(
        backward_input,
        (cdiv(pixels, config["BLOCK_P"]), cdiv(c, config["BLOCK_K"])),
        d_map,
        tuple(out_grads),
        pws,
        wide_scales,
        pixels,
        C=c,
        C_OUTS=tuple(s.shape[0] for s in scales),
        **config,
    )
    d_pws, d_scales, d_shifts = zip(*weights, strict=True)
    return [d_map, *d_pws, *(d[0] for d in d_scales), *(d[0] for d in d_shifts)]
