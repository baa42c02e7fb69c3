"""The steps of an inverted residual block in training, each up to where a batch norm needs a map.

``training_depthwise`` and ``training_project`` hand on a map in front of its batch norm, with the
statistics; whoever reads the map gives the batch norm as a scale and an offset. Of the expanded
map, which is never written, the statistics follow from ``training_moments`` of the block's input.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from .. import reference
from ..autocast import cast
from ..backend import runs_reference
from ..fakes import empty_map, fake
from ..names import POOLS
from ..operators import backward, for_reference, run
from .backbone import SQUEEZE, conv_geometry, given_padding
from .checks import (
    check_flag,
    check_maps,
    check_parts,
    check_stride,
    check_weight,
    check_word,
    length_of,
    numbers_of,
    shape_of,
)


def _floats(*tensors: Tensor | None) -> list[Tensor | None]:
    return [None if t is None else t.float() for t in tensors]


def training_moments(input: Tensor, *, products: bool = True) -> tuple[Tensor, Tensor]:
    """Means of a map's channels, and the products of their deviations, for training.

    The statistics of x·Wᵀ, for any W, are mean·Wᵀ and the diagonal of W·products·Wᵀ.

    Args:
        input: (N, C, H, W).
        products: False for the sums of the squared deviations alone.

    Returns:
        (C,) and, Σ over the pixels, (C, C) or (C,), in float32 (float64 for float64).

    Raises:
        ValueError, TypeError: ``input`` is no map.
    """
    input = cast(input)
    check_maps("input", [input])
    check_flag("products", products)
    if runs_reference("training_moments", [input]):
        return reference.training_moments(input, products=products)
    mean, found = run("training_moments", input, products)
    return mean, found


@fake("training_moments")
def _fake_training_moments(input: Tensor, products: bool) -> list[Tensor]:
    c = input.shape[1]
    return [
        input.new_empty(shape, dtype=torch.float32)
        for shape in ((c,), (c, c) if products else (c,))
    ]


@fake("training_moments_backward")
def _fake_training_moments_backward(
    grad_mean: Tensor, grad_products: Tensor, mean: Tensor, input: Tensor, products: bool
) -> Tensor:
    return empty_map(input, *input.shape[1:])


@backward("training_moments", "training_moments_backward", results_kept=lambda args: True)
def _training_moments_backward(
    ops: Any, args: Sequence[Any], grads: list[Tensor], results: list[Tensor]
) -> list[Tensor]:
    return [ops.training_moments_backward(*grads, results[0], *args)]


def _check_kernel(dw_weight: Tensor) -> int:
    if (
        not isinstance(dw_weight, Tensor)
        or dw_weight.dim() != 4
        or dw_weight.shape[-1] not in (3, 5)
    ):
        raise ValueError(f"dw_weight must be (C, 1, k, k) with k 3 or 5, got {shape_of(dw_weight)}")
    return dw_weight.shape[-1]


def training_depthwise(
    input: Tensor,
    expand_weight: Tensor | None,
    scale: Tensor | None,
    offset: Tensor | None,
    dw_weight: Tensor,
    *,
    stride: int = 1,
    padding: str = "same",
    activation: str = "swish",
    statistics: bool = True,
) -> tuple[Tensor, Tensor, Tensor]:
    """Expand 1×1 → scale and offset → activation → depthwise k×k, and its statistics: for training.

    Args:
        input: (N, C_in, H, W).
        expand_weight: (C, C_in, 1, 1); None when C is C_in and nothing is expanded.
        scale, offset: (C,), a batch norm in front of the activation; None for none.
        dw_weight: (C, 1, k, k), k 3 or 5.
        stride: 1 or 2.
        padding: ``same`` (TensorFlow's) or ``symmetric`` (k//2).
        activation: as for :func:`weighted_fusion`.
        statistics: False where no batch norm in training mode follows.

    Returns:
        (N, C, ⌈H/stride⌉, ⌈W/stride⌉); the mean of each channel and the sum of its squared
        deviations, (C,) in float32 (float64 for float64), (0,) without ``statistics``.

    Raises:
        ValueError, TypeError: naming the argument, what it must be and what it was.
    """
    input = cast(input)
    check_maps("input", [input])
    check_stride(stride)
    check_flag("statistics", statistics)
    (number,) = numbers_of(activation=activation)
    check_word("padding", padding, POOLS)
    kernel, c_in = _check_kernel(dw_weight), input.shape[1]
    c = c_in if expand_weight is None else dw_weight.shape[0]
    check_weight("dw_weight", dw_weight, [(c, 1, kernel, kernel)], input)
    if expand_weight is not None:
        check_weight("expand_weight", expand_weight, [(c, c_in, 1, 1)], input)
    if (scale is None) != (offset is None):
        raise ValueError("scale and offset must be given together")
    for name, t in (("scale", scale), ("offset", offset)):
        if t is not None:
            check_weight(name, t, [(c,)], input)
    if runs_reference("training_depthwise", [input, expand_weight, scale, offset, dw_weight]):
        return reference.training_depthwise(
            input,
            expand_weight,
            scale,
            offset,
            dw_weight,
            stride=stride,
            padding=padding,
            activation=activation,
            statistics=statistics,
        )
    pads, size = conv_geometry(input, kernel, stride, padding)
    weights = _floats(expand_weight, scale, offset, dw_weight)
    output, mean, deviations = run(
        "training_depthwise", input, *weights, stride, pads, size, number, statistics
    )
    return output, mean, deviations


@fake("training_depthwise")
def _fake_training_depthwise(
    input: Tensor,
    expand_weight: Tensor | None,
    scale: Tensor | None,
    offset: Tensor | None,
    dw_weight: Tensor,
    stride: int,
    padding: Sequence[int],
    size: Sequence[int],
    activation: int,
    statistics: bool,
) -> list[Tensor]:
    c = dw_weight.shape[0]
    rows = [dw_weight.new_empty(c if statistics else 0) for _ in range(2)]
    return [empty_map(input, c, *size), *rows]


@fake("training_depthwise_backward")
def _fake_training_depthwise_backward(
    grad: Tensor,
    grad_mean: Tensor,
    grad_squares: Tensor,
    output: Tensor,
    mean: Tensor,
    input: Tensor,
    *weights: Any,
) -> list[Tensor]:
    found = [empty_map(input, *input.shape[1:])]
    return [
        *found,
        *(input.new_empty(0 if t is None else t.shape, dtype=torch.float32) for t in weights[:4]),
    ]


@for_reference("training_depthwise")
def _training_depthwise_for_reference(given: dict[str, Any]) -> dict[str, Any]:
    kernel = given["dw_weight"].shape[-1]
    return given_padding(given, given["input"], kernel, given["stride"])


@backward("training_depthwise", "training_depthwise_backward", results_kept=lambda args: True)
def _training_depthwise_backward(
    ops: Any, args: Sequence[Any], grads: list[Tensor], results: list[Tensor]
) -> list[Tensor]:
    output, mean, _ = results
    return list(ops.training_depthwise_backward(*grads, output, mean, *args[:-1]))


def training_project(
    input: Tensor,
    scale: Tensor,
    offset: Tensor,
    squeeze: Sequence[Tensor] | None,
    project_weight: Tensor,
    *,
    activation: str = "swish",
    statistics: bool = True,
) -> tuple[Tensor, Tensor, Tensor]:
    """Scale and offset → activation → squeeze-excite → project 1×1, and statistics: for training.

    Args:
        input: (N, C, H, W).
        scale, offset: (C,), a batch norm in front of the activation.
        squeeze: (reduce_weight, reduce_bias, excite_weight, excite_bias) of squeeze-excite, the
            weights (R, C, 1, 1) and (C, R, 1, 1); None for none.
        project_weight: (C_out, C, 1, 1).
        activation: as for :func:`weighted_fusion`, here and in squeeze-excite.
        statistics: as for :func:`training_depthwise`.

    Returns:
        (N, C_out, H, W), and its statistics as for :func:`training_depthwise`.

    Raises:
        ValueError, TypeError: naming the argument, what it must be and what it was.
    """
    input = cast(input)
    check_maps("input", [input])
    check_flag("statistics", statistics)
    (number,) = numbers_of(activation=activation)
    c = input.shape[1]
    for name, t in (("scale", scale), ("offset", offset)):
        check_weight(name, t, [(c,)], input)
    if (
        not isinstance(project_weight, Tensor)
        or project_weight.dim() != 4
        or not len(project_weight)
    ):
        raise ValueError(
            f"project_weight must be (C_out, {c}, 1, 1) with C_out at least 1, "
            f"got {shape_of(project_weight)}"
        )
    check_weight("project_weight", project_weight, [(project_weight.shape[0], c, 1, 1)], input)
    if squeeze is not None:
        check_parts("squeeze", squeeze, SQUEEZE)
        r = length_of("reduce_bias", squeeze[1], "R")
        for name, t, shape in (
            ("reduce_weight", squeeze[0], (r, c, 1, 1)),
            ("reduce_bias", squeeze[1], (r,)),
            ("excite_weight", squeeze[2], (c, r, 1, 1)),
            ("excite_bias", squeeze[3], (c,)),
        ):
            check_weight(name, t, [shape], input)
    tensors = [scale, offset, project_weight, *(squeeze or ())]
    if runs_reference("training_project", [input, *tensors]):
        return reference.training_project(
            input,
            scale,
            offset,
            squeeze,
            project_weight,
            activation=activation,
            statistics=statistics,
        )
    # for None one empty tensor: an AOTInductor package would hand an empty list on as None
    parts = [scale.new_empty(0)] if squeeze is None else squeeze
    output, mean, deviations, _ = run(
        "training_project",
        input,
        *_floats(scale, offset),
        _floats(*parts),
        project_weight.float(),
        number,
        statistics,
    )
    return output, mean, deviations


@fake("training_project")
def _fake_training_project(
    input: Tensor,
    scale: Tensor,
    offset: Tensor,
    squeeze: Sequence[Tensor],
    project_weight: Tensor,
    activation: int,
    statistics: bool,
) -> list[Tensor]:
    n, c, h, w = input.shape
    c_out = project_weight.shape[0]
    rows = [scale.new_empty(c_out if statistics else 0) for _ in range(2)]
    pooled = scale.new_empty((n if len(squeeze) == 4 else 0, c))
    return [empty_map(input, c_out, h, w), *rows, pooled]


@fake("training_project_backward")
def _fake_training_project_backward(
    grad: Tensor,
    grad_mean: Tensor,
    grad_squares: Tensor,
    output: Tensor,
    mean: Tensor,
    pooled: Tensor,
    input: Tensor,
    scale: Tensor,
    offset: Tensor,
    squeeze: Sequence[Tensor],
    project_weight: Tensor,
    activation: int,
) -> list[Tensor]:
    weights = [scale, offset, *squeeze, project_weight]
    return [empty_map(input, *input.shape[1:]), *(t.new_empty(t.shape) for t in weights)]


@for_reference("training_project")
def _training_project_for_reference(given: dict[str, Any]) -> dict[str, Any]:
    squeeze = given["squeeze"]
    return {**given, "squeeze": squeeze if len(squeeze) == 4 else None}


@backward("training_project", "training_project_backward", results_kept=lambda args: True)
def _training_project_backward(
    ops: Any, args: Sequence[Any], grads: list[Tensor], results: list[Tensor]
) -> list[Tensor]:
    output, mean, _, pooled = results  # pooled, which is no result of the function, has no gradient
    return list(ops.training_project_backward(*grads[:3], output, mean, pooled, *args[:-1]))
