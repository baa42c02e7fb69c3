"""Convolutions of one map or of all levels: separable_conv, head and lateral."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import chain
from typing import Any

from torch import Tensor

from .. import reference
from ..autocast import cast
from ..backend import runs_reference
from ..fakes import empty_map, fake
from ..names import MAX_EDGES
from ..operators import backward, run
from ..packing import as_packed_depthwise, as_packed_pointwise
from .checks import (
    check_integer,
    check_levels,
    check_list,
    check_maps,
    check_out,
    check_weight,
    dw_shapes,
    numbers_of,
)


def separable_conv(
    inputs: Sequence[Tensor],
    dw_weight: Tensor,
    pw_weight: Tensor,
    scale: Tensor,
    shift: Tensor,
    *,
    activation: str = "swish",
) -> list[Tensor]:
    """One layer of a class or box head on all pyramid levels in one call.

    activation(scale[l] · pw(dw(x_l)) + shift[l]): the convolution is shared by the levels, the
    batch norm is each level's own (EfficientDet paper, section 4, and the published code).

    Args:
        inputs: one map (N, C, H_l, W_l) per level.
        dw_weight: (C, 1, 3, 3), or (9, C) from :func:`pack_depthwise`.
        pw_weight: (C_out, C, 1, 1), or (⌈C_out/16⌉, C, 16) from :func:`pack_pointwise`.
        scale, shift: (levels, C_out), or (C_out,) for all levels.
        activation: as for :func:`weighted_fusion`.

    Returns:
        One map (N, C_out, H_l, W_l) per level, channels_last.

    Raises:
        ValueError, TypeError: naming the argument, what it must be and what it was.
    """
    inputs = cast(inputs)
    check_maps("inputs", inputs)
    x = inputs[0]
    (number,) = numbers_of(activation=activation)
    c, levels = x.shape[1], len(inputs)
    check_weight("dw_weight", dw_weight, dw_shapes(c), x)
    check_levels("scale", scale, levels)
    check_levels("shift", shift, levels)
    scales = scale.expand(levels, -1) if scale.dim() == 1 else scale
    shifts = shift.expand(levels, -1) if shift.dim() == 1 else shift
    check_out(scales[0], shifts[0], pw_weight, c, x)
    if runs_reference("separable_conv", [*inputs, dw_weight, pw_weight, scale, shift]):
        return reference.separable_conv(
            inputs, dw_weight, pw_weight, scale, shift, activation=activation
        )
    return run(
        "separable_conv",
        list(inputs),
        as_packed_depthwise(dw_weight).float(),
        as_packed_pointwise(pw_weight).float(),
        scales.float().contiguous(),
        shifts.float().contiguous(),
        number,
    )


@fake("separable_conv")
def _fake_separable_conv(
    inputs: Sequence[Tensor], dw_weight: Tensor, pw_weight: Tensor, scale: Tensor, *_: Any
) -> list[Tensor]:
    return [empty_map(x, scale.shape[1], *x.shape[-2:]) for x in inputs]


@backward("separable_conv", "separable_conv_backward")
def _separable_conv_backward(ops: Any, args: Sequence[Any], grads: list[Tensor]) -> list[Tensor]:
    return list(ops.separable_conv_backward(grads, *args))


def head(
    inputs: Sequence[Tensor],
    dw_weights: Sequence[Tensor],
    pw_weights: Sequence[Tensor],
    scales: Sequence[Tensor],
    shifts: Sequence[Tensor],
    *,
    activation: str = "swish",
) -> list[Tensor]:
    """A whole prediction head: every layer on every pyramid level in one call.

    Each layer is a :func:`separable_conv`; ``activation`` follows all of them but the last, the
    prediction (EfficientDet paper, section 4).

    Args:
        inputs: one map (N, C, H_l, W_l) per level.
        dw_weights: for each layer as ``dw_weight`` of :func:`separable_conv`.
        pw_weights: for each layer as ``pw_weight`` of :func:`separable_conv`.
        scales, shifts: for each layer (levels, C_out), or (C_out,) for all levels.
        activation: as for :func:`weighted_fusion`.

    Returns:
        One map (N, C_out of the last layer, H_l, W_l) per level, channels_last.

    Raises:
        ValueError, TypeError: naming the argument, what it must be and what it was.
    """
    inputs = cast(inputs)
    check_maps("inputs", inputs)
    x = inputs[0]
    (number,) = numbers_of(activation=activation)
    for name, value in (
        ("dw_weights", dw_weights),
        ("pw_weights", pw_weights),
        ("scales", scales),
        ("shifts", shifts),
    ):
        check_list(name, value, "tensors")
    layers = len(dw_weights)
    if not layers == len(pw_weights) == len(scales) == len(shifts):
        raise ValueError(
            "dw_weights, pw_weights, scales and shifts must be non-empty lists of one length, got "
            f"{layers}, {len(pw_weights)}, {len(scales)} and {len(shifts)}"
        )
    c, levels = x.shape[1], len(inputs)
    wide_scales, wide_shifts = [], []
    for dw, pw, scale, shift in zip(dw_weights, pw_weights, scales, shifts, strict=True):
        check_weight("dw_weights", dw, dw_shapes(c), x)
        check_levels("scales", scale, levels)
        check_levels("shifts", shift, levels)
        wide_scales.append(scale.expand(levels, -1) if scale.dim() == 1 else scale)
        wide_shifts.append(shift.expand(levels, -1) if shift.dim() == 1 else shift)
        check_out(wide_scales[-1][0], wide_shifts[-1][0], pw, c, x)
        c = scale.shape[-1]
    if runs_reference("head", [*inputs, *dw_weights, *pw_weights, *scales, *shifts]):
        return reference.head(inputs, dw_weights, pw_weights, scales, shifts, activation=activation)
    return run(
        "head",
        list(inputs),
        [as_packed_depthwise(w).float() for w in dw_weights],
        [as_packed_pointwise(w).float() for w in pw_weights],
        [s.float().contiguous() for s in wide_scales],
        [s.float().contiguous() for s in wide_shifts],
        number,
    )


@fake("head")
def _fake_head(
    inputs: Sequence[Tensor],
    dw_weights: Sequence[Tensor],
    pw_weights: Sequence[Tensor],
    scales: Sequence[Tensor],
    *_: Any,
) -> list[Tensor]:
    return [empty_map(x, scales[-1].shape[-1], *x.shape[-2:]) for x in inputs]


@backward("head", "separable_conv_backward")
def _head_backward(ops: Any, args: Sequence[Any], grads: list[Tensor]) -> list[Tensor]:
    inputs, dw, pw, scales, shifts, activation = args
    maps = [list(inputs)]
    layers = list(zip(dw, pw, scales, shifts, strict=True))
    for layer in layers[:-1]:
        maps.append(ops.separable_conv(maps[-1], *layer, activation))
    found = []
    for i, layer in reversed(list(enumerate(layers))):
        last = i == len(layers) - 1
        result = ops.separable_conv_backward(grads, maps.pop(), *layer, 0 if last else activation)
        grads, weights = result[: len(inputs)], result[len(inputs) :]
        found.append(weights)
    by_kind = zip(*reversed(found), strict=True)
    return [*grads, *chain.from_iterable(by_kind)]


def lateral(
    input: Tensor,
    pw_weights: Sequence[Tensor],
    scales: Sequence[Tensor],
    shifts: Sequence[Tensor],
    *,
    pooled: int = 0,
    pool: str = "same",
) -> list[Tensor]:
    """All 1×1 + batch-norm projections of one backbone map in one pass over it.

    In the first BiFPN cell every edge from a backbone feature has its own projection; P6, P7 (and
    P8) are max pools of one more projection of the last feature.

    Args:
        input: (N, C_in, H, W).
        pw_weights: for each projection (C_out, C_in, 1, 1), or packed by :func:`pack_pointwise`.
        scales, shifts: for each projection (C_out,).
        pooled: when positive, the last projection is max-pooled this many times by 3×3, stride 2,
            and the pooled maps are returned in its place.
        pool: ``same`` or ``symmetric``, as for :func:`weighted_fusion`.

    Returns:
        One map (N, C_out, H, W) per projection, then the pooled ones (⌈H/2⌉, ⌈W/2⌉), …

    Raises:
        ValueError, TypeError: naming the argument, what it must be and what it was.
    """
    input = cast(input)
    check_maps("input", [input])
    (number,) = numbers_of(pool=pool)
    for name, value in (("pw_weights", pw_weights), ("scales", scales), ("shifts", shifts)):
        check_list(name, value, "tensors", MAX_EDGES)
    if not len(pw_weights) == len(scales) == len(shifts):
        raise ValueError(
            "pw_weights, scales and shifts must be lists of one length, "
            f"got {len(pw_weights)}, {len(scales)} and {len(shifts)}"
        )
    check_integer("pooled", pooled, 0, MAX_EDGES)
    for weight, scale, shift in zip(pw_weights, scales, shifts, strict=True):
        check_out(scale, shift, weight, input.shape[1], input)
    if runs_reference("lateral", [input, *pw_weights, *scales, *shifts]):
        return reference.lateral(input, pw_weights, scales, shifts, pooled=pooled, pool=pool)
    return run(
        "lateral",
        input,
        [as_packed_pointwise(w).float() for w in pw_weights],
        [s.float() for s in scales],
        [s.float() for s in shifts],
        pooled,
        number,
    )


@fake("lateral")
def _fake_lateral(
    input: Tensor,
    pw_weights: Sequence[Tensor],
    scales: Sequence[Tensor],
    shifts: Sequence[Tensor],
    pooled: int,
    pool: int,
) -> list[Tensor]:
    h, w = input.shape[-2:]
    maps = [empty_map(input, s.shape[0], h, w) for s in scales]
    if pooled:
        channels = maps.pop().shape[1]
        for _ in range(pooled):
            h, w = (h + 1) // 2, (w + 1) // 2
            maps.append(empty_map(input, channels, h, w))
    return maps


@backward("lateral", "lateral_backward")
def _lateral_backward(ops: Any, args: Sequence[Any], grads: list[Tensor]) -> list[Tensor]:
    return list(ops.lateral_backward(grads, *args))
