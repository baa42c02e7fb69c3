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

from .. import operators
from .bifpn import bifpn
from .device import INTERPRETED
from .fusion_node import fusion_node, fusion_node_backward
from .head import head
from .lateral import lateral, lateral_backward
from .separable_conv import separable_conv, separable_conv_backward
from .training_node import training_node, training_node_backward
from .weighted_fusion import weighted_fusion, weighted_fusion_backward


def _register(function: Callable[..., Any]) -> None:
    op = f"edet_kernels_triton::{function.__name__}"
    torch.library.define(op, torch.library.infer_schema(function, mutates_args=()))
    for device in ("cuda", "cpu") if INTERPRETED else ("cuda",):
        torch.library.impl(op, device, function)


for _function in (
    weighted_fusion,
    weighted_fusion_backward,
    fusion_node,
    fusion_node_backward,
    bifpn,
    separable_conv,
    separable_conv_backward,
    lateral,
    lateral_backward,
    head,
    training_node,
    training_node_backward,
):
    _register(_function)

operators.register("edet_kernels_triton")

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
    "training_node",
    "training_node_backward",
    "weighted_fusion",
    "weighted_fusion_backward",
]
