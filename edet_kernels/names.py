"""The words of the ops' arguments and their limits: what every other module may know.

It imports nothing, so that everything can import it.
"""

Size = tuple[int, int]

# The position of a name is its number in the op schemas and in csrc/core/params.h.
FUSIONS = ("fast", "softmax", "unbounded", "sum")
POOLS = ("same", "symmetric")
ACTIVATIONS = ("none", "swish", "relu", "relu6", "hard_swish")
NMS_METHODS = ("hard", "gaussian")

#: The words of each argument that is a word for the functional API and a number for an operator.
WORDS = {
    "fusion": FUSIONS,
    "pool": POOLS,
    "activation": ACTIVATIONS,
    "pre_activation": ACTIVATIONS,
    "post_activation": ACTIVATIONS,
    "method": NMS_METHODS,
}

#: Inputs of one fusion node, and projections of one lateral, at most (csrc/core/params.h).
MAX_EDGES = 16

#: Every op of the functional API.
OPS = (
    "stem",
    "mbconv",
    "lateral",
    "weighted_fusion",
    "fusion_node",
    "bifpn",
    "separable_conv",
    "head",
    "training_node",
    "training_moments",
    "training_depthwise",
    "training_project",
    "nms",
    "detect",
)

#: The operators on maps of bytes (edet_kernels.int8).
INT8_OPS = (
    *("int8_quantize", "int8_dequantize", "int8_stem"),
    *("int8_mbconv", "int8_lateral", "int8_nodes"),
)

#: Those that return maps: they have gradients, and autocast casts their inputs.
MAP_OPS = tuple(op for op in OPS if op not in ("nms", "detect"))

#: Those that have Triton kernels.
TRITON_OPS = tuple(
    op
    for op in OPS
    if op
    not in (
        *("stem", "mbconv", "nms", "detect"),
        *("training_moments", "training_depthwise", "training_project"),
    )
)

#: Those that multiply: on CUDA, floats as TF32 where torch may.
TF32_OPS = ("mbconv", "lateral", "fusion_node", "bifpn", "separable_conv", "head")
