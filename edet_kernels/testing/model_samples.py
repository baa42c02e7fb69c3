"""Calls of the ops at the shapes of a model, with the least that each can cost."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from ..names import Size
from ..packing import pack_depthwise, pack_pointwise
from .samples import Call, Graph, Maker, tensors

#: Of COCO's ids.
CLASSES, ANCHORS = 90, 9


@dataclass(frozen=True)
class Shapes:
    """What of a model decides the shapes of its ops' arguments.

    Attributes:
        name: the model's.
        image_size: (H, W).
        width: channels of the BiFPN and the heads.
        head_repeats: layers of a head before the prediction.
        fusion: of its nodes.
        graph: all nodes of its BiFPN; ``input_sizes`` are those of the pyramid.
    """

    name: str
    image_size: Size
    width: int
    head_repeats: int
    fusion: str
    graph: Graph

    @property
    def sizes(self) -> list[Size]:
        """(H, W) of the pyramid's maps, the finest first."""
        return self.graph.input_sizes


def _with_cost(call: Call, results: Sequence[tuple[int, ...]], operations: int) -> Call:
    """The call with the least bytes: every argument once and results, in the maps' type, once."""
    arguments = tensors([call.maps, *call.weights])
    element = min(t.element_size() for t in arguments if t.is_floating_point())
    moved = sum(t.numel() * t.element_size() for t in arguments)
    moved += element * sum(torch.Size(shape).numel() for shape in results)
    return replace(call, bytes=moved, operations=operations)


def node(make: Maker, shapes: Shapes, levels: Sequence[int], fusion: str = "fast") -> Call:
    """A node on the first of ``levels``, of a map of each."""
    c, (h, w) = shapes.width, shapes.sizes[levels[0]]
    maps = [make.map(c, *shapes.sizes[level]) for level in levels]
    edges = torch.ones(len(maps), device=make.device)
    options = {"size": (h, w), "fusion": fusion}
    call = Call("fusion_node", maps, (edges, *make.separable(c, c)), options)
    return _with_cost(call, [(make.batch, c, h, w)], 2 * make.batch * h * w * c * (9 + c))


def bifpn(make: Maker, shapes: Shapes) -> Call:
    """All nodes of all cells."""
    c, graph = shapes.width, shapes.graph
    count = len(graph.nodes)
    edges = None
    if shapes.fusion != "sum":
        edges = torch.ones(count, max(map(len, graph.nodes)), device=make.device)
    dw, pw, scales, shifts = zip(*(make.separable(c, c) for _ in range(count)), strict=True)
    norm = torch.stack(scales), torch.stack(shifts)
    packed = [
        torch.stack([pack_depthwise(w) for w in dw]),
        torch.stack([pack_pointwise(w) for w in pw]),
    ]
    rows: list[Tensor] | None = None
    if edges is not None:
        rows = [edges[i, : len(ids)] for i, ids in enumerate(graph.nodes)]
    options = {
        "nodes": graph.nodes,
        "sizes": graph.sizes,
        "outputs": graph.outputs,
        "fusion": shapes.fusion,
    }
    maps = make.maps(c, shapes.sizes)
    unpacked = (rows, list(dw), list(pw), *norm)
    call = Call("bifpn", maps, (edges, *packed, *norm), options, unpacked)
    pixels = make.batch * sum(h * w for h, w in graph.sizes)
    results = [(make.batch, c, *size) for size in shapes.sizes]
    return _with_cost(call, results, 2 * pixels * c * (9 + c))


def separable_conv(make: Maker, shapes: Shapes) -> Call:
    """A layer of a head on all levels."""
    c = shapes.width
    pixels = make.batch * sum(h * w for h, w in shapes.sizes)
    call = Call("separable_conv", make.maps(c, shapes.sizes), make.separable(c, c))
    results = [(make.batch, c, *size) for size in shapes.sizes]
    return _with_cost(call, results, 2 * pixels * c * (9 + c))


def head(make: Maker, shapes: Shapes) -> Call:
    """The class head: each level has its own batch norms, but the prediction, which has none."""
    c, outs = shapes.width, [shapes.width] * shapes.head_repeats + [ANCHORS * CLASSES]
    layers = zip(*(make.separable(c, c_out) for c_out in outs), strict=True)
    dw, pw, *norms = map(list, layers)
    for norm in norms:
        norm[:-1] = [x.expand(len(shapes.sizes), c).contiguous() for x in norm[:-1]]
    call = Call("head", make.maps(c, shapes.sizes), (dw, pw, *norms))
    pixels = make.batch * sum(h * w for h, w in shapes.sizes)
    results = [(make.batch, outs[-1], *size) for size in shapes.sizes]
    return _with_cost(call, results, 2 * pixels * c * sum(9 + c_out for c_out in outs))


def lateral(make: Maker, shapes: Shapes) -> Call:
    """Three projections of P5, which has 320 channels in B0."""
    c_in, c, size, count = 320, shapes.width, shapes.sizes[2], 3
    weights = zip(*(make.separable(c_in, c)[1:] for _ in range(count)), strict=True)
    call = Call("lateral", make.map(c_in, *size), tuple(map(list, weights)))
    pixels = make.batch * size[0] * size[1]
    return _with_cost(call, [(make.batch, c, *size)] * count, 2 * pixels * c_in * c * count)


def stem(make: Maker, shapes: Shapes) -> Call:
    """B0's first layer on a uint8 image."""
    h, w = shapes.image_size
    image = torch.randint(256, (make.batch, 3, h, w), device=make.device, dtype=torch.uint8)
    weights = (make.weight(32, 3, 3, 3, scale=0.2), *make.batch_norm(32))
    result = (make.batch, 32, -(-h // 2), -(-w // 2))
    call = Call("stem", image, weights, {"dtype": make.dtype})
    return _with_cost(call, [result], 2 * 27 * torch.Size(result).numel())


def mbconv(make: Maker, shapes: Shapes) -> Call:
    """A block of B0 that makes P3: 40 channels, 5×5."""
    c, middle, reduced, size = 40, 240, 10, shapes.sizes[0]
    squeeze = (make.weight(reduced, middle, 1, 1), make.weight(reduced))
    excite = (make.weight(middle, reduced, 1, 1), make.weight(middle))
    weights = (
        (make.pointwise(middle, c), *make.batch_norm(middle)),
        (make.depthwise(middle, 5), *make.batch_norm(middle)),
        (*squeeze, *excite),
        (make.pointwise(c, middle), *make.batch_norm(c)),
    )
    call = Call("mbconv", make.map(c, *size), weights, {"residual": True})
    pixels = make.batch * size[0] * size[1]
    return _with_cost(call, [(make.batch, c, *size)], 2 * pixels * middle * (2 * c + 25))


def detect(make: Maker, shapes: Shapes) -> Call:
    """The outputs of both heads to boxes."""
    count = ANCHORS * sum(h * w for h, w in shapes.sizes)
    anchors = torch.rand(count, 4, device=make.device) * 64
    anchors[:, 2:] += anchors[:, :2] + 16
    classes = make.maps(ANCHORS * CLASSES, shapes.sizes)
    boxes = [0.1 * x for x in make.maps(ANCHORS * 4, shapes.sizes)]
    return _with_cost(Call("detect", classes, (boxes, anchors)), [], 0)


#: Titles of what benchmarks time, and its makers.
MODEL_SAMPLES: dict[str, Callable[[Maker, Shapes], Call]] = {
    "fusion_node, P3 of 2": lambda make, shapes: node(make, shapes, (0, 1)),
    "fusion_node, P4 of 3": lambda make, shapes: node(make, shapes, (1, 1, 0)),
    "fusion_node, softmax": lambda make, shapes: node(make, shapes, (0, 1), "softmax"),
    "bifpn": bifpn,
    "head": head,
    "separable_conv": separable_conv,
    "lateral": lateral,
    "stem": stem,
    "mbconv": mbconv,
    "detect": detect,
}
