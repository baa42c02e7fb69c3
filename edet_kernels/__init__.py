"""Fused kernels for EfficientDet as PyTorch functions; importing needs no compiler and no GPU."""

from . import int8
from . import library as _library
from . import operators as _operators
from .backend import BackendError, Choice, backend, current_backend, explain
from .ops import (
    bifpn,
    detect,
    fusion_node,
    head,
    lateral,
    mbconv,
    nms,
    separable_conv,
    stem,
    training_depthwise,
    training_moments,
    training_node,
    training_project,
    weighted_fusion,
)
from .packing import (
    pack_depthwise,
    pack_depthwise_int8,
    pack_pointwise,
    pack_pointwise_int8,
    pack_stem,
    unpack_depthwise,
    unpack_depthwise_int8,
    unpack_pointwise,
    unpack_pointwise_int8,
    unpack_stem,
)

__version__ = "0.1.0"

_library.load()  # whose operators are there from now on
for _namespace in ("edet_kernels", "edet_kernels_tf32"):
    _operators.register(_namespace)

__all__ = [
    "BackendError",
    "Choice",
    "backend",
    "bifpn",
    "current_backend",
    "detect",
    "explain",
    "fusion_node",
    "head",
    "int8",
    "lateral",
    "mbconv",
    "nms",
    "pack_depthwise",
    "pack_depthwise_int8",
    "pack_pointwise",
    "pack_pointwise_int8",
    "pack_stem",
    "separable_conv",
    "stem",
    "training_depthwise",
    "training_moments",
    "training_node",
    "training_project",
    "unpack_depthwise",
    "unpack_depthwise_int8",
    "unpack_pointwise",
    "unpack_pointwise_int8",
    "unpack_stem",
    "weighted_fusion",
]
