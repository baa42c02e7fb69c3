"""Triton kernels of the ops, forward and backward; importing this package needs Triton.

Every function takes the arguments of the operator of its name (csrc/torch/library.cpp): packed
float32 weights, numbers in the place of names, checked by :mod:`edet_kernels.ops`. The forwards are
the operators ``torch.ops.edet_kernels_triton``, for CUDA tensors and, in Triton's interpreter
(TRITON_INTERPRET=1), for CPU tensors. A backward takes the gradient of the result and the arguments
of the forward, and returns the gradients of its tensors.
"""

from __future__ import annotations

import torch

from .. import fake
from .bifpn import bifpn
from .device import INTERPRETED
from .fusion_node import fusion_node, fusion_node_backward
from .head import head
from .lateral import lateral, lateral_backward
from .separable_conv import separable_conv, separable_conv_backward
from .weighted_fusion import weighted_fusion, weighted_fusion_backward

NAMESPACE = "edet_kernels_triton"

for _function in (weighted_fusion, fusion_node, bifpn, separable_conv, lateral, head):
    _name = f"{NAMESPACE}::{_function.__name__}"
    _schema = torch.library.infer_schema(_function, mutates_args=())
    torch.library.define(_name, _schema, tags=[torch.Tag.needs_fixed_stride_order])
    torch.library.impl(_name, ["CUDA", "CPU"] if INTERPRETED else "CUDA", _function)
    torch.library.register_fake(_name, fake.FAKES[_function.__name__])

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
