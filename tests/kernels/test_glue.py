"""The compiled ops called past their Python checks, as exported graphs do: errors, no crashes."""

import pytest
import torch

from edet_kernels import library, packing

pytestmark = pytest.mark.skipif(not library.load(), reason=library.status())

MAP = torch.zeros(1, 16, 4, 4)
ONE = torch.ones(16)
DW = packing.pack_depthwise(torch.zeros(16, 1, 3, 3))
PW = packing.pack_pointwise(torch.zeros(16, 16, 1, 1))
EMPTY = torch.zeros(0)
NODE = (DW, PW, ONE, ONE)
BLOCK = ([], [DW, ONE, ONE], [], [PW, ONE, ONE])

CALLS = {
    "maps that differ in channels": (
        "weighted_fusion", ([MAP, MAP[:, :8]], None, [4, 4], 3, 0, 0), "one batch, channel count"),
    "no edge weights": ("weighted_fusion", ([MAP], None, [4, 4], 0, 0, 0), "edge_weights must be"),
    "half a size": ("weighted_fusion", ([MAP], None, [4], 3, 0, 0), "size must be two numbers"),
    "no edge weights of a node": (
        "fusion_node", ([MAP], None, *NODE, [4, 4], 0, 0, 0, 0), "edge_weights must be"),
    "no nodes": ("bifpn", ([MAP], None, *NODE, [], [], [], [], 3, 0, 0, 0), "edge_counts must"),
    "half a padding": ("mbconv", (MAP, *BLOCK, 1, [1], [4, 4], 0, False), "padding must be two"),
    "no channels": (
        "mbconv", (MAP, [], [EMPTY] * 3, [], [EMPTY] * 3, 1, [1, 1], [4, 4], 0, False),
        "must have channels"),
    "no classes": (
        "detect", ([MAP[:, :0]], [MAP], torch.zeros(64, 4), None, 0, 0.5, 0.5, 0.0, 10, 10),
        "A·classes"),
    "half a stem size": (
        "stem", (MAP[:, :3], torch.zeros(1, 27, 16), ONE, ONE, None, None, [0, 0], [2], 0,
                 torch.float32), "size must be two"),
}  # fmt: skip


@pytest.mark.parametrize("name", CALLS)
def test_refused(name: str) -> None:
    op, arguments, message = CALLS[name]
    with pytest.raises(RuntimeError, match=message):
        getattr(torch.ops.edet_kernels, op)(*arguments)


def test_the_arguments_are_otherwise_right() -> None:
    """So that the refusals above are for the reason that they give."""
    ops = torch.ops.edet_kernels
    ops.weighted_fusion([MAP], None, [4, 4], 3, 0, 0)
    ops.fusion_node([MAP], None, *NODE, [4, 4], 3, 0, 0, 0)
    ops.bifpn([MAP], None, *NODE, [0], [1], [4, 4], [1], 3, 0, 0, 0)
    ops.mbconv(MAP, *BLOCK, 1, [1, 1], [4, 4], 0, False)
    ops.detect([MAP], [MAP], torch.zeros(64, 4), None, 0, 0.5, 0.5, 0.0, 10, 10)
