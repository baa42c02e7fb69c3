"""weighted_fusion in Triton, forward and backward.

Floor of the forward: each input and the output once through memory; there is next to no arithmetic.
Floor of the backward: the inputs and the gradient are read once, a gradient of each input written.
A program owns a tile of pixels × channels. Gradients are gathered, never scattered: an input pixel
looks up the outputs that read it, so that results do not depend on the order of programs.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..names import FUSIONS, POOLS
from ..reference import fusion_coefficients
from . import configs
from .device import (
    NONE,
    POOL,
    activate,
    activation_gradient,
    coefficient,
    edge_weight,
    fuse,
    load_channels,
    normaliser,
    pool_window,
    sample,
    split_pixel,
    tile_offsets,
)
from .host import (
    cdiv,
    channels_last,
    empty_map,
    extents,
    geometries,
    launch,
    pixel_count,
    tile_width,
)

_FAST, _SUM = (tl.constexpr(FUSIONS.index(name)) for name in ("fast", "sum"))


@triton.jit(do_not_specialize=["heights", "widths", "pixels", "h", "w"])
def forward(
    out,
    maps,
    heights,
    widths,
    scales,
    offsets,
    edge_weights,
    pixels,
    h,
    w,
    C: tl.constexpr,
    GEOMETRY: tl.constexpr,
    FUSION: tl.constexpr,
    PER_CHANNEL: tl.constexpr,
    ACTIVATION: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    pixel = tl.program_id(0) * BLOCK_P + tl.arange(0, BLOCK_P)
    channel = tl.program_id(1) * BLOCK_K + tl.arange(0, BLOCK_K)
    inside = pixel < pixels
    image, y, x = split_pixel(pixel, h, w)
    largest, total = normaliser(edge_weights, channel, len(maps), FUSION, C, PER_CHANNEL)
    fused = fuse(
        maps, heights, widths, scales, offsets, edge_weights, largest, total,
        image, y, x, inside, channel, h, w, GEOMETRY, FUSION, C, PER_CHANNEL,
    )  # fmt: skip
    value = activate(fused, ACTIVATION).to(out.dtype.element_ty)
    mask = inside[:, None] & (channel < C)[None, :]
    tl.store(out + tile_offsets(pixel, channel, C), value, mask=mask)


@triton.jit(do_not_specialize=["heights", "widths", "pixels", "h", "w"])
def backward_fused(
    grad,
    maps,
    grads,
    d_fused,
    edge_sums,
    heights,
    widths,
    scales,
    offsets,
    edge_weights,
    pixels,
    h,
    w,
    C: tl.constexpr,
    GEOMETRY: tl.constexpr,
    FUSION: tl.constexpr,
    PER_CHANNEL: tl.constexpr,
    ACTIVATION: tl.constexpr,
    KEEP: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """All gradients at the output's pixels.

    For an edge that is not resized ``grads[e]`` is its input's gradient; for a max-pooled one it
    receives the tap of each maximum. ``d_fused`` receives the gradient before the activation if
    KEEP; ``edge_sums`` (edges, tiles, C) the sums over a tile of it times the resized inputs and,
    with ``scales``, in one row more the sums of it alone.
    """
    pid = tl.program_id(0)
    pixel = pid * BLOCK_P + tl.arange(0, BLOCK_P)
    channel = tl.program_id(1) * BLOCK_K + tl.arange(0, BLOCK_K)
    inside = pixel < pixels
    image, y, x = split_pixel(pixel, h, w)
    mask = inside[:, None] & (channel < C)[None, :]
    here = tile_offsets(pixel, channel, C)
    largest, total = normaliser(edge_weights, channel, len(maps), FUSION, C, PER_CHANNEL)
    d = tl.load(grad + here, mask=mask, other=0.0).to(tl.float32)
    if ACTIVATION != 0:
        fused = fuse(
            maps, heights, widths, scales, offsets, edge_weights, largest, total,
            image, y, x, inside, channel, h, w, GEOMETRY, FUSION, C, PER_CHANNEL,
        )  # fmt: skip
        d = tl.where(mask, activation_gradient(fused, d, ACTIVATION), 0.0)
    if KEEP:
        tl.store(d_fused + here, d.to(d_fused.dtype.element_ty), mask=mask)
    for e in tl.static_range(len(maps)):
        if GEOMETRY[e][0] == POOL:
            value, tap = pool_window(
                maps[e], scales, image, y, x, inside, channel, heights[e], widths[e], GEOMETRY, e, C
            )
            tl.store(grads[e] + here, tap.to(grads[e].dtype.element_ty), mask=mask)
        elif edge_sums is not None:
            value = sample(
                maps[e], scales, image, y, x, inside, channel, heights[e], widths[e], h, w,
                GEOMETRY, e, C,
            )  # fmt: skip
        if GEOMETRY[e][0] == NONE:
            part = d
            if FUSION != _SUM:
                a = coefficient(edge_weights, e, largest, total, channel, FUSION, C, PER_CHANNEL)
                if PER_CHANNEL:
                    a = a[None, :]
                part = a * d
            if scales is not None:
                part *= load_channels(scales, e, channel, C)
            tl.store(grads[e] + here, part.to(grads[e].dtype.element_ty), mask=mask)
        if edge_sums is not None:
            sums = tl.sum(tl.where(mask, d * value, 0.0), axis=0)
            row = (e * tl.num_programs(0) + pid).to(tl.int64)
            tl.store(edge_sums + row * C + channel, sums, mask=channel < C)
    if scales is not None:
        row = (len(maps) * tl.num_programs(0) + pid).to(tl.int64)
        tl.store(edge_sums + row * C + channel, tl.sum(d, axis=0), mask=channel < C)


@triton.jit(do_not_specialize=["pixels", "in_h", "in_w", "h", "w"])
def backward_resize(
    grad,
    d_fused,
    taps,
    scales,
    edge_weights,
    pixels,
    in_h,
    in_w,
    h,
    w,
    C: tl.constexpr,
    EDGE: tl.constexpr,
    EDGES: tl.constexpr,
    GEOMETRY: tl.constexpr,
    FUSION: tl.constexpr,
    PER_CHANNEL: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """The gradient of one resized input, each pixel from the outputs that read it."""
    pixel = tl.program_id(0) * BLOCK_P + tl.arange(0, BLOCK_P)
    channel = tl.program_id(1) * BLOCK_K + tl.arange(0, BLOCK_K)
    image, y, x = split_pixel(pixel, in_h, in_w)
    inside = pixel < pixels
    in_width = (channel < C)[None, :]
    d = tl.zeros([BLOCK_P, BLOCK_K], tl.float32)
    if GEOMETRY[0] == POOL:
        # outputs o with o·stride − before ≤ i < o·stride − before + stride + 1: two at most
        last_y = (y + GEOMETRY[3]) // GEOMETRY[2]
        last_x = (x + GEOMETRY[6]) // GEOMETRY[5]
        for r in tl.static_range(2):
            for k in tl.static_range(2):
                oy, ox = last_y - r, last_x - k
                tap_y = y + GEOMETRY[3] - oy * GEOMETRY[2]
                tap_x = x + GEOMETRY[6] - ox * GEOMETRY[5]
                reads = inside & (oy >= 0) & (oy < h) & (ox >= 0) & (ox < w)
                reads = reads & (tap_y < GEOMETRY[1]) & (tap_x < GEOMETRY[4])
                offsets = tile_offsets((image * h + oy) * w + ox, channel, C)
                mask = reads[:, None] & in_width
                tap = tl.load(taps + offsets, mask=mask, other=0).to(tl.int32)
                value = tl.load(d_fused + offsets, mask=mask, other=0.0).to(tl.float32)
                chosen = mask & (tap == (tap_y * GEOMETRY[4] + tap_x)[:, None])
                d += tl.where(chosen, value, 0.0)
    else:
        # outputs o with floor(o·in/out) = i: from ⌈i·out/in⌉ up to ⌈(i + 1)·out/in⌉
        if GEOMETRY[1] > 0:
            top, left = y * GEOMETRY[1], x * GEOMETRY[2]
            rows, columns = GEOMETRY[1], GEOMETRY[2]
            most_rows, most_columns = GEOMETRY[1], GEOMETRY[2]
        else:
            top, left = tl.cdiv(y * h, in_h), tl.cdiv(x * w, in_w)
            rows, columns = tl.cdiv((y + 1) * h, in_h) - top, tl.cdiv((x + 1) * w, in_w) - left
            most_rows, most_columns = tl.cdiv(h, in_h), tl.cdiv(w, in_w)
        corner = (image * h + top) * w + left
        for r in range(most_rows):
            for k in range(most_columns):
                mask = (inside & (r < rows) & (k < columns))[:, None] & in_width
                offsets = tile_offsets(corner + r * w + k, channel, C)
                value = tl.load(d_fused + offsets, mask=mask, other=0.0)
                d += value.to(tl.float32)
    if FUSION != _SUM:
        largest, total = normaliser(edge_weights, channel, EDGES, FUSION, C, PER_CHANNEL)
        a = coefficient(edge_weights, EDGE, largest, total, channel, FUSION, C, PER_CHANNEL)
        if PER_CHANNEL:
            a = a[None, :]
        d = a * d
    if scales is not None:
        d *= load_channels(scales, EDGE, channel, C)
    mask = inside[:, None] & in_width
    tl.store(grad + tile_offsets(pixel, channel, C), d.to(grad.dtype.element_ty), mask=mask)


@triton.jit
def backward_edge_weights(
    grad,
    sums,
    edge_weights,
    C: tl.constexpr,
    EDGES: tl.constexpr,
    FUSION: tl.constexpr,
    PER_CHANNEL: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """The gradient of the edge weights from that of their coefficients, ``sums``.

    Those are float64, as ``edge_weights`` is: the gradient of a lone positive edge is what is left
    after almost all of it cancels.
    """
    channel = tl.program_id(0) * BLOCK_K + tl.arange(0, BLOCK_K)
    largest, total = normaliser(edge_weights, channel, EDGES, FUSION, C, PER_CHANNEL)
    mean = 0.0  # Σ coefficient · gradient
    for e in tl.static_range(EDGES):
        a = coefficient(edge_weights, e, largest, total, channel, FUSION, C, PER_CHANNEL)
        mean += a * edge_weight(sums, e, channel, C, PER_CHANNEL)
    for e in tl.static_range(EDGES):
        d = edge_weight(sums, e, channel, C, PER_CHANNEL) - mean
        if FUSION == _FAST:
            raw = edge_weight(edge_weights, e, channel, C, PER_CHANNEL)
            d = tl.where(raw <= 0, 0.0, d / total)
        else:
            d *= coefficient(edge_weights, e, largest, total, channel, FUSION, C, PER_CHANNEL)
        if PER_CHANNEL:
            tl.store(grad + e * C + channel, d, mask=channel < C)
        else:
            tl.store(grad + e, d)


def weighted_fusion(
    inputs: Sequence[Tensor],
    edge_weights: Tensor | None,
    size: Sequence[int],
    fusion: int,
    pool: int,
    activation: int,
) -> Tensor:
    """The operator ``weighted_fusion``; see :func:`edet_kernels.weighted_fusion`."""
    return normalised_fusion(inputs, None, None, edge_weights, size, fusion, pool, activation)


def normalised_fusion(
    inputs: Sequence[Tensor],
    scales: Tensor | None,
    offsets: Tensor | None,
    edge_weights: Tensor | None,
    size: Sequence[int],
    fusion: int,
    pool: int,
    activation: int,
) -> Tensor:
    """:func:`weighted_fusion` of scale·input + offset, ``scales`` and ``offsets`` (inputs, C)."""
    maps = tuple(channels_last(x) for x in inputs)
    (n, c), (h, w) = maps[0].shape[:2], size
    pixels = pixel_count(n, h, w)
    out = empty_map(maps[0], c, h, w)
    config = configs.find("weighted_fusion", out, c, pixels)
    block_k = tile_width(c, config.pop("BLOCK_K"))
    launch(
        forward,
        (cdiv(pixels, config["BLOCK_P"]), cdiv(c, block_k)),
        out,
        maps,
        *extents(maps),
        None if scales is None else scales.contiguous(),
        None if offsets is None else offsets.contiguous(),
        None if edge_weights is None else edge_weights.contiguous(),
        pixels,
        h,
        w,
        C=c,
        GEOMETRY=geometries(maps, size, POOLS[pool]),
        FUSION=fusion,
        PER_CHANNEL=edge_weights is not None and edge_weights.dim() == 2,
        ACTIVATION=activation,
        BLOCK_K=block_k,
        **config,
    )
    return out


def weighted_fusion_backward(
    grad: Tensor,
    inputs: Sequence[Tensor],
    edge_weights: Tensor | None,
    size: Sequence[int],
    fusion: int,
    pool: int,
    activation: int,
) -> list[Tensor]:
    """Gradients of :func:`weighted_fusion`.

    Args:
        grad: (N, C, H, W), of the result.
        inputs, edge_weights, size, fusion, pool, activation: those of the forward.

    Returns:
        The gradient of each input, channels_last in its dtype, then that of edge_weights, float32
        (empty for none).
    """
    grads, d_weights, _, _ = normalised_fusion_backward(
        grad, inputs, None, None, edge_weights, size, fusion, pool, activation
    )
    return [*grads, d_weights]


def normalised_fusion_backward(
    grad: Tensor,
    inputs: Sequence[Tensor],
    scales: Tensor | None,
    offsets: Tensor | None,
    edge_weights: Tensor | None,
    size: Sequence[int],
    fusion: int,
    pool: int,
    activation: int,
) -> tuple[list[Tensor], Tensor, Tensor, Tensor]:
    """Gradients of :func:`normalised_fusion`.

    Returns:
        Those of the inputs, channels_last in their dtype, and in float32 those of edge_weights,
        scales and offsets (empty for none).
    """
    maps = tuple(channels_last(x) for x in inputs)
    grad = channels_last(grad)
    edges, (n, c), (h, w) = len(maps), maps[0].shape[:2], size
    pixels = pixel_count(n, h, w)
    shapes = geometries(maps, size, POOLS[pool])
    grads = [empty_map(x, c, *x.shape[-2:]) for x in maps]
    config = configs.find("weighted_fusion_backward", grad, c, pixels)
    block_k = tile_width(c, config.pop("BLOCK_K"))
    tiles = cdiv(pixels, config["BLOCK_P"])
    weights = None if edge_weights is None else edge_weights.contiguous()
    if scales is not None and offsets is not None:
        scales, offsets = scales.contiguous(), offsets.contiguous()
    common = {
        "C": c,
        "FUSION": fusion,
        "PER_CHANNEL": weights is not None and weights.dim() == 2,
        "BLOCK_K": block_k,
    }

    keep = activation != 0 and any(g[0] != NONE for g in shapes)
    d_fused = torch.empty_like(grad) if keep else grad
    taps = {
        e: torch.empty_like(grad, dtype=torch.uint8 if g[1] * g[4] <= 256 else torch.int32)
        for e, g in enumerate(shapes)
        if g[0] == POOL
    }
    rows = edges + 1 if scales is not None else edges if weights is not None else 0
    sums = grad.new_empty((rows, tiles, c), dtype=torch.float32)
    launch(
        backward_fused,
        (tiles, cdiv(c, block_k)),
        grad,
        maps,
        tuple(taps.get(e, grads[e]) for e in range(edges)),
        d_fused,
        sums if rows else None,
        *extents(maps),
        scales,
        offsets,
        weights,
        pixels,
        h,
        w,
        GEOMETRY=shapes,
        ACTIVATION=activation,
        KEEP=keep,
        **common,
        **config,
    )
    for e, g in enumerate(shapes):
        if g[0] != NONE:
            options = {"EDGE": e, "EDGES": edges, "GEOMETRY": g, **common, **config}
            _resize_gradient(grads[e], d_fused, taps.get(e), scales, weights, options)
    return grads, *_sums_gradients(sums, weights, scales, offsets, common)


def _resize_gradient(
    out: Tensor,
    d_fused: Tensor,
    taps: Tensor | None,
    scales: Tensor | None,
    weights: Tensor | None,
    options: dict[str, Any],
) -> None:
    """Writes the gradient of an input that was resized, gathered from the pixels that read it."""
    n, c, in_h, in_w = out.shape
    in_pixels = pixel_count(n, in_h, in_w)
    launch(
        backward_resize,
        (cdiv(in_pixels, options["BLOCK_P"]), cdiv(c, options["BLOCK_K"])),
        out,
        d_fused,
        taps,
        scales,
        weights,
        in_pixels,
        in_h,
        in_w,
        *d_fused.shape[-2:],
        **options,
    )


def _sums_gradients(
    sums: Tensor,
    weights: Tensor | None,
    scales: Tensor | None,
    offsets: Tensor | None,
    common: dict[str, Any],
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of edge weights, scales and offsets from the sums (rows, tiles, C) of the tiles.

    Args:
        weights, scales, offsets: of :func:`normalised_fusion`.
        common: constants of the kernels.
    """
    none = sums.new_empty(0)
    d_coefficients, d_weights, d_scales, d_offsets = sums.sum(1), none, none, none
    fusion = FUSIONS[common["FUSION"]]
    if scales is not None and offsets is not None:
        # of a coefficient a in a·(scale·x + offset), from Σ d·x of each input and Σ d
        products, total = d_coefficients[:-1], d_coefficients[-1:]
        a = fusion_coefficients(weights, len(products), fusion)
        a = torch.ones_like(scales) if a is None else a.view(len(products), -1)
        d_scales, d_offsets = a * products, a * total
        d_coefficients = scales * products + offsets * total
    if weights is not None:
        per_channel = weights.dim() == 2
        d_weights = d_coefficients if per_channel else d_coefficients.sum(1)
        if fusion != "unbounded":
            d_coefficients, d_weights = d_weights, torch.empty_like(weights)
            launch(
                backward_edge_weights,
                (cdiv(common["C"], common["BLOCK_K"]) if per_channel else 1,),
                d_weights,
                d_coefficients.double(),
                weights.double(),
                EDGES=len(weights),
                num_warps=1,
                **common,
            )
    return d_weights, d_scales, d_offsets
