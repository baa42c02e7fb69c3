"""The functional API: one function per kernel; arguments are checked, the backend is chosen.

Each file holds a family of ops, and of each op all that is Python: the public function, the fake
kernel (shapes and dtypes of the operator's results) and the backward pass by kernels. The op's
meaning is the function of its name in :mod:`edet_kernels.reference`.
"""

from .backbone import mbconv, stem
from .block_training import training_depthwise, training_moments, training_project
from .detection import detect, nms
from .fusion import bifpn, fusion_node, weighted_fusion
from .layers import head, lateral, separable_conv
from .training import training_node

__all__ = [
    "bifpn",
    "detect",
    "fusion_node",
    "head",
    "lateral",
    "mbconv",
    "nms",
    "separable_conv",
    "stem",
    "training_depthwise",
    "training_moments",
    "training_node",
    "training_project",
    "weighted_fusion",
]
