"""Bad arguments: each is refused with an error that names it, what is needed and what came."""

import inspect
import re

import pytest
import torch

import edet_kernels
from edet_kernels.testing.samples import Graph, sample

MAP = torch.randn(2, 24, 9, 6)  # like the first map of a sample
FLOATS = torch.ones(24)
LONGS = torch.ones(24, dtype=torch.int64)

FUSION_OPS = ("weighted_fusion", "fusion_node", "bifpn")

# For some ops: argument, bad value, and the error, in which .* is any text. Where its type is .*,
# ValueError and TypeError will both do.
TABLE = {
    "weighted_fusion fusion_node bifpn separable_conv head": [
        ("inputs", [], "ValueError: inputs must be a non-empty list of maps, got none"),
        ("inputs", MAP, "ValueError: inputs must be .*list of maps, got .*(2, 24, 9, 6)"),
        ("inputs", None, ".*: inputs must be .*list of maps, got None"),
        ("inputs", [MAP, None], "TypeError: inputs[1] must be a tensor, got NoneType"),
        ("inputs", [MAP[0]], "ValueError: inputs[0] must be (N, C, H, W).*, got (24, 9, 6)"),
        ("inputs", [MAP[:, :0]], "ValueError: inputs[0] must be .*C.* ≥ 1, got (2, 0, 9, 6)"),
        ("inputs", [MAP[:, :, :0]], "ValueError: inputs[0] must be .*got (2, 24, 0, 6)"),
        ("inputs", [MAP.int()], "TypeError: inputs[0] must be a float tensor, got torch.int32"),
        ("inputs", [MAP + 1j], "TypeError: inputs[0] must be a float.* got torch.complex64"),
        ("inputs", [MAP.to_sparse()], "ValueError: inputs[0] must be a dense.*got.*sparse_coo"),
        ("inputs", [MAP, MAP.half()], "TypeError: inputs[1] must be torch.float32.*float16"),
        ("inputs", [MAP, MAP.to("meta")], "ValueError: inputs[1] must be on cpu.*, got meta"),
        ("inputs", [MAP, MAP[:1]], "ValueError: inputs[1] must have batch 2.*, got 1"),
        ("inputs", [MAP, MAP[:, 1:]], "ValueError: inputs[1] must have 24 channels.*, got 23"),
    ],
    "lateral mbconv": [
        ("input", None, "TypeError: input.* must be a tensor, got NoneType"),
        ("input", MAP[0], "ValueError: input.* must be (N, C, H, W).*, got (24, 9, 6)"),
        ("input", MAP.int(), "TypeError: input.* must be a float tensor, got torch.int32"),
    ],
    "weighted_fusion fusion_node bifpn": [
        ("fusion", "mean", "ValueError: fusion must be one of fast, softmax.*, got 'mean'"),
        ("fusion", 0, "ValueError: fusion must be one of fast, softmax.*, got 0"),
        ("fusion", "sum", "ValueError: edge_weights must be None for fusion 'sum', got"),
        ("pool", "valid", "ValueError: pool must be one of same, symmetric, got 'valid'"),
        ("edge_weights", None, "ValueError: edge_weights must be given.*'fast', got None"),
        ("edge_weights", [1.0], "TypeError: edge_weights must be a tensor, got list"),
        ("edge_weights", FLOATS[:4], "ValueError: edge_weights must be .*3.* got (4,)"),
    ],
    "weighted_fusion fusion_node": [
        ("edge_weights", LONGS[:3], "TypeError: edge_weights must be a float.*torch.int64"),
        ("edge_weights", FLOATS[:3].to("meta"), "ValueError: edge_weights must be on cpu.*meta"),
        ("edge_weights", FLOATS[:6].view(3, 2), "ValueError: edge_.*(3,) or (3, 24), got (3, 2)"),
        ("size", (0, 6), "ValueError: size must be two positive integers.*, got (0, 6)"),
        ("size", (9, 6, 1), "ValueError: size must be two positive integers.*, got (9, 6, 1)"),
        ("size", (9.0, 6), ".*: size must be two positive integers.*, got (9.0, 6)"),
        ("size", 9, ".*: size must be two positive integers.*, got 9"),
        ("size", (10, 2), "ValueError: inputs[0] must grow or shrink to (10, 2).*got .*(9, 6)"),
    ],
    "fusion_node separable_conv": [
        ("dw_weight", None, "TypeError: dw_weight must be a tensor, got NoneType"),
        ("dw_weight", FLOATS, "ValueError: dw_weight must be (24, 1, 3, 3) or (9, 24), got (24,)"),
        ("dw_weight", LONGS.expand(9, 24), "TypeError: dw_weight must be a float.*torch.int64"),
        ("dw_weight", FLOATS.expand(9, 24).to("meta"), "ValueError: dw_weight .*cpu.*got meta"),
        ("pw_weight", None, "TypeError: pw_weight must be a tensor, got NoneType"),
        ("pw_weight", FLOATS, "ValueError: pw_weight must be (27, 24, 1, 1) or (2, 24, 16), got"),
        ("scale", None, ".*: scale must be .*, got NoneType"),
        ("scale", FLOATS.sum(), "ValueError: scale must be .*, got ()"),
        ("shift", None, ".*: shift must be .*, got NoneType"),
        ("shift", FLOATS, "ValueError: shift must be (27,), got (24,)"),
    ],
    "separable_conv": [
        ("scale", MAP[:, 0, 0], "ValueError: scale must be (C_out,) or (3, C_out), got (2, 6)"),
        ("shift", MAP[:, 0, 0], "ValueError: shift must be (C_out,) or (3, C_out), got (2, 6)"),
    ],
    "bifpn": [
        ("nodes", [], "ValueError: nodes must be a non-empty list of tuples, got none"),
        ("nodes", [(0, 1, 3)], "ValueError: nodes[0] must name .*(0 to 2), got (0, 1, 3)"),
        ("nodes", [(0, 1, -1)], "ValueError: nodes[0] must name .*(0 to 2), got (0, 1, -1)"),
        ("nodes", [()], "ValueError: nodes[0] must be a non-empty list of ids, got none"),
        ("nodes", [0], ".*: nodes[0] must .*, got 0"),
        ("nodes", None, ".*: nodes must .*, got None"),
        ("sizes", [(9, 6)] * 2, "ValueError: sizes must hold one.*, got 2 for 1 nodes"),
        ("sizes", [(9,)], "ValueError: sizes[0] must be two positive integers.*, got (9,)"),
        ("sizes", [9], ".*: sizes[0] must be two positive integers.*, got 9"),
        ("sizes", [(10, 2)], "ValueError: nodes[0], edge 0, must grow or shrink to (10, 2).*"),
        ("outputs", [2], "ValueError: outputs must be ids of nodes (3 to 3), got 2"),
        ("outputs", [4], "ValueError: outputs must be ids of nodes (3 to 3), got 4"),
        ("outputs", 3, ".*: outputs must .*, got 3"),
        ("dw_weight", FLOATS, "ValueError: dw_weight must be (1, 9, 24), got (24,)"),
        ("pw_weight", FLOATS, "ValueError: pw_weight must be (1, 2, 24, 16), got (24,)"),
        ("scale", FLOATS, "ValueError: scale must be (1, 24), got (24,)"),
        ("shift", FLOATS, "ValueError: shift must be (1, 24), got (24,)"),
    ],
    "lateral": [
        ("pw_weights", [], "ValueError: pw_weights must be a non-empty list of tensors, got none"),
        ("scales", [FLOATS], "ValueError: pw_weights, scales and.*one length, got 2, 1 and 2"),
        ("pw_weights", MAP[:, :, :1, :1], ".*: pw_weights.* must be .*list.*"),
        ("pw_weights", None, ".*: pw_weights.* must be .*list.*"),
        ("pw_weights", [FLOATS, None], "ValueError: pw_weight.* must be (24, 24, 1, 1).*(24,)"),
        ("pooled", -1, "ValueError: pooled must be an integer of 0 to 16, got -1"),
        ("pooled", 1.0, ".*: pooled must be an integer of 0 to 16, got 1.0"),
        ("pool", "valid", "ValueError: pool must be one of same, symmetric, got 'valid'"),
    ],
    "head": [
        ("dw_weights", [], "ValueError: dw_weights must be a non-empty list of tensors, got none"),
        ("dw_weights", None, ".*: dw_weights.* must be .*list.*"),
        ("dw_weights", [FLOATS] * 3, "ValueError: dw_weights.* must be .*(9, 24), got (24,)"),
        ("scales", [torch.ones(2, 24)] * 3, "ValueError: scales.* (3, C_out), got (2, 24)"),
    ],
    "mbconv": [
        ("stride", 3, "ValueError: stride must be 1 or 2, got 3"),
        ("padding", "valid", "ValueError: padding must be one of same, symmetric, got 'valid'"),
        ("expand", [FLOATS], "ValueError: expand must be (pw_weight, scale, shift), got 1 .*"),
        ("depthwise", [FLOATS], "ValueError: depthwise must be (dw_weight, scale, shift), got 1"),
        ("squeeze", [FLOATS], "ValueError: squeeze must be (reduce_weight, .*), got 1 .*"),
        ("project", [FLOATS] * 4, "ValueError: project must be (pw_weight, .*), got 4 .*"),
        ("depthwise", [FLOATS] * 3, "ValueError: dw_weight must be .*3×3 or 5×5.*, got (24,)"),
        ("project", [FLOATS] * 3, "ValueError: pw_weight must be (24, 48, 1, 1) or .*, got (24,)"),
    ],
    "stem": [
        ("image", None, ".*: image must be (N, 3, H, W), got NoneType"),
        ("image", MAP, "ValueError: image must be (N, 3, H, W), got (2, 24, 9, 6)"),
        ("image", MAP[:, :3, :0], "ValueError: image must have at least one pixel, got .*"),
        ("image", MAP[:, :3].int(), "TypeError: image must be uint8 or float, got torch.int32"),
        ("dtype", torch.float16, "TypeError: dtype must be .*torch.float32.*, got torch.float16"),
        ("weight", FLOATS, "ValueError: weight must be (24, 3, 3, 3) or (2, 27, 16), got (24,)"),
        ("scale", None, ".*: scale must be .*, got NoneType"),
        ("shift", FLOATS[:5], "ValueError: shift must be (24,), got (5,)"),
        ("mean", None, "ValueError: mean and std must be given together"),
        ("std", FLOATS, "ValueError: std must be (3,), got (24,)"),
        ("padding", "valid", "ValueError: padding must be one of same, symmetric, got 'valid'"),
    ],
    "nms detect": [
        ("method", "soft", "ValueError: method must be one of hard, gaussian, got 'soft'"),
        ("sigma", 0.0, "ValueError: sigma must be positive, got 0.0"),
        ("sigma", torch.nan, "ValueError: sigma must be positive, got nan"),
        ("max_detections", 0, "ValueError: max_detections must be .*, got 0"),
        ("max_detections", 1.5, ".*: max_detections must be .*, got 1.5"),
        ("max_detections", None, ".*: max_detections must be .*, got None"),
        ("iou_threshold", torch.nan, "ValueError: iou_threshold must .*, got nan"),
        ("iou_threshold", "0.5", ".*: iou_threshold must .*, got '0.5'"),
        ("score_threshold", torch.nan, "ValueError: score_threshold must .*, got nan"),
        ("class_agnostic", 1, "TypeError: class_agnostic must be True or False, got 1"),
        ("class_agnostic", None, "TypeError: class_agnostic must be True or False, got None"),
    ],
    "nms": [
        ("boxes", None, ".*: boxes must be .*, got NoneType"),
        ("boxes", MAP[0, 0], "ValueError: boxes must be (B, N, 4), got (9, 6)"),
        ("boxes", MAP[0], "ValueError: boxes must be (B, N, 4), got (24, 9, 6)"),
        ("boxes", MAP[0, ..., :4].half(), "TypeError: boxes must be float32 or.*torch.float16"),
        ("scores", None, ".*: scores must be .*, got NoneType"),
        ("scores", FLOATS, "ValueError: scores must be (2, 40), got (24,)"),
        ("scores", torch.ones(2, 40).double(), "TypeError: scores must be torch.float32.*64"),
        ("labels", torch.ones(2, 40), "TypeError: labels must be torch.int64, got torch.float32"),
        ("labels", LONGS[:1].expand(2, 40).to("meta"), "ValueError: labels must be on cpu.*meta"),
    ],
    "detect": [
        ("class_outputs", [], "ValueError: class_outputs must be a non-empty list.*, got none"),
        ("class_outputs", [MAP] * 3, "ValueError: box_outputs must have the levels.*(2, 24, 9, 6)"),
        ("box_outputs", [MAP[:, :8]], "ValueError: box_outputs must have the levels.*(2, 8, 9, 6)"),
        ("box_outputs", [MAP[:, :7]], "ValueError: class_outputs and box.*, got 10 and 7"),
        ("anchors", None, "TypeError: anchors must be a tensor, got NoneType"),
        ("anchors", FLOATS, "ValueError: anchors must be (116, 4), got (24,)"),
        ("limits", FLOATS, "ValueError: limits must be (2, 2), got (24,)"),
        ("max_candidates", 0, "ValueError: max_candidates must be .*, got 0"),
    ],
}

CASES = [
    pytest.param(op, *row, id=f"{op}-{row[0]}-{row[2]}")
    for ops, rows in TABLE.items()
    for op in ops.split()
    for row in rows
]

ACTIVATIONS = [
    ("weighted_fusion", "activation"),
    ("fusion_node", "pre_activation"),
    ("fusion_node", "post_activation"),
    ("bifpn", "pre_activation"),
    ("bifpn", "post_activation"),
    ("separable_conv", "activation"),
    ("head", "activation"),
    ("mbconv", "activation"),
    ("stem", "activation"),
]

pytestmark = pytest.mark.usefixtures("kernels_only")


def by_name(call):
    """All arguments of ``call`` by their names."""
    names = inspect.signature(getattr(edet_kernels, call.op)).parameters
    return dict(zip(names, (call.maps, *call.weights), strict=False)) | call.options


def small(op):
    """The arguments of a sample of ``op``, a single node for ``bifpn``."""
    graph = Graph([(9, 6), (5, 3), (17, 12)], [(0, 1, 2)], [(9, 6)], [3])
    return by_name(sample(op, **({"graph": graph} if op == "bifpn" else {})))


def assert_refused(error, op, arguments):
    """Asserts that a call raises ``error``, written as in the table."""
    kind, _, message = error.partition(": ")
    accepted = {"ValueError": ValueError, "TypeError": TypeError}.get(kind, (ValueError, TypeError))
    pattern = ".*".join(re.escape(part) for part in message.split(".*"))
    with pytest.raises(accepted, match="(?s)^" + pattern):
        getattr(edet_kernels, op)(**arguments)


@pytest.mark.parametrize(("op", "argument", "value", "error"), CASES)
def test_bad_argument(op, argument, value, error):
    assert_refused(error, op, small(op) | {argument: value})


@pytest.mark.parametrize(("op", "argument"), ACTIVATIONS)
def test_unknown_activation(op, argument):
    error = f"ValueError: {argument} must be one of none, swish, .*, hard_swish, got 'gelu'"
    assert_refused(error, op, small(op) | {argument: "gelu"})


@pytest.mark.parametrize("change", [{"stride": 2}, {"out_channels": 5}], ids=str)
def test_residual_needs_one_shape(change):
    call = sample("mbconv", **change)
    error = "ValueError: residual must be False unless stride is 1 and C_out is C_in (24), got .*"
    assert_refused(error, "mbconv", by_name(call) | {"residual": True})


@pytest.mark.usefixtures("backend")
@pytest.mark.parametrize("op", [*FUSION_OPS, "lateral"])
def test_more_than_16_edges_or_projections(op):
    options = {
        "bifpn": {"graph": Graph([(9, 6)], [(0,) * 17], [(9, 6)], [1])},
        "lateral": {"out_channels": (8,) * 17},
    }
    call = sample(op, **options.get(op, {"sizes": [(9, 6)] * 17}))
    with pytest.raises(ValueError, match=r"(inputs|nodes|pw_weights).* 16.* got 17"):
        call()


def test_nothing_is_written_before_a_refusal():
    # the last of the arguments is bad: nothing may have happened to the others
    arguments = small("fusion_node")
    before = [x.clone() for x in arguments["inputs"]]
    assert_refused(".*: shift must be .*", "fusion_node", arguments | {"shift": FLOATS})
    assert all(torch.equal(x, y) for x, y in zip(arguments["inputs"], before, strict=True))


@pytest.mark.parametrize(
    ("function", "arguments", "message"),
    [
        ("pack_depthwise", (torch.ones(8, 2, 3, 3),), r"\(C, 1, k, k\), got \(8, 2, 3, 3\)"),
        ("pack_depthwise", (torch.ones(8, 1, 3, 5),), r"\(C, 1, k, k\), got \(8, 1, 3, 5\)"),
        ("pack_depthwise", (torch.ones(9, 8),), r"\(C, 1, k, k\), got \(9, 8\)"),
        ("pack_pointwise", (torch.ones(8, 8, 3, 3),), r"\(C_out, C_in, 1, 1\), got \(8, 8, 3, 3\)"),
        ("pack_pointwise", (torch.ones(8, 8),), r"\(C_out, C_in, 1, 1\), got \(8, 8\)"),
        ("pack_stem", (torch.ones(8, 4, 3, 3),), r"\(C_out, 3, 3, 3\), got \(8, 4, 3, 3\)"),
        ("unpack_depthwise", (torch.ones(8, 8),), r"\(k·k, C\), got \(8, 8\)"),
        ("unpack_depthwise", (torch.ones(9),), r"\(k·k, C\), got \(9,\)"),
        ("unpack_pointwise", (torch.ones(8, 8), 8), r"got \(8, 8\)"),
        ("unpack_pointwise", (torch.ones(1, 8, 16), 17), r"out_channels must .* got 17"),
        ("unpack_stem", (torch.ones(1, 26, 16), 8), r"got \(1, 26, 16\)"),
    ],
)
def test_bad_weight_to_pack(function, arguments, message):
    with pytest.raises(ValueError, match=message):
        getattr(edet_kernels, function)(*arguments)
