"""Sample calls of every op: random maps and weights, small unless asked for otherwise."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

import edet_kernels

from .. import reference
from ..names import Size
from .numeric import (
    OP_FACTOR,
    Tf32Products,
    assert_as_accurate_as_eager,
    assert_gradients_as_accurate,
)

DTYPES = (torch.float32, torch.float16, torch.bfloat16)

#: Around the widths of a vector register (4, 8, 16) and the widths of D0, D2 and D4.
CHANNELS = (1, 7, 16, 64, 88, 112, 160)

#: Name of a fusion method and whether its edge weights are per channel.
FUSION_KINDS = (
    ("fast", False),
    ("fast", True),
    ("softmax", False),
    ("softmax", True),
    ("unbounded", False),
    ("unbounded", True),
    ("sum", False),
)

#: Of the maps of a fusion: as it is, enlarged, max-pooled.
SIZES = ((9, 6), (5, 3), (17, 12))


def map_tree(function: Callable[[Tensor], Tensor], tree: Any) -> Any:
    """``tree`` with ``function`` applied to every tensor in its lists, tuples and dicts."""
    if isinstance(tree, Tensor):
        return function(tree)
    if isinstance(tree, dict):
        return {key: map_tree(function, value) for key, value in tree.items()}
    if isinstance(tree, (list, tuple)):
        return type(tree)(map_tree(function, value) for value in tree)
    return tree


def tensors(tree: Any) -> list[Tensor]:
    """All tensors of ``tree``."""
    found: list[Tensor] = []

    def keep(t: Tensor) -> Tensor:
        found.append(t)
        return t

    map_tree(keep, tree)
    return found


def cast(tree: Any, dtype: torch.dtype) -> Any:
    """``tree`` with its float tensors in ``dtype``."""
    return map_tree(lambda t: t.to(dtype) if t.is_floating_point() else t, tree)


@dataclass(frozen=True)
class Call:
    """An op and its arguments: ``maps`` in the dtype under test, weights in float32.

    Attributes:
        op, maps, weights, options: the op's name, first argument, other positional ones, and those
            by keyword.
        unpacked: ``weights`` for the reference, which would unpack those that the op takes packed
            only, where that would be timed; None: the same ones.
        bytes, operations: the least it must move and the multiplications and additions of its
            products, where its maker knows them.
    """

    op: str
    maps: Any
    weights: tuple[Any, ...]
    options: dict[str, Any] = field(default_factory=dict)
    unpacked: tuple[Any, ...] | None = None
    bytes: int = 0
    operations: int = 0

    def __call__(self, maps: Any = None) -> Any:
        """The public op's result, on ``maps`` where given."""
        maps = self.maps if maps is None else maps
        return getattr(edet_kernels, self.op)(maps, *self.weights, **self.options)

    def run(self, function: Callable[..., Any]) -> Any:
        """The result of ``function``, which takes the arguments of the op's reference."""
        weights = self.weights if self.unpacked is None else self.unpacked
        return function(self.maps, *weights, **self.options)

    def to(self, dtype: torch.dtype) -> Call:
        """The same call with every float tensor in ``dtype``."""
        options = cast(self.options, dtype)
        if "dtype" in options:
            options["dtype"] = dtype
        return replace(
            self,
            maps=cast(self.maps, dtype),
            weights=cast(self.weights, dtype),
            options=options,
            unpacked=cast(self.unpacked, dtype),
        )

    def reference(self, dtype: torch.dtype) -> Any:
        """The reference's result with every float tensor in ``dtype``."""
        return self.to(dtype).run(getattr(reference, self.op))

    def check(self, dtype: torch.dtype, *, factor: float = OP_FACTOR) -> None:
        """Checks the op against the fp64 reference, by the error of eager PyTorch in ``dtype``."""
        assert_as_accurate_as_eager(
            self(), self.reference(torch.float64), self.reference(dtype), factor=factor
        )

    def check_gradients(self, dtype: torch.dtype, *, factor: float = OP_FACTOR) -> None:
        """Checks all gradients against fp64, by those of eager PyTorch in ``dtype``."""
        function, eager = getattr(edet_kernels, self.op), getattr(reference, self.op)
        # a single number's error in eager is a matter of luck: eight of them are compared then
        single = any(t.numel() == 1 for t in tensors([self.maps, self.weights]))

        def drawn(of: Callable[..., Any], in_dtype: torch.dtype) -> list[Tensor]:
            draws = [gradients(self, of, in_dtype, seed=i) for i in range(1, 9 if single else 2)]
            return [torch.stack(same) for same in zip(*draws, strict=True)]

        assert_gradients_as_accurate(
            drawn(function, dtype),
            drawn(eager, torch.float64),
            drawn(eager, dtype),
            dtype,
            factor=factor,
        )

    def check_tf32(self) -> None:
        """Checks a float32 op that may multiply as TF32, by the error of eager that does so."""
        with Tf32Products():
            eager = self.reference(torch.float32)
        assert_as_accurate_as_eager(self(), self.reference(torch.float64), eager)


class Maker:
    """Makes random maps in a dtype and float32 weights that this dtype holds exactly.

    With such weights the error of eager PyTorch is that of its arithmetic alone.

    Args:
        dtype: of the maps.
        batch: images in each map.
        device: where all is made; torch's default device when None.
    """

    def __init__(
        self, dtype: torch.dtype, batch: int = 2, device: torch.device | None = None
    ) -> None:
        self.dtype, self.batch, self.device = dtype, batch, device

    def map(self, channels: int, h: int, w: int) -> Tensor:
        """A map (batch, channels, h, w), channels_last."""
        x = torch.randn(self.batch, channels, h, w, device=self.device).to(self.dtype)
        return x.contiguous(memory_format=torch.channels_last)

    def maps(self, channels: int, sizes: Sequence[Size]) -> list[Tensor]:
        """A map for each of ``sizes``."""
        return [self.map(channels, h, w) for h, w in sizes]

    def weight(self, *shape: int, scale: float = 1.0) -> Tensor:
        """Normally distributed weights."""
        return (torch.randn(shape, device=self.device) * scale).to(self.dtype).float()

    def batch_norm(self, *shape: int) -> tuple[Tensor, Tensor]:
        """A folded batch norm: scale and shift."""
        scale = (torch.rand(shape, device=self.device) + 0.5).to(self.dtype).float()
        return scale, self.weight(*shape)

    def edge_weights(self, *shape: int) -> Tensor:
        """Weights of edges, of either sign but for the first edge's: all negative fuse to zero."""
        weights = self.weight(*shape)
        return torch.cat([weights[:1].abs() + 0.5, weights[1:]]).to(self.dtype).float()

    def depthwise(self, channels: int, kernel: int = 3) -> Tensor:
        """A depthwise weight (C, 1, k, k)."""
        return self.weight(channels, 1, kernel, kernel, scale=1 / kernel)

    def pointwise(self, out_channels: int, channels: int) -> Tensor:
        """A pointwise weight (C_out, C, 1, 1)."""
        return self.weight(out_channels, channels, 1, 1, scale=channels**-0.5)

    def squeeze(self, channels: int, reduced: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Squeeze-excite: weight and bias that reduce, weight and bias that excite."""
        return (
            self.pointwise(reduced, channels),
            self.weight(reduced),
            self.pointwise(channels, reduced),
            self.weight(channels),
        )

    def separable(self, channels: int, out_channels: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Depthwise weight, pointwise weight, scale and shift."""
        return (
            self.depthwise(channels),
            self.pointwise(out_channels, channels),
            *self.batch_norm(out_channels),
        )


def weighted_fusion(
    make: Maker,
    channels: int = 24,
    *,
    fusion: str = "fast",
    per_channel: bool = False,
    sizes: Sequence[Size] = SIZES,
    edge_weights: Tensor | None = None,
    **options: Any,
) -> Call:
    """A fusion of maps of ``sizes`` to the first one's size or ``options["size"]``."""
    if edge_weights is None and fusion != "sum":
        edge_weights = make.edge_weights(len(sizes), *([channels] if per_channel else []))
    maps = make.maps(channels, sizes)
    return Call("weighted_fusion", maps, (edge_weights,), {"fusion": fusion, **options})


def fusion_node(
    make: Maker, channels: int = 24, out_channels: int | None = None, **options: Any
) -> Call:
    """A node on the maps of :func:`weighted_fusion`."""
    fused = weighted_fusion(make, channels, **options)
    weights = make.separable(channels, channels + 3 if out_channels is None else out_channels)
    return Call("fusion_node", fused.maps, (*fused.weights, *weights), fused.options)


@dataclass(frozen=True)
class Graph:
    """Nodes of a feature network: see ``nodes``, ``sizes`` and ``outputs`` of ``bifpn``."""

    input_sizes: list[Size]
    nodes: list[tuple[int, ...]]
    sizes: list[Size]
    outputs: list[int]


def bifpn_graph(size: Size, levels: int, cells: int) -> Graph:
    """EfficientDet's graph (paper, figure 3): ``levels`` maps from ``size`` down, ⌈/2⌉ each."""
    extents = [size]
    for _ in range(levels - 1):
        extents.append((-(-extents[-1][0] // 2), -(-extents[-1][1] // 2)))
    nodes: list[tuple[int, ...]] = []
    sizes: list[Size] = []

    def add(level: int, *edges: int) -> int:
        nodes.append(edges)
        sizes.append(extents[level])
        return levels + len(nodes) - 1

    features = list(range(levels))
    for _ in range(cells):
        down = list(features)
        for level in range(levels - 2, -1, -1):
            down[level] = add(level, features[level], down[level + 1])
        up = [down[0]]
        for level in range(1, levels - 1):
            up.append(add(level, features[level], down[level], up[-1]))
        up.append(add(levels - 1, features[-1], up[-1]))
        features = up
    return Graph(extents, nodes, sizes, features)


def bifpn(
    make: Maker,
    channels: int = 24,
    *,
    graph: Graph | None = None,
    fusion: str = "fast",
    per_channel: bool = False,
    **options: Any,
) -> Call:
    """All nodes of ``graph``, two small BiFPN cells when it is not given."""
    graph = graph or bifpn_graph((9, 6), levels=3, cells=2)
    count, most = len(graph.nodes), max(map(len, graph.nodes))
    shape = (most, channels) if per_channel else (most,)
    dw = [edet_kernels.pack_depthwise(make.depthwise(channels)) for _ in graph.nodes]
    pw = [edet_kernels.pack_pointwise(make.pointwise(channels, channels)) for _ in graph.nodes]
    weights = (
        None if fusion == "sum" else torch.stack([make.edge_weights(*shape) for _ in graph.nodes]),
        torch.stack(dw),
        torch.stack(pw),
        *make.batch_norm(count, channels),
    )
    options = {
        "nodes": graph.nodes,
        "sizes": graph.sizes,
        "outputs": graph.outputs,
        "fusion": fusion,
        **options,
    }
    return Call("bifpn", make.maps(channels, graph.input_sizes), weights, options)


def separable_conv(
    make: Maker,
    channels: int = 24,
    out_channels: int | None = None,
    *,
    sizes: Sequence[Size] = SIZES,
    per_level: bool = True,
    **options: Any,
) -> Call:
    """One layer of a head on maps of ``sizes``."""
    out_channels = channels + 3 if out_channels is None else out_channels
    norm = make.batch_norm(*([len(sizes)] if per_level else []), out_channels)
    weights = (make.depthwise(channels), make.pointwise(out_channels, channels), *norm)
    return Call("separable_conv", make.maps(channels, sizes), weights, options)


def head(make: Maker, channels: int = 24, *, sizes: Sequence[Size] = SIZES, **options: Any) -> Call:
    """Two layers and a prediction of another width."""
    layers = [(channels, channels), (channels, channels), (channels, 9)]
    norms = [make.batch_norm(len(sizes), c_out) for _, c_out in layers]
    weights = (
        [make.depthwise(c) for c, _ in layers],
        [make.pointwise(c_out, c) for c, c_out in layers],
        [scale for scale, _ in norms],
        [shift for _, shift in norms],
    )
    return Call("head", make.maps(channels, sizes), weights, options)


def lateral(
    make: Maker,
    channels: int = 24,
    out_channels: Sequence[int] = (24, 17),
    *,
    size: Size = (9, 6),
    **options: Any,
) -> Call:
    """Projections of one map, the last one pooled twice."""
    norms = [make.batch_norm(c) for c in out_channels]
    weights = (
        [make.pointwise(c, channels) for c in out_channels],
        [scale for scale, _ in norms],
        [shift for _, shift in norms],
    )
    return Call("lateral", make.map(channels, *size), weights, {"pooled": 2, **options})


def mbconv(
    make: Maker,
    channels: int = 24,
    *,
    expansion: int = 2,
    kernel: int = 3,
    out_channels: int | None = None,
    squeeze: bool = True,
    size: Size = (9, 6),
    **options: Any,
) -> Call:
    """An inverted residual block; ``expansion=1`` leaves the expansion out."""
    middle, reduced = channels * expansion, max(1, channels // 4)
    out_channels = channels if out_channels is None else out_channels
    expand = (make.pointwise(middle, channels), *make.batch_norm(middle))
    weights = (
        expand if expansion > 1 else None,
        (make.depthwise(middle, kernel), *make.batch_norm(middle)),
        make.squeeze(middle, reduced) if squeeze else None,
        (make.pointwise(out_channels, middle), *make.batch_norm(out_channels)),
    )
    return Call("mbconv", make.map(channels, *size), weights, options)


def stem(
    make: Maker,
    out_channels: int = 24,
    *,
    size: Size = (9, 6),
    uint8: bool = False,
    normalise: bool = True,
    **options: Any,
) -> Call:
    """The first layer on a float image, or on a uint8 one with the result in the maker's dtype."""
    image = make.map(3, *size)
    if uint8:
        image = torch.randint(256, (make.batch, 3, *size), dtype=torch.uint8)
        options["dtype"] = make.dtype
    if normalise:
        mean, std = torch.tensor([124.0, 116.0, 104.0]), torch.tensor([58.5, 57.0, 57.5])
        options["mean"], options["std"] = (mean, std) if uint8 else (mean / 256, std / 64)
    weights = (make.weight(out_channels, 3, 3, 3, scale=0.3), *make.batch_norm(out_channels))
    return Call("stem", image, weights, options)


def training_node(
    make: Maker,
    channels: int = 24,
    out_channels: int | None = None,
    *,
    nodes: int = 1,
    normalised: bool = True,
    sizes: Sequence[Size] = SIZES,
    **options: Any,
) -> Call:
    """A node on the maps of :func:`weighted_fusion`; for several nodes, one of the maps each."""
    options = {"fusion": "fast" if nodes == 1 else "sum", **options}
    fused = weighted_fusion(make, channels, sizes=sizes, **options)
    if nodes == 1:
        options = {"edge_counts": [len(sizes)], "sizes": [sizes[0]], **fused.options}
    else:
        options = {"edge_counts": [1] * nodes, "sizes": list(sizes), **fused.options}
    dw, pw, _, shift = make.separable(channels, out_channels or channels + 3)
    norm = [make.weight(len(fused.maps), channels) for _ in range(2)]
    norms = norm if normalised else (None, None)
    return Call("training_node", fused.maps, (*norms, *fused.weights, dw, pw, shift), options)


def training_moments(
    make: Maker, channels: int = 24, *, size: Size = (9, 6), **options: Any
) -> Call:
    """Statistics of a map."""
    return Call("training_moments", make.map(channels, *size), (), options)


def training_depthwise(
    make: Maker,
    channels: int = 24,
    *,
    expansion: int = 2,
    normalised: bool = True,
    kernel: int = 3,
    size: Size = (9, 6),
    **options: Any,
) -> Call:
    """The first half of an inverted residual block; ``expansion=1`` leaves the expansion out."""
    middle = channels * expansion
    weights = (
        make.pointwise(middle, channels) if expansion > 1 else None,
        *(make.batch_norm(middle) if normalised else (None, None)),
        make.depthwise(middle, kernel),
    )
    return Call("training_depthwise", make.map(channels, *size), weights, options)


def training_project(
    make: Maker,
    channels: int = 24,
    out_channels: int | None = None,
    *,
    squeeze: bool = True,
    size: Size = (9, 6),
    **options: Any,
) -> Call:
    """The second half of an inverted residual block."""
    weights = (
        *make.batch_norm(channels),
        make.squeeze(channels, max(1, channels // 4)) if squeeze else None,
        make.pointwise(channels + 3 if out_channels is None else out_channels, channels),
    )
    return Call("training_project", make.map(channels, *size), weights, options)


def nms(make: Maker, count: int = 40, **options: Any) -> Call:
    """``count`` boxes on a coarse grid, so that many overlap, in three classes; always float32."""
    corner = torch.randint(0, 12, (make.batch, count, 2)).float()
    boxes = torch.cat([corner, corner + torch.randint(1, 9, (make.batch, count, 2))], -1)
    scores = torch.rand(make.batch, count)
    return Call("nms", boxes, (scores, torch.randint(3, (make.batch, count))), options)


def detect(
    make: Maker,
    classes: int = 5,
    *,
    sizes: Sequence[Size] = ((7, 6), (4, 3), (2, 2)),
    limits: bool = True,
    **options: Any,
) -> Call:
    """Head outputs with 2 anchors a cell, the anchors anywhere, so that many boxes overlap."""
    corner = torch.randint(0, 40, (2 * sum(h * w for h, w in sizes), 2)).float()
    anchors = torch.cat([corner, corner + torch.randint(8, 40, corner.shape)], -1)
    weights = ([0.25 * x for x in make.maps(8, sizes)], anchors)
    if limits:
        options["limits"] = torch.tensor([[40.0, 50.0]]).repeat(make.batch, 1)
    options = {"max_candidates": 100, "max_detections": 20, **options}
    return Call("detect", make.maps(2 * classes, sizes), weights, options)


SAMPLES: dict[str, Callable[..., Call]] = {
    function.__name__: function
    for function in (
        weighted_fusion,
        fusion_node,
        bifpn,
        separable_conv,
        head,
        lateral,
        mbconv,
        stem,
        training_node,
        training_moments,
        training_depthwise,
        training_project,
        nms,
        detect,
    )
}


def sample(op: str, dtype: torch.dtype = torch.float32, batch: int = 2, **options: Any) -> Call:
    """A small call of ``op``."""
    return SAMPLES[op](Maker(dtype, batch), **options)


def gradients(
    call: Call, function: Callable[..., Any], dtype: torch.dtype, *, seed: int = 1
) -> list[Tensor]:
    """d(Σ results · fixed random weights) / d every float tensor of the call, in fp64.

    Args:
        function: :func:`edet_kernels.…` of the op, or its reference.
        dtype: of maps and, for the reference, of weights too.
        seed: of the random weights.
    """
    weight_dtype = torch.float32 if function is getattr(edet_kernels, call.op) else dtype
    leaves: list[Tensor] = []

    def leaf(t: Tensor, as_dtype: torch.dtype) -> Tensor:
        if not t.is_floating_point():
            return t
        leaves.append(t.detach().to(as_dtype).requires_grad_())
        return leaves[-1]

    maps = map_tree(lambda t: leaf(t, dtype), call.maps)
    weights = map_tree(lambda t: leaf(t, weight_dtype), call.weights)
    results = tensors(function(maps, *weights, **call.options))
    if call.op.startswith("training_") and results[-1].numel():
        # from a sum of squares to a variance, as it is used
        x = call.maps if call.op == "training_moments" else results[0]
        results[-1] = results[-1] / (x.numel() / x.shape[1])
    generator = torch.Generator().manual_seed(seed)
    total = torch.zeros((), dtype=torch.float64)
    for x in results:
        # exact in every dtype, so that what is compared is the backward pass alone
        factor = torch.randint(-8, 9, x.shape, generator=generator, device="cpu") / 8
        total = total + (x.double() * factor.to(x.device)).sum()
    return [g.double() for g in torch.autograd.grad(total, leaves)]
