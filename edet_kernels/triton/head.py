"""head in Triton: its layers one after the other, each one launch of separable_conv."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from .separable_conv import separable_conv


def head(
    inputs: Sequence[Tensor],
    dw_weights: Sequence[Tensor],
    pw_weights: Sequence[Tensor],
    scales: Sequence[Tensor],
    shifts: Sequence[Tensor],
    activation: int,
) -> list[Tensor]:
    """The operator ``head``; see :func:`edet_kernels.head`."""
    maps, layers = list(inputs), list(zip(dw_weights, pw_weights, scales, shifts, strict=True))
    for i, layer in enumerate(layers):
        maps = separable_conv(maps, *layer, 0 if i == len(layers) - 1 else activation)
    return maps
