"""The ladder of docs/kernels.md: a BiFPN node from PyTorch's operations to one, counted."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode

import edet_kernels
from edet_kernels import reference
from edet_kernels.testing.numeric import relative_difference

C, SIDE = 64, 32
EPSILON = 1e-3


class Counter(TorchDispatchMode):
    """Counts operations that are neither views nor allocations, and the elements they move."""

    def __init__(self):
        super().__init__()
        self.operations = self.elements = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        if not func.is_view and not func.overloadpacket.__name__.startswith("empty"):
            self.operations += 1
            moved = [*args, *(result if isinstance(result, (list, tuple)) else [result])]
            tensors = [t for x in moved for t in (x if isinstance(x, (list, tuple)) else [x])]
            self.elements += sum(t.numel() for t in tensors if isinstance(t, torch.Tensor))
        return result


@pytest.fixture(scope="module")
def node():
    """A node of D0's P4 with three edges: its own level, one enlarged, one max-pooled."""
    torch.manual_seed(0)
    maps = [torch.randn(1, C, s, s) for s in (SIDE, SIDE // 2, 2 * SIDE)]
    maps = [x.contiguous(memory_format=torch.channels_last) for x in maps]
    weights = {
        "edge": 1 + 0.3 * torch.randn(3),
        "dw": torch.randn(C, 1, 3, 3) / 3,
        "pw": torch.randn(C, C, 1, 1) / C**0.5,
        "gamma": 1 + 0.1 * torch.randn(C),
        "beta": torch.randn(C),
        "mean": torch.randn(C),
        "var": 0.5 + torch.rand(C),
    }
    scale = weights["gamma"] / torch.sqrt(weights["var"] + EPSILON)
    weights |= {
        "scale": scale,
        "shift": weights["beta"] - weights["mean"] * scale,
        "folded": weights["pw"] * scale[:, None, None, None],
        "packed_dw": edet_kernels.pack_depthwise(weights["dw"]),
        "packed_pw": edet_kernels.pack_pointwise(weights["pw"]),
    }
    return maps, weights


def resized(maps):
    """Enlarged and pooled to the node's size, as TensorFlow's SAME pads."""
    return [
        maps[0],
        F.interpolate(maps[1], scale_factor=2),
        F.max_pool2d(F.pad(maps[2], (0, 1, 0, 1), value=-torch.inf), 3, 2),
    ]


def convolved(x, w):
    """The separable convolution."""
    return F.conv2d(F.conv2d(F.silu(x), w["dw"], padding=1, groups=C), w["pw"])


def normalised(x, w):
    return F.batch_norm(x, w["mean"], w["var"], w["gamma"], w["beta"], eps=EPSILON)


def published(maps, w):
    """Every map is multiplied by its weight and divided by the sum of them, then all are added."""
    edges = F.relu(w["edge"])
    total = edges.sum()
    terms = [x * edges[i] / (total + 1e-4) for i, x in enumerate(resized(maps))]
    return normalised(convolved(torch.stack(terms, -1).sum(-1), w), w)


def weights_first(maps, w):
    """The three weights are normalised, not the maps."""
    edges = F.relu(w["edge"])
    edges = edges / (edges.sum() + 1e-4)
    total = sum(x * a for x, a in zip(resized(maps), edges.unbind(), strict=True))
    return normalised(convolved(total, w), w)


def one_fusion(maps, w):
    """Resizing, weighting, summing and swish in one pass; batch norm folded into the pointwise."""
    x = edet_kernels.weighted_fusion(maps, w["edge"], size=(SIDE, SIDE), activation="swish")
    return F.conv2d(F.conv2d(x, w["dw"], padding=1, groups=C), w["folded"], w["shift"])


def one_node(maps, w):
    """All of it in one pass."""
    arguments = [w[name] for name in ("edge", "packed_dw", "packed_pw", "scale", "shift")]
    return edet_kernels.fusion_node(maps, *arguments, size=(SIDE, SIDE))


# operations, and how often as many values as the node has are read or written: docs/kernels.md
@pytest.mark.parametrize(
    ("rung", "operations", "moved"),
    [(published, 20, 44.6), (weights_first, 17, 36.6), (one_fusion, 3, 10.3), (one_node, 1, 6.3)],
)
def test_operations_and_memory(node, rung, operations, moved):
    maps, w = node
    if rung in (one_fusion, one_node) and edet_kernels.explain()[0].backend == "reference":
        pytest.skip("an op runs its reference")
    with torch.inference_mode(), Counter() as counter:
        found = rung(maps, w)
    assert counter.operations == operations
    assert round(counter.elements / (C * SIDE * SIDE), 1) == moved
    exact = reference.fusion_node(
        [x.double() for x in maps],
        *(w[name].double() for name in ("edge", "dw", "pw", "scale", "shift")),
        size=(SIDE, SIDE),
    )
    assert relative_difference([found], [exact]) < 2e-6
