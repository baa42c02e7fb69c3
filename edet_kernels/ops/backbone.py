"""The blocks of the backbone: stem and mbconv."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from .. import reference
from ..autocast import autocast_dtype, cast
from ..backend import runs_reference
from ..fakes import empty_map, fake
from ..names import POOLS, Size
from ..operators import for_reference, run
from ..packing import PANEL, as_packed_depthwise, as_packed_pointwise, pack_stem
from .checks import (
    check_flag,
    check_image,
    check_maps,
    check_normalisation,
    check_out,
    check_parts,
    check_stride,
    check_weight,
    check_word,
    length_of,
    numbers_of,
    shape_of,
)

#: What squeeze-excite is given.
SQUEEZE = "reduce_weight, reduce_bias, excite_weight, excite_bias"


def conv_geometry(x: Tensor, kernel: int, stride: int, padding: str) -> tuple[list[int], Size]:
    """Leading padding (top, left) and output size of a convolution."""
    axes = [reference.conv_geometry(n, kernel, stride, padding) for n in x.shape[-2:]]
    return [before for before, _ in axes], (axes[0][1], axes[1][1])


def given_padding(given: dict[str, Any], x: Tensor, kernel: int, stride: int) -> dict[str, Any]:
    """``given`` with the name of a padding for its leading pixels and the output's size."""
    before, size = given.pop("padding"), given.pop("size")
    same = [reference.conv_geometry(n, kernel, stride, "same") for n in x.shape[-2:]]
    wanted = list(zip(before, size, strict=True))
    return {**given, "padding": "same" if same == wanted else "symmetric"}


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
    dtype: torch.dtype | None = None,
) -> Tensor:
    """The first layer: normalise, 3×3 stride-2 convolution, folded batch norm, activation.

    Args:
        image: (N, 3, H, W), uint8 or float, of any strides.
        weight: (C_out, 3, 3, 3), or packed by :func:`pack_stem`.
        scale, shift: (C_out,) folded batch norm.
        mean, std: (3,), in the image's own range; pixels become (x − mean)/std before the zero
            padding. None: the image is already normalised.
        padding: ``same`` (TensorFlow's) or ``symmetric`` (1).
        activation: as for :func:`weighted_fusion`.
        dtype: of the result; the image's own dtype when None, float32 for uint8.

    Returns:
        (N, C_out, ⌈H/2⌉, ⌈W/2⌉), channels_last.

    Raises:
        ValueError, TypeError: naming the argument, what it must be and what it was.
    """
    check_image(image)
    if image.dtype != torch.uint8 and not image.is_floating_point():
        raise TypeError(f"image must be uint8 or float, got {image.dtype}")
    if dtype is not None and not (isinstance(dtype, torch.dtype) and dtype.is_floating_point):
        raise TypeError(f"dtype must be a float dtype or None, got {dtype!r}")
    low = autocast_dtype(image)
    if low is not None:
        image, dtype = cast(image), low
    dtype = dtype or (image.dtype if image.is_floating_point() else torch.float32)
    if image.is_floating_point() and image.dtype != dtype:
        raise TypeError(f"dtype must be the image's ({image.dtype}), got {dtype}")
    (number,) = numbers_of(activation=activation)
    check_word("padding", padding, POOLS)
    c_out = length_of("scale", scale)
    check_weight("scale", scale, [(c_out,)], image)
    check_weight("shift", shift, [(c_out,)], image)
    check_weight("weight", weight, [(c_out, 3, 3, 3), (-(-c_out // PANEL), 27, PANEL)], image)
    check_normalisation(mean, std, image)
    pads, size = conv_geometry(image, 3, 2, padding)
    like = image if image.is_floating_point() else scale.to(dtype)
    if runs_reference("stem", [like, image, weight, scale, shift, mean, std]):
        return reference.stem(
            image,
            weight,
            scale,
            shift,
            mean=mean,
            std=std,
            padding=padding,
            activation=activation,
            dtype=dtype,
        )
    return run(
        "stem",
        image,
        (pack_stem(weight) if weight.dim() == 4 else weight).float(),
        scale.float(),
        shift.float(),
        None if mean is None else mean.float(),
        None if std is None else std.float(),
        pads,
        size,
        number,
        dtype,
    )


@fake("stem")
def _fake_stem(
    image: Tensor,
    weight: Tensor,
    scale: Tensor,
    shift: Tensor,
    mean: Tensor | None,
    std: Tensor | None,
    padding: Sequence[int],
    size: Sequence[int],
    activation: int,
    dtype: torch.dtype,
) -> Tensor:
    return empty_map(image, scale.shape[0], *size, dtype=dtype)


@for_reference("stem")
def _stem_for_reference(given: dict[str, Any]) -> dict[str, Any]:
    return given_padding(given, given["image"], 3, 2)


def _check_mbconv(
    input: Tensor,
    expand: Sequence[Tensor] | None,
    depthwise: Sequence[Tensor],
    squeeze: Sequence[Tensor] | None,
    project: Sequence[Tensor],
    stride: int,
    residual: bool,
) -> int:
    """Checks the parts of an inverted residual block; the side of its depthwise kernel."""
    check_stride(stride)
    check_flag("residual", residual)
    check_parts("depthwise", depthwise, "dw_weight, scale, shift")
    check_parts("project", project, "pw_weight, scale, shift")
    c_in, c_mid = input.shape[1], length_of("depthwise scale", depthwise[1], "C_mid")
    if expand is not None:
        check_parts("expand", expand, "pw_weight, scale, shift")
        check_out(expand[1], expand[2], expand[0], c_in, input)
    dw = depthwise[0]
    kernel = dw.shape[-1] if dw.dim() == 4 else {9: 3, 25: 5}.get(dw.numel() // c_mid, 0)
    if kernel not in (3, 5):
        raise ValueError(f"dw_weight must be a 3×3 or 5×5 depthwise weight, got {shape_of(dw)}")
    expected = c_in if expand is None else expand[1].shape[0]
    shapes = [(expected, 1, kernel, kernel), (kernel * kernel, expected)]
    check_weight("dw_weight", dw, shapes, input)
    for name, t in (("scale", depthwise[1]), ("shift", depthwise[2])):
        check_weight(f"depthwise {name}", t, [(c_mid,)], input)
    if squeeze is not None:
        check_parts("squeeze", squeeze, SQUEEZE)
        check_out(squeeze[1], squeeze[1], squeeze[0], c_mid, input)
        check_out(squeeze[3], squeeze[3], squeeze[2], squeeze[1].shape[0], input)
    check_out(project[1], project[2], project[0], c_mid, input)
    if residual and (stride != 1 or project[1].shape[0] != c_in):
        raise ValueError(
            f"residual must be False unless stride is 1 and C_out is C_in ({c_in}), "
            f"got stride {stride} and C_out {project[1].shape[0]}"
        )
    return kernel


def _packed(parts: Sequence[Tensor] | None, like: Tensor) -> list[Tensor]:
    """Pointwise weights and the vectors that follow them, for the operator.

    For None one empty tensor: an AOTInductor package would hand an empty list on as None.
    """
    if parts is None:
        return [like.new_empty(0, dtype=torch.float32)]
    tensors = [as_packed_pointwise(t) if t.dim() == 4 else t for t in parts]
    return [t.float() for t in tensors]


def _part(tensors: Sequence[Tensor]) -> Sequence[Tensor] | None:
    """The inverse of :func:`_packed`, as far as None goes."""
    return None if not tensors or tensors[0].numel() == 0 else tensors


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
    residual: bool = False,
) -> Tensor:
    """An inverted residual block of EfficientNet (Tan and Le 2019) with folded batch norms.

    expand 1×1 → activation → depthwise k×k → activation → squeeze-excite → project 1×1 (+ input).

    Args:
        input: (N, C_in, H, W).
        expand: (pw_weight, scale, shift) with C_mid outputs, or None when C_mid is C_in.
        depthwise: (dw_weight, scale, shift); dw_weight (C_mid, 1, k, k) or packed, k 3 or 5.
        squeeze: (reduce_weight, reduce_bias, excite_weight, excite_bias) of squeeze-excite, the
            weights (R, C_mid, 1, 1) and (C_mid, R, 1, 1) or packed; None for none.
        project: (pw_weight, scale, shift) with C_out outputs.
        stride: 1 or 2, of the depthwise convolution.
        padding: ``same`` (TensorFlow's) or ``symmetric`` (k//2).
        activation: as for :func:`weighted_fusion`.
        residual: add ``input``; needs stride 1 and C_out = C_in.

    Returns:
        (N, C_out, ⌈H/stride⌉, ⌈W/stride⌉), channels_last.

    Raises:
        ValueError, TypeError: naming the argument, what it must be and what it was.
    """
    input = cast(input)
    check_maps("input", [input])
    (number,) = numbers_of(activation=activation)
    check_word("padding", padding, POOLS)
    kernel = _check_mbconv(input, expand, depthwise, squeeze, project, stride, residual)
    pads, size = conv_geometry(input, kernel, stride, padding)
    tensors = [input, *(expand or ()), *depthwise, *(squeeze or ()), *project]
    if runs_reference("mbconv", tensors):
        return reference.mbconv(
            input,
            expand,
            depthwise,
            squeeze,
            project,
            stride=stride,
            padding=padding,
            activation=activation,
            residual=residual,
        )
    return run(
        "mbconv",
        input,
        _packed(expand, depthwise[1]),
        [as_packed_depthwise(depthwise[0]).float(), *(t.float() for t in depthwise[1:])],
        _packed(squeeze, depthwise[1]),
        _packed(project, depthwise[1]),
        stride,
        pads,
        size,
        number,
        residual,
    )


@fake("mbconv")
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
    return empty_map(input, project[1].shape[0], *size)


@for_reference("mbconv")
def _mbconv_for_reference(given: dict[str, Any]) -> dict[str, Any]:
    kernel = 3 if given["depthwise"][0].shape[0] == 9 else 5
    given = given_padding(given, given["input"], kernel, given["stride"])
    return {**given, "expand": _part(given["expand"]), "squeeze": _part(given["squeeze"])}
