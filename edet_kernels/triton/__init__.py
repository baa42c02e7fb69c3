"""Triton kernels of the ops, forward and backward; importing this package needs Triton.

Every function takes the arguments of the operator of its name (csrc/torch/library.cpp): packed
float32 weights, numbers in the place of names, checked by :mod:`edet_kernels.ops`. A backward takes
the gradient of the result and the arguments of the forward, and returns the gradients of all
arguments that may be tensors, in order, lists flattened. All are operators of
``torch.ops.edet_kernels_triton``, for CUDA tensors and, in Triton's interpreter
(TRITON_INTERPRET=1), for CPU tensors.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from .. import autograd, fake
from .bifpn import bifpn
from .device import INTERPRETED
from .fusion_node import fusion_node, fusion_node_backward
from .head import head
from .lateral import lateral, lateral_backward
from .separable_conv import separable_conv, separable_conv_backward
from .weighted_fusion import weighted_fusion, weighted_fusion_backward


def _fake_backward(grad: Any, *arguments: Any) -> list[Tensor]:
    """A map like each map, a float32 weight like each weight, an empty tensor for None."""
    flat = [t for a in arguments for t in (a if isinstance(a, (list, tuple)) else [a])]
    found = []
    for t in flat:
        if t is None:
            first = grad if isinstance(grad, Tensor) else grad[0]
            found.append(first.new_empty(0))
        elif isinstance(t, Tensor) and t.dim() == 4:
            found.append(torch.empty_like(t, memory_format=torch.channels_last))
        elif isinstance(t, Tensor):
            found.append(torch.empty(t.shape, device=t.device))
    return found


def _register(function: Callable[..., Any], fake_function: Callable[..., Any]) -> None:
    name = f"edet_kernels_triton::{function.__name__}"
    torch.library.define(name, torch.library.infer_schema(function, mutates_args=()))
    for device in ("cuda", "cpu") if INTERPRETED else ("cuda",):
        torch.library.impl(name, device, function)
    torch.library.register_fake(name, fake_function)


for _forward in (weighted_fusion, fusion_node, bifpn, separable_conv, lateral, head):
    _register(_forward, fake.FAKES[_forward.__name__])
for _backward in (
    weighted_fusion_backward,
    fusion_node_backward,
    separable_conv_backward,
    lateral_backward,
):
    _register(_backward, _fake_backward)

autograd.register("edet_kernels_triton")

__all__ = [
    "INTERPRETED",
    "bifpn",
    "fusion_node",
    "fusion_node_backward",
    "head",
    "lateral",
    "lateral_backward",
    "separable_conv",
    "separable_conv_backward",
    "weighted_fusion",
    "weighted_fusion_backward",
]
