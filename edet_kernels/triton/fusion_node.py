"""fusion_node in Triton: a whole BiFPN node in one launch, and its backward.

Floor: each input and the output once through memory, 2·C·(9 + C_out) operations a pixel. In one
launch a program owns a tile of pixels × output channels and, for each block of input channels,
fuses and activates the nine neighbours of its pixels anew: Triton gives no control of shared memory
to keep them in. That is nine times the arithmetic of the fusion (two special-function operations a
swish) to save one launch and one pass of the fused map through memory: right for the small maps of
a small batch. In two launches (configuration field ``launches``) the fused map is written, by
weighted_fusion, and convolved, by separable_conv. docs/triton.md has the figures.
"""

from __future__ import annotations

from collections.abc import Sequence

import triton
import triton.language as tl
from torch import Tensor

from ..names import POOLS
from . import configs
from .device import (
    activate,
    affine,
    dot,
    fuse,
    load_pointwise,
    load_tap,
    neighbour,
    normaliser,
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
from .separable_conv import separable_conv, separable_conv_backward
from .weighted_fusion import weighted_fusion, weighted_fusion_backward


@triton.jit(do_not_specialize=["heights", "widths", "pixels", "h", "w"])
def forward(
    out,
    maps,
    heights,
    widths,
    edge_weights,
    dw,
    pw,
    scale,
    shift,
    pixels,
    h,
    w,
    C: tl.constexpr,
    C_OUT: tl.constexpr,
    GEOMETRY: tl.constexpr,
    FUSION: tl.constexpr,
    PER_CHANNEL: tl.constexpr,
    PRE_ACTIVATION: tl.constexpr,
    POST_ACTIVATION: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    pixel = tl.program_id(0) * BLOCK_P + tl.arange(0, BLOCK_P)
    inside = pixel < pixels
    image, y, x = split_pixel(pixel, h, w)
    out_channel = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    dtype: tl.constexpr = out.dtype.element_ty
    acc = tl.zeros([BLOCK_P, BLOCK_N], tl.float32)
    for k in range(0, C, BLOCK_K):
        channel = k + tl.arange(0, BLOCK_K)
        largest, total = normaliser(edge_weights, channel, len(maps), FUSION, C, PER_CHANNEL)
        sums = tl.zeros([BLOCK_P, BLOCK_K], tl.float32)
        for dy in range(-1, 2):  # a loop when run, to need fewer registers
            for dx in tl.static_range(-1, 2):
                _, valid = neighbour(pixel, y, x, h, w, dy, dx)
                valid = valid & inside
                fused = fuse(
                    maps, heights, widths, None, None, edge_weights, largest, total,
                    image, y + dy, x + dx, valid, channel, h, w, GEOMETRY, FUSION, C, PER_CHANNEL,
                )  # fmt: skip
                # outside is 0 after the activation, whatever the weights are
                in_map = valid[:, None] & (channel < C)[None, :]
                value = tl.where(in_map, activate(fused, PRE_ACTIVATION), 0.0)
                sums += value * load_tap(dw, dy, dx, channel, C)[None, :]
        acc = dot(sums, load_pointwise(pw, channel, out_channel, C, C_OUT), acc, dtype)
    value = activate(affine(acc, out_channel, scale, shift, C_OUT), POST_ACTIVATION)
    mask = inside[:, None] & (out_channel < C_OUT)[None, :]
    tl.store(out + tile_offsets(pixel, out_channel, C_OUT), value.to(dtype), mask=mask)


def fusion_node(
    inputs: Sequence[Tensor],
    edge_weights: Tensor | None,
    dw_weight: Tensor,
    pw_weight: Tensor,
    scale: Tensor,
    shift: Tensor,
    size: Sequence[int],
    fusion: int,
    pool: int,
    pre_activation: int,
    post_activation: int,
) -> Tensor:
    """The operator ``fusion_node``; see :func:`edet_kernels.fusion_node`."""
    (n, c), c_out, (h, w) = inputs[0].shape[:2], scale.shape[0], size
    pixels = pixel_count(n, h, w)
    config = configs.find("fusion_node", inputs[0], c, pixels)
    if config.pop("launches") == 2:
        fused = weighted_fusion(inputs, edge_weights, size, fusion, pool, pre_activation)
        return separable_conv(
            [fused], dw_weight, pw_weight, scale[None], shift[None], post_activation
        )[0]
    maps = tuple(channels_last(x) for x in inputs)
    out = empty_map(maps[0], c_out, h, w)
    config["BLOCK_K"] = tile_width(c, config["BLOCK_K"])
    config["BLOCK_N"] = tile_width(c_out, config["BLOCK_N"])
    launch(
        forward,
        (cdiv(pixels, config["BLOCK_P"]), cdiv(c_out, config["BLOCK_N"])),
        out,
        maps,
        *extents(maps),
        None if edge_weights is None else edge_weights.contiguous(),
        dw_weight.contiguous(),
        pw_weight.contiguous(),
        scale.contiguous(),
        shift.contiguous(),
        pixels,
        h,
        w,
        C=c,
        C_OUT=c_out,
        GEOMETRY=geometries(maps, size, POOLS[pool]),
        FUSION=fusion,
        PER_CHANNEL=edge_weights is not None and edge_weights.dim() == 2,
        PRE_ACTIVATION=pre_activation,
        POST_ACTIVATION=post_activation,
        **config,
    )
    return out


def fusion_node_backward(
    grad: Tensor,
    inputs: Sequence[Tensor],
    edge_weights: Tensor | None,
    dw_weight: Tensor,
    pw_weight: Tensor,
    scale: Tensor,
    shift: Tensor,
    size: Sequence[int],
    fusion: int,
    pool: int,
    pre_activation: int,
    post_activation: int,
) -> list[Tensor]:
    """Gradients of :func:`fusion_node`; the forward saves nothing but its arguments.

    Args:
        grad: (N, C_out, H, W), of the result.
        inputs, …, post_activation: those of the forward.

    Returns:
        The gradients of the inputs, channels_last in their dtype, and in float32 those of
        edge_weights (empty for none), dw_weight (9, C), pw_weight (⌈C_out/16⌉, C, 16; its padding
        0), scale and shift (C_out,).
    """
    fused = weighted_fusion(inputs, edge_weights, size, fusion, pool, pre_activation)
    d_fused, d_dw, d_pw, d_scale, d_shift = separable_conv_backward(
        [grad], [fused], dw_weight, pw_weight, scale[None], shift[None], post_activation
    )
    d_edges = weighted_fusion_backward(
        d_fused, inputs, edge_weights, size, fusion, pool, pre_activation
    )
    return [*d_edges, d_dw, d_pw, d_scale[0], d_shift[0]]
