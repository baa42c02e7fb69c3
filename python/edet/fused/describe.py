"""What a network's parts are made of, whoever wrote them, and how fused ops run that.

The protocol by which a module of any code base can be run on fused ops: a feature network has a
method ``as_fusion_nodes()`` that returns :class:`FusionNodes`, a head a method ``as_head_layers()``
that returns :class:`HeadLayers`, a backbone ``as_backbone_blocks()`` that returns
:class:`BackboneBlocks`. :func:`edet.accelerate` finds all three.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import edet_kernels
from edet_kernels import reference

from .module import fold_batch_norm, kernel_dtype

#: Padding of max pools: the kernels' two, and zeros at the places of ``same``.
POOLS = ("same", "symmetric", "zero")


class Mismatch(ValueError):
    """A module cannot be computed exactly by the fused ops; the message says why."""


class Edge(NamedTuple):
    """What a node reads: map ``source``, after a 1×1 convolution (and batch norm) if there is one.

    Ids 0 … inputs−1 are the maps given, then the levels above them, then the nodes in order.
    """

    source: int
    conv: nn.Conv2d | None = None
    bn: nn.Module | None = None


class NodeLayers(NamedTuple):
    """One node: fusion of its edges at ``level`` → activation → depthwise → pointwise → norm.

    ``edge_weights`` is (n,), or (n, C) for one weight per channel; None for ``fusion="sum"``.
    """

    level: int
    edges: Sequence[Edge]
    conv_dw: nn.Conv2d
    conv_pw: nn.Conv2d
    bn: nn.Module | None
    edge_weights: Tensor | None = None
    fusion: str = "fast"


@dataclass(frozen=True)
class FusionNodes:
    """A feature network: the maps it is given, the levels pooled above them, and its nodes.

    Attributes:
        inputs: number of maps given, from the lowest level up, each half the size of the one below.
        nodes: all nodes of all cells, in an order in which each comes after what it reads.
        outputs: ids of the nodes returned.
        above: one edge for each level above the given maps, max-pooled to half the size.
        pool: padding of the max pools, one of :data:`POOLS`.
        pre_activation, post_activation: before the depthwise and after the norm.
        finish: makes what the module returns of the list of maps.
    """

    inputs: int
    nodes: Sequence[NodeLayers]
    outputs: Sequence[int]
    above: Sequence[Edge] = ()
    pool: str = "same"
    pre_activation: str = "swish"
    post_activation: str = "none"
    finish: Callable[[list[Tensor]], Any] = list

    @property
    def levels(self) -> int:
        """Number of pyramid levels."""
        return self.inputs + len(self.above)

    def check(self) -> None:
        """Checks that the fused ops can compute this.

        Raises:
            Mismatch: they cannot, or ids are wrong.
        """
        if self.pool not in POOLS:
            raise Mismatch(f"pool must be one of {', '.join(POOLS)}, got {self.pool!r}")
        first = self.levels
        for i, edge in enumerate(self.above):
            if not 0 <= edge.source < self.inputs + i:
                raise Mismatch(f"above[{i}] must read a lower level, got {edge.source}")
            _check_projection(f"above[{i}]", edge, self.inputs)
        if not self.nodes:
            raise Mismatch("nodes must hold at least one node, got none")
        for i, node in enumerate(self.nodes):
            name = f"nodes[{i}]"
            if not 0 <= node.level < first:
                raise Mismatch(f"{name}.level must be 0 to {first - 1}, got {node.level}")
            for edge in node.edges:
                if not 0 <= edge.source < first + i:
                    raise Mismatch(f"{name} must read maps 0 to {first + i - 1}, got {edge.source}")
                _check_projection(name, edge, self.inputs)
            weights = node.edge_weights
            if (weights is None) != (node.fusion == "sum"):
                raise Mismatch(f"{name} must have edge weights except for a sum")
            if weights is not None and weights.shape[0] != len(node.edges):
                raise Mismatch(
                    f"{name}.edge_weights must hold {len(node.edges)}, got {tuple(weights.shape)}"
                )
            check_separable(name, node.conv_dw, node.conv_pw)
            check_norm(name, node.bn)
            if node.conv_pw.out_channels != self.nodes[0].conv_dw.in_channels:
                raise Mismatch(f"{name} must have as many channels as the others")
        dims = {1 if n.edge_weights is None else n.edge_weights.dim() for n in self.nodes}
        if len(dims) > 1:
            raise Mismatch("edge weights must be all of one shape: per edge, or per channel")
        if not all(first <= o < first + len(self.nodes) for o in self.outputs):
            raise Mismatch(f"outputs must be ids of nodes, got {tuple(self.outputs)}")

    def pack(self, dtype: torch.dtype) -> PackedNodes:
        """The weights for :meth:`PackedNodes.run`, batch norms folded."""
        return PackedNodes(self, kernel_dtype(dtype))


def _check_projection(name: str, edge: Edge, inputs: int) -> None:
    if edge.conv is None:
        return
    if edge.source >= inputs:
        raise Mismatch(f"{name} must project given maps only, got map {edge.source}")
    check_pointwise(name, edge.conv)
    check_norm(name, edge.bn)


def _check_convolution(name: str, conv: nn.Module) -> None:
    """Checks that ``conv`` computes what ``nn.Conv2d`` does, but for the place of its padding.

    A derived class may add something to it, as adapters do, which may be zero for the time being.

    Raises:
        Mismatch: it does not.
    """
    if not isinstance(conv, nn.Conv2d):
        raise Mismatch(f"{name}: {type(conv).__name__} is not a convolution")
    kind = type(conv)
    pads = "Same" in kind.__name__ or kind.__module__.startswith("edet.")
    if kind._conv_forward is not nn.Conv2d._conv_forward or not (
        pads or kind.forward is nn.Conv2d.forward
    ):
        raise Mismatch(f"{name}: {kind.__name__} is a convolution with a forward of its own")


def check_pointwise(name: str, conv: nn.Module) -> None:
    """Checks that ``conv`` is an ordinary 1×1 convolution.

    Raises:
        Mismatch: it is not.
    """
    _check_convolution(name, conv)
    assert isinstance(conv, nn.Conv2d)
    if (conv.kernel_size, conv.stride, conv.groups) != ((1, 1), (1, 1), 1):
        raise Mismatch(
            f"{name}: a {conv.kernel_size[0]}×{conv.kernel_size[1]} convolution, not 1×1"
        )


def check_separable(name: str, conv_dw: nn.Module, conv_pw: nn.Module) -> None:
    """Checks that the two are a 3×3 depthwise convolution, zero padded by 1, and a 1×1 one.

    A convolution whose own padding is 0 is taken to be padded by the module around it.

    Raises:
        Mismatch: they are not.
    """
    if not isinstance(conv_dw, nn.Conv2d) or conv_dw.groups != conv_dw.in_channels:
        raise Mismatch(f"{name}: the 3×3 convolution is not depthwise")
    _check_convolution(name, conv_dw)
    if (conv_dw.kernel_size, conv_dw.stride, conv_dw.dilation) != ((3, 3), (1, 1), (1, 1)):
        raise Mismatch(f"{name}: the depthwise convolution is not 3×3 with stride 1")
    if conv_dw.out_channels != conv_dw.in_channels or conv_dw.bias is not None:
        raise Mismatch(f"{name}: the depthwise convolution multiplies channels or has a bias")
    if conv_dw.padding not in ((1, 1), (0, 0), "same") or conv_dw.padding_mode != "zeros":
        raise Mismatch(f"{name}: the depthwise convolution is not zero padded by 1")
    check_pointwise(name, conv_pw)


def check_norm(name: str, bn: nn.Module | None) -> None:
    """Checks that ``bn`` can be folded.

    Raises:
        Mismatch: it is not an affine batch norm with running statistics.
    """
    if bn is None:
        return
    if type(bn) not in (nn.BatchNorm2d, nn.SyncBatchNorm) and not _is_norm_with_activation(bn):
        raise Mismatch(f"{name}: {type(bn).__name__} is not a batch norm")
    if bn.running_mean is None or bn.weight is None:
        raise Mismatch(f"{name}: the batch norm has no running statistics or no weights")


def _is_norm_with_activation(bn: nn.Module) -> bool:
    """Whether ``bn`` is timm's batch norm with an activation behind it, which is not part of it."""
    return isinstance(bn, nn.BatchNorm2d) and type(bn).__name__ == "BatchNormAct2d"


def fold(
    conv: nn.Conv2d, bn: nn.Module | None, dtype: torch.dtype
) -> tuple[Tensor, Tensor, Tensor]:
    """Packed weight, scale and shift of a 1×1 convolution and its batch norm."""
    weight = edet_kernels.pack_pointwise(conv.weight.to(dtype))
    if bn is not None:
        scale, shift = fold_batch_norm(cast(nn.BatchNorm2d, bn), conv.bias)
        return weight, scale.to(dtype), shift.to(dtype)
    scale = torch.ones(conv.out_channels, dtype=dtype, device=conv.weight.device)
    return weight, scale, torch.zeros_like(scale) if conv.bias is None else conv.bias.to(dtype)


def _coefficients(node: NodeLayers, like: Tensor) -> Tensor:
    """The node's normalised weights, for a graph whose nodes fuse in different ways."""
    if node.edge_weights is None:
        return like.new_ones(len(node.edges))
    weights = node.edge_weights.to(like.dtype)
    found = reference.fusion_coefficients(weights, len(node.edges), node.fusion)
    assert found is not None
    return found


class _Lateral(NamedTuple):
    """Arguments of ``edet_kernels.lateral`` for one map."""

    pw_weights: list[Tensor]
    scales: list[Tensor]
    shifts: list[Tensor]


class PackedNodes:
    """The weights of a feature network, stacked over its nodes, and its graph in the ops' ids."""

    def __init__(self, graph: FusionNodes, dtype: torch.dtype) -> None:
        self.inputs, self.levels, self.pool = graph.inputs, graph.levels, graph.pool
        self.activations = {
            "pre_activation": graph.pre_activation,
            "post_activation": graph.post_activation,
        }
        self.finish = graph.finish
        self.node_levels = [node.level for node in graph.nodes]
        top = graph.inputs - 1
        edges = [edge for node in graph.nodes for edge in node.edges]
        # the usual chain: one projection of the last map, pooled again and again
        self.chained = (
            graph.pool != "zero"
            and bool(graph.above)
            and graph.above[0].source == top
            and graph.above[0].conv is not None
            and all(edge.conv is not graph.above[0].conv for edge in edges)
            and all(e.source == top + i and e.conv is None for i, e in enumerate(graph.above) if i)
        )
        self.lateral = [_Lateral([], [], []) for _ in range(graph.inputs)]
        places: dict[object, int] = {}  # of each op input, by map or by projection
        count = 0
        for source in range(graph.inputs):
            mine = [edge for edge in edges if edge.source == source]
            if any(edge.conv is None for edge in mine):
                places[source] = count
                count += 1
            if source == top and self.chained:
                mine.append(graph.above[0])  # the last projection is the one that is pooled
            for edge in mine:
                if edge.conv is None or edge.conv in places:
                    continue
                for tensors, tensor in zip(
                    self.lateral[source], fold(edge.conv, edge.bn, dtype), strict=True
                ):
                    tensors.append(tensor)
                if self.chained and edge is graph.above[0]:
                    continue
                places[edge.conv] = count
                count += 1
        self.raw = [source in places for source in range(graph.inputs)]
        for level in range(graph.inputs, graph.levels):
            places[level] = count
            count += 1
        self.above: list[tuple[int, _Lateral | None]] = []
        for edge in [] if self.chained else graph.above:
            lateral = None
            if edge.conv is not None:
                lateral = _Lateral(*([x] for x in fold(edge.conv, edge.bn, dtype)))
            self.above.append((edge.source, lateral))

        def place(edge: Edge) -> int:
            if edge.source >= graph.levels:
                return count + edge.source - graph.levels
            return places[edge.source if edge.conv is None else edge.conv]

        self.nodes = [tuple(place(edge) for edge in node.edges) for node in graph.nodes]
        self.outputs = [count + o - graph.levels for o in graph.outputs]
        # the level of each op input and node, to know which edges shrink
        level_of = {places[key]: key for key in places if isinstance(key, int)}
        level_of |= {places[e.conv]: e.source for e in edges if e.conv is not None}
        level_of |= {count + i: level for i, level in enumerate(self.node_levels)}
        self.shrinks = [
            tuple(level_of[e] < node.level for e in ids)
            for ids, node in zip(self.nodes, graph.nodes, strict=True)
        ]

        folded = [fold(node.conv_pw, node.bn, dtype) for node in graph.nodes]
        pw_weight, scale, shift = (torch.stack(parts) for parts in zip(*folded, strict=True))
        fusions = {node.fusion for node in graph.nodes}
        self.fusion = fusions.pop() if len(fusions) == 1 else "unbounded"
        most = max(len(node.edges) for node in graph.nodes)
        weights = [_coefficients(n, scale) if fusions else n.edge_weights for n in graph.nodes]
        edge_weights = [w.to(dtype) for w in weights if w is not None]
        self.edge_weights = None
        if edge_weights:
            self.edge_weights = torch.stack(
                [F.pad(w, (*[0, 0] * (w.dim() - 1), 0, most - w.shape[0])) for w in edge_weights]
            )
        self.dw_weight = torch.stack(
            [edet_kernels.pack_depthwise(node.conv_dw.weight.to(dtype)) for node in graph.nodes]
        )
        self.pw_weight, self.scale, self.shift = pw_weight, scale, shift

    def run(self, maps: Sequence[Tensor], dtype: torch.dtype) -> Any:
        """What the network makes of ``maps`` (N, C, H, W), computed in ``dtype``."""
        return self.finish(self.run_nodes(*self.node_inputs(maps, dtype)))

    def node_inputs(
        self, maps: Sequence[Tensor], dtype: torch.dtype
    ) -> tuple[list[Tensor], list[tuple[int, int]]]:
        """The projected maps that the nodes fuse, and the size of each level."""
        sizes = [(int(x.shape[-2]), int(x.shape[-1])) for x in maps]
        while len(sizes) < self.levels:
            sizes.append(((sizes[-1][0] + 1) // 2, (sizes[-1][1] + 1) // 2))
        pyramid = [x.to(dtype) for x in maps]
        inputs: list[Tensor] = []
        for i, (x, lateral) in enumerate(zip(pyramid, self.lateral, strict=True)):
            if self.raw[i]:
                inputs.append(x)
            if lateral.pw_weights:
                pooled = self.levels - self.inputs if self.chained and i == self.inputs - 1 else 0
                pool = "same" if self.pool == "zero" else self.pool
                inputs += edet_kernels.lateral(x, *lateral, pooled=pooled, pool=pool)
        for source, projection in self.above:
            x = pyramid[source]
            if projection is not None:
                (x,) = edet_kernels.lateral(x, *projection)
            pyramid.append(self._pooled(x, sizes[len(pyramid)]))
        inputs += pyramid[self.inputs :]
        return inputs, sizes

    def _pooled(self, x: Tensor, size: tuple[int, int]) -> Tensor:
        if self.pool == "zero":
            return zero_padded_max_pool(x, size)
        return edet_kernels.weighted_fusion([x], size=size, fusion="sum", pool=self.pool)

    def run_nodes(self, inputs: list[Tensor], sizes: list[tuple[int, int]]) -> list[Tensor]:
        """All nodes, in one call where the op has their pool."""
        if self.pool == "zero":
            return self.run_node_by_node(inputs, sizes)
        return edet_kernels.bifpn(
            inputs,
            self.edge_weights,
            self.dw_weight,
            self.pw_weight,
            self.scale,
            self.shift,
            nodes=self.nodes,
            sizes=[sizes[level] for level in self.node_levels],
            outputs=self.outputs,
            fusion=self.fusion,
            pool=self.pool,
            **self.activations,
        )

    def run_node_by_node(self, inputs: list[Tensor], sizes: list[tuple[int, int]]) -> list[Tensor]:
        """All nodes, in a call each."""
        zero = self.pool == "zero"
        node_sizes = [sizes[level] for level in self.node_levels]
        known = list(inputs)
        for i, (ids, shrinks) in enumerate(zip(self.nodes, self.shrinks, strict=True)):
            size = node_sizes[i]
            known.append(
                edet_kernels.fusion_node(
                    [
                        zero_padded_max_pool(known[e], size) if zero and shrink else known[e]
                        for e, shrink in zip(ids, shrinks, strict=True)
                    ],
                    None if self.edge_weights is None else self.edge_weights[i, : len(ids)],
                    self.dw_weight[i],
                    self.pw_weight[i],
                    self.scale[i],
                    self.shift[i],
                    size=size,
                    fusion=self.fusion,
                    pool="same" if zero else self.pool,
                    **self.activations,
                )
            )
        return [known[o] for o in self.outputs]


def zero_padded_max_pool(x: Tensor, size: tuple[int, int]) -> Tensor:
    """Max pool of (N, C, h, w) to ``size`` that pads zeros where TensorFlow's SAME pads −inf.

    An outer pixel is therefore never negative, unlike in ``edet_kernels``' pools.
    """
    (kh, sh, top), (kw, sw, left) = (
        reference.pool_geometry(n, out, "same") for n, out in zip(x.shape[-2:], size, strict=True)
    )
    bottom = (size[0] - 1) * sh + kh - x.shape[-2] - top
    right = (size[1] - 1) * sw + kw - x.shape[-1] - left
    return F.max_pool2d(F.pad(x, (left, right, top, bottom)), (kh, kw), (sh, sw))


@dataclass(frozen=True)
class HeadLayers:
    """A head: layers shared by all pyramid levels, each with a batch norm per level; a prediction.

    Attributes:
        layers: depthwise and pointwise convolution of each layer.
        norms: for each layer its batch norm on each level.
        predict: depthwise and pointwise convolution of the prediction.
        activation: after each batch norm.
        finish: makes what the module returns of the list of maps, one per level.
    """

    layers: Sequence[tuple[nn.Conv2d, nn.Conv2d]]
    norms: Sequence[Sequence[nn.Module]]
    predict: tuple[nn.Conv2d, nn.Conv2d]
    activation: str = "swish"
    finish: Callable[[list[Tensor]], Any] = list

    def check(self) -> None:
        """Checks that the fused ops can compute this.

        Raises:
            Mismatch: they cannot.
        """
        if len(self.layers) != len(self.norms) or len({len(n) for n in self.norms}) > 1:
            raise Mismatch("norms must hold one batch norm per layer and level")
        for i, (conv_dw, conv_pw) in enumerate([*self.layers, self.predict]):
            check_separable(f"layers[{i}]", conv_dw, conv_pw)
        for i, norms in enumerate(self.norms):
            for bn in norms:
                check_norm(f"norms[{i}]", bn)

    def pack(self, dtype: torch.dtype) -> PackedHead:
        """The weights for :meth:`PackedHead.run`, batch norms folded."""
        dtype = kernel_dtype(dtype)
        scales, shifts = [], []
        for (_, conv_pw), norms in zip(self.layers, self.norms, strict=True):
            folded = [fold(conv_pw, bn, dtype)[1:] for bn in norms]
            scale, shift = zip(*folded, strict=True)
            scales.append(torch.stack(scale))
            shifts.append(torch.stack(shift))
        _, scale, shift = fold(self.predict[1], None, dtype)
        convs = [*self.layers, self.predict]
        return PackedHead(
            [edet_kernels.pack_depthwise(dw.weight.to(dtype)) for dw, _ in convs],
            [edet_kernels.pack_pointwise(pw.weight.to(dtype)) for _, pw in convs],
            [*scales, scale],
            [*shifts, shift],
            self.activation,
            self.finish,
        )


class PackedHead(NamedTuple):
    """The weights of ``edet_kernels.head``, one of each per layer."""

    dw_weights: list[Tensor]
    pw_weights: list[Tensor]
    scales: list[Tensor]
    shifts: list[Tensor]
    activation: str
    finish: Callable[[list[Tensor]], Any]

    def run(self, maps: Sequence[Tensor], dtype: torch.dtype) -> Any:
        """What the head makes of ``maps``, one per level, computed in ``dtype``."""
        maps = [x.to(dtype) for x in maps]
        return self.finish(edet_kernels.head(maps, *self[:4], activation=self.activation))


class BlockLayers(NamedTuple):
    """One inverted residual block: each part a convolution and its batch norm.

    ``expand`` is None where there is no expansion; ``squeeze`` the two convolutions of
    squeeze-excite, whose gate is a sigmoid, or None.
    """

    expand: tuple[nn.Conv2d, nn.Module] | None
    depthwise: tuple[nn.Conv2d, nn.Module]
    squeeze: tuple[nn.Conv2d, nn.Conv2d] | None
    project: tuple[nn.Conv2d, nn.Module]
    residual: bool


@dataclass(frozen=True)
class BackboneBlocks:
    """A backbone: a 3×3 stem of stride 2 and inverted residual blocks, which return some maps.

    Attributes:
        stem: convolution and batch norm.
        blocks: in the order they run.
        returned: indices of the blocks whose maps are returned.
        padding: of the convolutions with a stride, ``same`` or ``symmetric``.
        activation: of the stem, the expansions, the depthwise convolutions and squeeze-excite.
    """

    stem: tuple[nn.Conv2d, nn.Module]
    blocks: Sequence[BlockLayers]
    returned: Sequence[int]
    padding: str = "same"
    activation: str = "swish"

    def check(self) -> None:
        """Checks that the fused ops can compute this.

        Raises:
            Mismatch: they cannot.
        """
        stem, bn = self.stem
        _check_convolution("stem", stem)
        if (stem.kernel_size, stem.stride, stem.groups) != ((3, 3), (2, 2), 1):
            raise Mismatch("the stem is not a 3×3 convolution of stride 2")
        if stem.bias is not None:
            raise Mismatch("stem: a convolution before a batch norm has a bias")
        check_norm("stem", bn)
        for i, block in enumerate(self.blocks):
            name = f"blocks[{i}]"
            conv = block.depthwise[0]
            _check_convolution(name, conv)
            if not conv.groups == conv.in_channels == conv.out_channels:
                raise Mismatch(f"{name}: its convolution is not depthwise")
            if conv.kernel_size not in ((3, 3), (5, 5)) or conv.dilation != (1, 1):
                raise Mismatch(f"{name}: the depthwise convolution is not 3×3 or 5×5")
            for pointwise in (block.expand, block.project):
                if pointwise is not None:
                    check_pointwise(name, pointwise[0])
            for squeeze in block.squeeze or ():
                check_pointwise(name, squeeze)
            for part in (block.expand, block.depthwise, block.project):
                if part is not None:
                    check_norm(name, part[1])
                    if part[0].bias is not None:
                        raise Mismatch(f"{name}: a convolution before a batch norm has a bias")

    def pack(self, dtype: torch.dtype) -> PackedBackbone:
        """The weights for :meth:`PackedBackbone.run`, batch norms folded."""
        dtype = kernel_dtype(dtype)

        def scaled(conv: nn.Conv2d, bn: nn.Module, pack: Callable[[Tensor], Tensor]) -> Parts:
            scale, shift = fold_batch_norm(cast(nn.BatchNorm2d, bn))
            return pack(conv.weight.to(dtype)), scale.to(dtype), shift.to(dtype)

        def gate(squeeze: tuple[nn.Conv2d, nn.Conv2d]) -> Parts:
            return tuple(t for conv in squeeze for t in fold(conv, None, dtype)[::2])

        pointwise, depthwise = edet_kernels.pack_pointwise, edet_kernels.pack_depthwise
        blocks = [
            (
                None if block.expand is None else scaled(*block.expand, pointwise),
                scaled(*block.depthwise, depthwise),
                None if block.squeeze is None else gate(block.squeeze),
                scaled(*block.project, pointwise),
            )
            for block in self.blocks
        ]
        return PackedBackbone(self, scaled(*self.stem, edet_kernels.pack_stem), blocks)


Parts = tuple[Tensor, ...]


class PackedBackbone(NamedTuple):
    """The weights of ``edet_kernels.stem`` and of an ``edet_kernels.mbconv`` for each block."""

    source: BackboneBlocks
    stem: Parts
    blocks: list[tuple[Parts | None, Parts, Parts | None, Parts]]

    def run(
        self,
        images: Tensor,
        dtype: torch.dtype,
        mean: Tensor | None = None,
        std: Tensor | None = None,
    ) -> list[Tensor]:
        """The maps that the backbone makes of ``images`` (N, 3, H, W), computed in ``dtype``.

        With ``mean`` and ``std``, (3,), the images are pixels to be normalised, for example uint8.
        """
        padding, activation = self.source.padding, self.source.activation
        x = edet_kernels.stem(
            images.to(dtype) if mean is None else images,
            *self.stem,
            mean=mean,
            std=std,
            padding=padding,
            activation=activation,
            dtype=dtype,
        )
        maps = []
        for i, (block, weights) in enumerate(zip(self.source.blocks, self.blocks, strict=True)):
            x = edet_kernels.mbconv(
                x,
                *weights,
                stride=block.depthwise[0].stride[0],
                padding=padding,
                activation=activation,
                residual=block.residual,
            )
            if i in self.source.returned:
                maps.append(x)
        return maps
