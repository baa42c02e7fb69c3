"""The ops on maps of bytes: int8 weights, uint8 maps, int32 sums.

:mod:`edet_kernels.int8_reference` defines every byte of their results. They have no gradients.
Weights are packed by ``pack_pointwise_int8`` and ``pack_depthwise_int8``; rows of a requantisation
are explained in the reference.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from . import int8_onnx, int8_reference, library, reference
from .backend import BackendError, current_backend, has_kernel
from .fakes import empty_map, fake
from .names import INT8_OPS, MAX_EDGES, POOLS, Size
from .onnx import in_onnx_export
from .ops.backbone import conv_geometry
from .ops.byte_checks import (
    check_graph,
    check_inputs,
    check_layer,
    check_mbconv,
    pointwise_shape,
)
from .ops.checks import (
    check_image,
    check_integer,
    check_list,
    check_map,
    check_normalisation,
    check_number,
    check_stride,
    check_weight,
    check_word,
    columns_of,
    length_of,
    numbers_of,
)
from .packing import PANEL


def runs_kernel(op: str, device: torch.device) -> bool:
    """Whether the compiled kernel of an op on bytes serves a device; else its reference does.

    Raises:
        BackendError: a backend was asked for by name and has no such kernel.
    """
    asked = current_backend()
    if asked == "reference" or in_onnx_export():
        return False
    if device.type != "cpu":
        reason = f"the tensors are on {device.type}"
    elif asked in ("cuda", "triton"):
        reason = "int8 kernels are compiled for CPUs"
    elif not library.load():
        reason = library.status()
    elif not has_kernel(op, "cpu"):
        reason = "the library is older than this package and lacks it: run 'make build'"
    else:
        return True
    if asked != "auto":
        raise BackendError(f"{op} cannot run on backend {asked!r}: {reason}")
    return False


# what it reads, a ContextVar, cannot be traced
runs_kernel._dynamo_marked_constant = True  # type: ignore[attr-defined]


def _plain() -> Any:
    """What computes where no kernel does: the reference, or what ONNX has for it."""
    return int8_onnx if in_onnx_export() else int8_reference


def _run(op: str, *args: Any) -> Any:
    function = getattr(torch.ops.edet_kernels, op)
    if torch.compiler.is_compiling():
        return function(*args)
    with torch._C._AutoDispatchBelowAutograd():
        return function(*args)


def quantize(input: Tensor, inverse: float, zero: int) -> Tensor:
    """round(clamp(input·inverse + zero, 0, 255)), to nearest even, as bytes; NaN becomes 0.

    Args:
        input: (N, C, H, W) float32.
        inverse: of the scale.
        zero: the byte of 0, 0 to 255.

    Raises:
        ValueError, TypeError: naming the argument, what it must be and what it was.
    """
    check_map("input", input, torch.float32)
    check_number("inverse", inverse)
    check_integer("zero", zero, 0, 255)
    if runs_kernel("int8_quantize", input.device):
        return _run("int8_quantize", input, inverse, zero)
    return _plain().quantize(input, inverse, zero)


@fake("int8_quantize")
def _fake_quantize(input: Tensor, inverse: float, zero: int) -> Tensor:
    return empty_map(input, *input.shape[1:], dtype=torch.uint8)


def dequantize(input: Tensor, scale: float, zero: int) -> Tensor:
    """(input − zero)·scale, float32, of bytes (N, C, H, W).

    Raises:
        ValueError, TypeError: naming the argument, what it must be and what it was.
    """
    check_map("input", input, torch.uint8)
    check_number("scale", scale)
    check_integer("zero", zero, 0, 255)
    if runs_kernel("int8_dequantize", input.device):
        return _run("int8_dequantize", input, scale, zero)
    return _plain().dequantize(input, scale, zero)


@fake("int8_dequantize")
def _fake_dequantize(input: Tensor, scale: float, zero: int) -> Tensor:
    return empty_map(input, *input.shape[1:], dtype=torch.float32)


def stem(
    image: Tensor,
    weight: Tensor,
    scale: Tensor,
    shift: Tensor,
    *,
    mean: Tensor | None = None,
    std: Tensor | None = None,
    padding: str = "same",
    activation: str = "swish",
    inverse: float,
    zero: int,
) -> Tensor:
    """:func:`quantize` of :func:`edet_kernels.stem`, whose float32 map is not written.

    The products are of floats: a byte may differ by one from the reference's.

    Args:
        image, weight, scale, shift, mean, std, padding, activation: as for the float op; the image
            uint8 or float32, the weight packed.
        inverse, zero: as for :func:`quantize`.

    Raises:
        ValueError, TypeError: naming the argument, what it must be and what it was.
    """
    check_number("inverse", inverse)
    check_integer("zero", zero, 0, 255)
    check_image(image)
    if image.dtype not in (torch.uint8, torch.float32):
        raise TypeError(f"image must be uint8 or float32, got {image.dtype}")
    (number,) = numbers_of(activation=activation)
    check_word("padding", padding, POOLS)
    c_out = length_of("scale", scale)
    check_weight("weight", weight, [(-(-c_out // PANEL), 27, PANEL)], image, torch.float32)
    for name, t in (("scale", scale), ("shift", shift)):
        check_weight(name, t, [(c_out,)], image, torch.float32)
    check_normalisation(mean, std, image, torch.float32)
    if not runs_kernel("int8_stem", image.device):
        x = reference.stem(
            image,
            weight,
            scale,
            shift,
            mean=mean,
            std=std,
            padding=padding,
            activation=activation,
            dtype=torch.float32,
        )
        return _plain().quantize(x, inverse, zero)
    before, size = conv_geometry(image, 3, 2, padding)
    return _run(
        "int8_stem", image, weight, scale, shift, mean, std, before, size, number, inverse, zero
    )


@fake("int8_stem")
def _fake_stem(
    image: Tensor,
    weight: Tensor,
    scale: Tensor,
    shift: Tensor,
    mean: Tensor | None,
    std: Tensor | None,
    padding: Sequence[int],
    size: Sequence[int],
    *_: Any,
) -> Tensor:
    return empty_map(image, scale.shape[0], *size, dtype=torch.uint8)


def mbconv(
    input: Tensor,
    expand: Sequence[Tensor] | None,
    depthwise: Sequence[Tensor],
    squeeze: Sequence[Tensor] | None,
    project: Sequence[Tensor],
    *,
    stride: int = 1,
    padding: str = "same",
    activation: str = "swish",
    residual: float = 0.0,
) -> Tensor:
    """An inverted residual block on bytes, as :func:`edet_kernels.mbconv` is on floats.

    Args:
        input: (N, C_in, H, W) uint8.
        expand: (packed int8 weight, rows (4, C_mid)), or None when C_mid is C_in.
        depthwise: (packed int8 weight, rows (4, C_mid), pad (C_mid,) uint8: the byte of 0 of the
            map that it reads).
        squeeze: (reduce (R, C_mid) int16, rows (2, R), excite (C_mid, R) int16, rows (2, C_mid),
            zeros (C_mid,): the bytes of 0 behind the depthwise convolution, as floats); or None.
        project: (packed int8 weight, rows (2, C_out)); with squeeze a float weight of
            ``pack_pointwise``, which is gated and rounded to int8 for each image.
        stride: 1 or 2.
        padding: ``same`` or ``symmetric``.
        activation: as for :func:`edet_kernels.weighted_fusion`.
        residual: factor of the input's bytes in the result; 0: not added.

    Returns:
        (N, C_out, ⌈H/stride⌉, ⌈W/stride⌉) uint8, channels_last.

    Raises:
        ValueError, TypeError: naming the argument, what it must be and what it was.
    """
    check_map("input", input, torch.uint8)
    (number,) = numbers_of(activation=activation)
    check_word("padding", padding, POOLS)
    check_stride(stride)
    check_number("residual", residual)
    kernel = check_mbconv(input, expand, depthwise, squeeze, project)
    if residual and (stride != 1 or project[1].shape[1] != input.shape[1]):
        raise ValueError(f"residual must be 0 for a result of another shape, got {residual}")
    before, size = conv_geometry(input, kernel, stride, padding)
    if runs_kernel("int8_mbconv", input.device):
        return _run(
            "int8_mbconv",
            input,
            list(expand or ()),
            list(depthwise),
            list(squeeze or ()),
            list(project),
            stride,
            before,
            size,
            number,
            float(residual),
        )
    return _plain().mbconv(
        input,
        expand,
        depthwise,
        squeeze,
        project,
        stride=stride,
        before=before,
        size=size,
        activation=activation,
        residual=float(residual),
    )


@fake("int8_mbconv")
def _fake_mbconv(
    input: Tensor,
    expand: Sequence[Tensor],
    depthwise: Sequence[Tensor],
    squeeze: Sequence[Tensor],
    project: Sequence[Tensor],
    stride: int,
    padding: Sequence[int],
    size: Sequence[int],
    *_: Any,
) -> Tensor:
    return empty_map(input, project[1].shape[1], *size)


def lateral(
    input: Tensor,
    pw_weights: Sequence[Tensor],
    rows: Sequence[Tensor],
    *,
    pooled: int = 0,
    pool: str = "same",
) -> list[Tensor]:
    """All 1×1 projections of one map of bytes, as :func:`edet_kernels.lateral` is on floats.

    Args:
        input: (N, C_in, H, W) uint8.
        pw_weights: for each projection a packed int8 weight.
        rows: for each projection (2, C_out): scale and shift to the result's bytes.
        pooled: how often the last projection is max-pooled; the pooled maps take its place.
        pool: ``same`` or ``symmetric``.

    Raises:
        ValueError, TypeError: naming the argument, what it must be and what it was.
    """
    check_map("input", input, torch.uint8)
    (number,) = numbers_of(pool=pool)
    check_list("pw_weights", pw_weights, "tensors", MAX_EDGES)
    check_list("rows", rows, "tensors", MAX_EDGES)
    if len(pw_weights) != len(rows):
        raise ValueError(f"rows must be {len(pw_weights)} tensors, got {len(rows)}")
    check_integer("pooled", pooled, 0, MAX_EDGES)
    for weight, row in zip(pw_weights, rows, strict=True):
        shape = pointwise_shape(columns_of("rows", row, 2), input.shape[1])
        check_weight("pw_weight", weight, [shape], input, torch.int8)
        check_weight("rows", row, [tuple(row.shape)], input, torch.float32)
    if runs_kernel("int8_lateral", input.device):
        return _run("int8_lateral", input, list(pw_weights), list(rows), pooled, number)
    return _plain().lateral(input, pw_weights, rows, pooled=pooled, pool=pool)


@fake("int8_lateral")
def _fake_lateral(
    input: Tensor, pw_weights: Sequence[Tensor], rows: Sequence[Tensor], pooled: int, pool: int
) -> list[Tensor]:
    h, w = input.shape[-2:]
    maps = [empty_map(input, r.shape[1], h, w) for r in rows]
    if pooled:
        channels = maps.pop().shape[1]
        for _ in range(pooled):
            h, w = (h + 1) // 2, (w + 1) // 2
            maps.append(empty_map(input, channels, h, w))
    return maps


def nodes(
    inputs: Sequence[Tensor],
    fuse_rows: Sequence[Tensor],
    dw_weights: Sequence[Tensor],
    mid_rows: Sequence[Tensor],
    pw_weights: Sequence[Tensor],
    out_rows: Sequence[Tensor],
    *,
    layers: Sequence[int],
    edges: Sequence[Sequence[int]],
    sizes: Sequence[Size],
    outputs: Sequence[int],
    pool: str = "same",
    pre_activation: str = "none",
    post_activation: str = "none",
) -> list[Tensor]:
    """All nodes of a feature network or a head on bytes in one call.

    Each is a fusion of its inputs (a sum of factors times bytes, activated and rounded once), a
    depthwise 3×3 convolution, a rounding and a pointwise convolution. Nodes of one layer have their
    channels in common; a layer's tensors hold a row for each of its nodes, weights that all of them
    share one.

    Args:
        inputs: maps (N, C, H, W) uint8; they have the ids 0, 1, …, nodes the ids after them.
        fuse_rows: for each layer (nodes, n + 3, C): factors of n inputs, shift, inverse and zero of
            the fused map; or (nodes, 1, C): that zero, of one input taken as it is.
        dw_weights: for each layer (nodes or 1, 3, C, 4) packed int8.
        mid_rows: for each layer (nodes, 2, C): scale and shift between the convolutions.
        pw_weights: for each layer (nodes or 1, ⌈C_out/16⌉, ⌈C/4⌉, 16, 4) packed int8.
        out_rows: for each layer (nodes, 4, C_out), a requantisation; or (nodes, 2, C_out): scale
            and shift of a map of floats, which no node reads.
        layers: the layer of each node.
        edges: the ids that each node reads.
        sizes: (H, W) of each node.
        outputs: ids of nodes to return.
        pool: ``same`` or ``symmetric``, of max pools.
        pre_activation: of fusions, post_activation: of maps of bytes.

    Raises:
        ValueError, TypeError: naming the argument, what it must be and what it was.
    """
    check_inputs(inputs)
    numbers = numbers_of(pool=pool, pre_activation=pre_activation, post_activation=post_activation)
    parts = (fuse_rows, dw_weights, mid_rows, pw_weights, out_rows)
    names = ("fuse_rows", "dw_weights", "mid_rows", "pw_weights", "out_rows")
    for name, part in zip(names, parts, strict=True):
        check_list(name, part, "tensors")
    if len({len(p) for p in parts}) != 1:
        raise ValueError("weights and rows must be lists of one length")
    kinds = [check_layer(i, *part, inputs[0]) for i, part in enumerate(zip(*parts, strict=True))]
    graph = check_graph(inputs, kinds, layers, edges, sizes, outputs)
    if runs_kernel("int8_nodes", inputs[0].device):
        return _run(
            "int8_nodes",
            list(inputs),
            *map(list, parts),
            list(layers),
            *graph,
            *numbers,
        )
    return _plain().nodes(
        inputs,
        *parts,
        layers=layers,
        edges=edges,
        sizes=sizes,
        outputs=outputs,
        pool=pool,
        pre_activation=pre_activation,
        post_activation=post_activation,
    )


@fake("int8_nodes")
def _fake_nodes(
    inputs: Sequence[Tensor],
    fuse_rows: Sequence[Tensor],
    dw_weights: Sequence[Tensor],
    mid_rows: Sequence[Tensor],
    pw_weights: Sequence[Tensor],
    out_rows: Sequence[Tensor],
    layers: Sequence[int],
    edges: Sequence[int],
    edge_counts: Sequence[int],
    sizes: Sequence[int],
    outputs: Sequence[int],
    *_: Any,
) -> list[Tensor]:
    maps = []
    for output in outputs:
        i = output - len(inputs)
        rows = out_rows[layers[i]]
        dtype = torch.float32 if rows.shape[1] == 2 else torch.uint8
        maps.append(
            empty_map(inputs[0], rows.shape[2], sizes[2 * i], sizes[2 * i + 1], dtype=dtype)
        )
    return maps


__all__ = [
    "INT8_OPS",
    "dequantize",
    "lateral",
    "mbconv",
    "nodes",
    "quantize",
    "runs_kernel",
    "stem",
]
