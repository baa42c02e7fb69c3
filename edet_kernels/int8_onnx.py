"""The int8 ops by QuantizeLinear and DequantizeLinear, for ``torch.onnx.export``.

They compute what :mod:`edet_kernels.int8_reference` defines, at the same scales and zero points,
and round at the same places. Two things differ before a rounding, so that a byte differs by one
where a value is that near to the middle between two: the shift of a convolution whose sum becomes
bytes at once is a whole number of that sum's steps, and swish is no table of parabolas.

A map is uint8. DequantizeLinear gives what reads it the bytes as floats, with a scale of 1: maps
inside of an op have a scale for each channel, which is in the weights that read them. Their zero
points are in the shift behind a pointwise convolution; in front of a depthwise one, which pads with
them, they are in DequantizeLinear. Weights are int8, their scale for each output channel is that
from the sum to the next bytes. Float are swish, sums of maps, squeeze-excite, and the projection
that it gates, whose weights are rounded for each image.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, ParamSpec, TypeVar

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils._python_dispatch import _disable_current_modes

from . import reference
from .packing import unpack_depthwise_int8, unpack_pointwise, unpack_pointwise_int8

P = ParamSpec("P")
R = TypeVar("R")

#: Activations behind which a float is rounded: the reference's argument times the first number is
#: the activation's, its result is the activation's over the second.
ACTIVATED = {"swish": (0.5, 0.25), "hard_swish": (1.0, 1 / 6)}

#: Steps of a sum that a shift may have as int32; the sum itself is below 2^29.
_MOST_STEPS = float(1 << 30)


def _constant(function: Callable[P, R]) -> Callable[P, R]:
    """Decorates what computes from weights alone: its results are constants of the graph."""

    @functools.wraps(function)
    def wrapper(*args: P.args, **kwargs: P.kwargs) -> R:
        with _disable_current_modes():
            return function(*args, **kwargs)

    return wrapper


def _symbolic(
    op: str, inputs: Sequence[Tensor], dtype: torch.dtype, shape: Sequence[int], **attrs: Any
) -> Tensor:
    return torch.onnx.ops.symbolic(op, inputs, attrs, dtype=dtype, shape=shape)


@_constant
def _rows(rows: Tensor) -> list[Tensor]:
    return [row.clone() for row in rows]


# Maps of bytes ------------------------------------------------------------------------------------


@_constant
def _steps(scale: Tensor | float, zero: Tensor | float, channels: int) -> tuple[Tensor, Tensor]:
    """A scale and the zero point, of each channel where they differ, of numbers or rows (C,)."""
    rows = [torch.as_tensor(x, dtype=torch.float32).expand(channels) for x in (scale, zero)]
    if all(bool((row == row[0]).all()) for row in rows):
        rows = [row[0] for row in rows]
    return rows[0].clone(), rows[1].to(torch.uint8)


def _bytes(y: Tensor, scale: Tensor | float = 1.0, zero: Tensor | float = 0.0) -> Tensor:
    """The bytes of a map of floats: y/scale + zero, rounded and clamped."""
    steps = _steps(scale, zero, y.shape[1])
    axis = {"axis": 1} if steps[0].dim() else {}
    return _symbolic("QuantizeLinear", (y, *steps), torch.uint8, y.shape, **axis)


def _values(u: Tensor, scale: Tensor | float = 1.0, zero: Tensor | float = 0.0) -> Tensor:
    """The floats of a map of bytes: (u − zero)·scale."""
    steps = _steps(scale, zero, u.shape[1])
    axis = {"axis": 1} if steps[0].dim() else {}
    return _symbolic("DequantizeLinear", (u, *steps), torch.float32, u.shape, **axis)


def quantize(x: Tensor, inverse: float, zero: int) -> Tensor:
    """See :func:`edet_kernels.int8_reference.quantize`."""
    return _bytes(x, 1 / inverse, zero)


def dequantize(u: Tensor, scale: float, zero: int) -> Tensor:
    """See :func:`edet_kernels.int8_reference.dequantize`."""
    return _values(u, scale, zero)


# Convolutions -------------------------------------------------------------------------------------


class _Sum(NamedTuple):
    """A convolution of a map's bytes with int8 weights.

    Attributes:
        input: the bytes as floats, (N, C_in, h, w).
        weight: (C_out, C_in, 1, 1), or (C_in, 1, k, k) of a depthwise one.
        before, size: leading padding (top, left) and the result's height and width.
    """

    input: Tensor
    weight: Tensor
    size: Sequence[int]
    stride: int = 1
    before: Sequence[int] = (0, 0)

    def scaled(self, scale: Tensor, shift: Tensor, *, whole: bool = False) -> Tensor:
        """scale·sum + shift, (N, C_out, H, W) float32.

        Args:
            whole: the shift becomes int32 in steps of the sum, as convolutions of bytes take it.
        """
        x, kernel, floats = self.input, self.weight.shape[-1], torch.float32
        weight, steps, zeros, shift = _parts(self.weight, scale, shift, whole)
        taps = _symbolic("DequantizeLinear", (weight, steps, zeros), floats, weight.shape, axis=0)
        if whole:
            shift = _symbolic("DequantizeLinear", (shift, steps), floats, shift.shape, axis=0)
        ends = [
            max((out - 1) * self.stride + kernel - n - first, 0)
            for n, first, out in zip(x.shape[2:], self.before, self.size, strict=True)
        ]
        return _symbolic(
            "Conv",
            (x, taps, shift),
            floats,
            (x.shape[0], len(steps), *self.size),
            kernel_shape=[kernel, kernel],
            strides=[self.stride, self.stride],
            pads=[*self.before, *ends],
            group=x.shape[1] // weight.shape[1],
        )

    def requantised(self, rows: Tensor, activation: str) -> Tensor:
        """The bytes behind a requantisation; see :mod:`edet_kernels.int8_reference`."""
        scale, shift, third, fourth = _rows(rows)
        if activation in ACTIVATED:
            factor, unit = ACTIVATED[activation]
            y = self.scaled(*_times(factor, scale, shift))
            return _bytes(reference.activate(y, activation), _inverse(third, unit), fourth)
        bounds = _bounds(third, fourth)
        y = self.scaled(scale, shift, whole=bounds is None)
        if bounds is not None:
            y = torch.minimum(torch.maximum(y, bounds[0]), bounds[1])
        return _bytes(y)


@_constant
def _parts(
    weight: Tensor, scale: Tensor, shift: Tensor, whole: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Weight, its positive scale (C_out,), its zero points, and shift, int32 where ``whole``.

    A scale that is so small that the shift would be no int32 grows, at the cost of weights that are
    nothing beside that shift.
    """
    own, shift = scale.double(), shift.double()
    least = shift.abs() / _MOST_STEPS if whole else torch.zeros_like(shift)
    steps = torch.maximum(own.abs(), least)
    steps = torch.where(steps > 0, steps, 1.0).float()
    ratio = torch.where(own.abs() < least, own / steps, own.sign())
    weight = (weight.double() * ratio.view(-1, 1, 1, 1)).round().to(torch.int8)
    shift = (shift / steps).round().to(torch.int32) if whole else shift.float()
    return weight, steps, torch.zeros(len(steps), dtype=torch.int8), shift


@_constant
def _times(factor: float, *tensors: Tensor) -> list[Tensor]:
    return [factor * x for x in tensors]


@_constant
def _inverse(x: Tensor, factor: float) -> Tensor:
    return factor / x


@_constant
def _bounds(low: Tensor, high: Tensor) -> tuple[Tensor, Tensor] | None:
    """The lowest and highest bytes of each channel; None where they are all that bytes can be."""
    if bool((low <= 0).all() and (high >= 255).all()):
        return None
    return low.view(1, -1, 1, 1), high.view(1, -1, 1, 1)


def _pointwise(u: Tensor, packed: Tensor, out_channels: int) -> _Sum:
    weight = _constant(unpack_pointwise_int8)(packed, out_channels, u.shape[1])
    return _Sum(_values(u), weight, u.shape[2:])


def _depthwise(
    u: Tensor,
    packed: Tensor,
    rows: Tensor,
    pad: Tensor,
    stride: int,
    before: Sequence[int],
    size: Sequence[int],
) -> tuple[_Sum, Tensor]:
    """A depthwise convolution of a map's bytes less the byte that is around it; the rows behind."""
    weight = _constant(unpack_depthwise_int8)(packed)
    return _Sum(_values(u, 1.0, pad), weight, size, stride, before), _less(rows, pad, weight)


@_constant
def _less(rows: Tensor, pad: Tensor, weight: Tensor) -> Tensor:
    """``rows`` behind a sum of bytes, for the sum of bytes less ``pad``."""
    shift = rows[1].double() + rows[0].double() * pad.double() * weight.double().sum((1, 2, 3))
    return torch.cat([rows[:1], shift[None].float(), rows[2:]])


@_constant
def _bounded(rows: Tensor) -> Tensor:
    """Scale and shift with the bounds of a byte below them."""
    return torch.cat([rows, torch.tensor([[0.0], [255.0]]).expand(2, rows.shape[1])])


# The ops ------------------------------------------------------------------------------------------


def mbconv(
    input: Tensor,
    expand: Sequence[Tensor] | None,
    depthwise: Sequence[Tensor],
    squeeze: Sequence[Tensor] | None,
    project: Sequence[Tensor],
    *,
    stride: int,
    before: Sequence[int],
    size: Sequence[int],
    activation: str,
    residual: float = 0.0,
) -> Tensor:
    """An inverted residual block on bytes; see :func:`edet_kernels.int8.mbconv`."""
    x = input
    if expand is not None:
        x = _pointwise(x, expand[0], expand[1].shape[1]).requantised(expand[1], activation)
    total, rows = _depthwise(x, *depthwise, stride, before, size)
    x = total.requantised(rows, activation)
    if squeeze is None:
        total = _pointwise(x, project[0], project[1].shape[1])
        y = total.scaled(*_rows(project[1]), whole=not residual)
    else:
        y = _gated(_values(x, 1.0, squeeze[4]), squeeze, project, activation)
    return _bytes(y + _values(input, residual) if residual else y)


def _gated(
    mid: Tensor, squeeze: Sequence[Tensor], project: Sequence[Tensor], activation: str
) -> Tensor:
    """The projection of each image by weights of its own, gated and rounded to int8."""
    weight, scale, shift = _float_projection(*project)
    gated = weight * gate(mid, squeeze, activation)[:, None]
    step = gated.abs().amax(2, keepdim=True) / 127
    step = torch.where(step > 0, step, 1.0)
    y = (gated / step).round() @ mid.flatten(2) * (step * scale) + shift
    return y.unflatten(2, mid.shape[2:])


@_constant
def _float_projection(packed: Tensor, rows: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    weight = unpack_pointwise(packed, rows.shape[1]).flatten(1)
    return weight.contiguous(), rows[0, :, None].clone(), rows[1, :, None].clone()


def gate(mid: Tensor, squeeze: Sequence[Tensor], activation: str) -> Tensor:
    """The gate (N, C) of squeeze-excite, float32, from the values of the map before it."""
    reduce, reduce_rows, excite, excite_rows, _ = squeeze
    factor, _ = ACTIVATED.get(activation, (1.0, 1.0))
    y = F.linear(mid.mean((2, 3)), *_linear(reduce, reduce_rows, factor))
    y = reference.activate(y, activation)
    return F.linear(y, *_linear(excite, excite_rows, 1.0)).sigmoid()


@_constant
def _linear(weight: Tensor, rows: Tensor, factor: float) -> tuple[Tensor, Tensor]:
    """Weight and bias as floats; the reference's values are in steps of 2^−16."""
    scale, shift = factor * rows.double()
    return (weight.double() * 65536 * scale[:, None]).float(), shift.float()


def resize(x: Tensor, size: Sequence[int], pool: str) -> Tensor:
    """As :func:`edet_kernels.reference.resize`; the padding is in the pool, which ONNX has."""
    h, w = x.shape[2:]
    if (h, w) == tuple(size) or (h <= size[0] and w <= size[1]):
        return reference.resize(x, (size[0], size[1]), pool)
    geometry = [reference.pool_geometry(n, out, pool) for n, out in zip((h, w), size, strict=True)]
    kernels, strides, before = (list(axis) for axis in zip(*geometry, strict=True))
    ends = [
        (out - 1) * stride + kernel - n - first
        for (kernel, stride, first), n, out in zip(geometry, (h, w), size, strict=True)
    ]
    return _symbolic(
        "MaxPool",
        (x,),
        x.dtype,
        (*x.shape[:2], *size),
        kernel_shape=kernels,
        strides=strides,
        pads=[*before, *ends],
    )


def lateral(
    input: Tensor,
    pw_weights: Sequence[Tensor],
    rows: Sequence[Tensor],
    *,
    pooled: int = 0,
    pool: str = "same",
) -> list[Tensor]:
    """Projections of one map; see :func:`edet_kernels.int8.lateral`."""
    maps = [
        _pointwise(input, w, r.shape[1]).requantised(_bounded(r), "none")
        for w, r in zip(pw_weights, rows, strict=True)
    ]
    if pooled:
        x = maps.pop()
        for _ in range(pooled):
            x = _bytes(resize(_values(x), [(n + 1) // 2 for n in x.shape[-2:]], pool))
            maps.append(x)
    return maps


def fuse(
    inputs: Sequence[Tensor],
    rows: Sequence[Tensor],
    size: Sequence[int],
    pool: str,
    activation: str,
) -> tuple[Tensor, Tensor]:
    """See :func:`edet_kernels.int8_reference.fuse`; ``rows`` are (C,) each."""
    if len(rows) == 1:
        return inputs[0], rows[0]
    factor, unit = ACTIVATED.get(activation, (1.0, 1.0))
    *factors, total = _columns(factor, *rows[:-2])
    for u, own in zip(inputs, factors, strict=True):
        total = resize(_values(u), size, pool) * own + total
    y = reference.activate(total, activation)
    return _bytes(y, _inverse(rows[-2], unit), rows[-1]), rows[-1]


@_constant
def _columns(factor: float, *rows: Tensor) -> list[Tensor]:
    return [factor * row.view(1, -1, 1, 1) for row in rows]


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
    sizes: Sequence[tuple[int, int]],
    outputs: Sequence[int],
    pool: str = "same",
    pre_activation: str = "none",
    post_activation: str = "none",
) -> list[Tensor]:
    """Nodes of feature networks and heads; see :func:`edet_kernels.int8.nodes`."""
    maps = list(inputs)
    parts = [
        list(map(_rows, part)) for part in (fuse_rows, dw_weights, mid_rows, pw_weights, out_rows)
    ]
    row = [0] * len(dw_weights)
    for layer, sources, size in zip(layers, edges, sizes, strict=True):
        i = row[layer]
        row[layer] += 1
        # one for all rows, or one each
        fusing, dw, mid, pw, out = (part[layer][min(i, len(part[layer]) - 1)] for part in parts)
        x, pad = fuse([maps[s] for s in sources], _rows(fusing), size, pool, pre_activation)
        total, rows = _depthwise(x, dw, mid, pad, 1, (1, 1), size)
        total = _pointwise(total.requantised(_bounded(rows), "none"), pw, out.shape[1])
        maps.append(
            total.scaled(*_rows(out)) if len(out) == 2 else total.requantised(out, post_activation)
        )
    return [maps[o] for o in outputs]
