"""Weights of described networks, folded and packed once, and the fused ops that run them.

:func:`pack` makes of a description what runs it: :class:`PackedNodes`, :class:`PackedHead` or
:class:`PackedBackbone`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import singledispatch
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import edet_kernels
from edet_kernels import reference

from .describe import BackboneBlocks, Edge, FusionNodes, HeadLayers, NodeLayers
from .module import fold_batch_norm, kernel_dtype


@singledispatch
def pack(description: object, dtype: torch.dtype) -> Any:
    """The packed weights for maps of ``dtype``, with a method ``run``; batch norms are folded.

    Raises:
        TypeError: ``description`` is none of :mod:`edet.describe`.
    """
    raise TypeError(
        "description must be FusionNodes, HeadLayers or BackboneBlocks, "
        f"got {type(description).__name__}"
    )


@pack.register(FusionNodes)
def pack_nodes(graph: FusionNodes, dtype: torch.dtype) -> PackedNodes:
    """The weights of a feature network."""
    return PackedNodes(graph, kernel_dtype(dtype))


@pack.register(HeadLayers)
def pack_head(head: HeadLayers, dtype: torch.dtype) -> PackedHead:
    """The weights of a head."""
    dtype = kernel_dtype(dtype)
    scales, shifts = [], []
    for (_, conv_pw), norms in zip(head.layers, head.norms, strict=True):
        folded = [fold(conv_pw, bn, dtype)[1:] for bn in norms]
        scale, shift = zip(*folded, strict=True)
        scales.append(torch.stack(scale))
        shifts.append(torch.stack(shift))
    _, scale, shift = fold(head.predict[1], None, dtype)
    convs = [*head.layers, head.predict]
    return PackedHead(
        [edet_kernels.pack_depthwise(dw.weight.to(dtype)) for dw, _ in convs],
        [edet_kernels.pack_pointwise(pw.weight.to(dtype)) for _, pw in convs],
        [*scales, scale],
        [*shifts, shift],
        head.activation,
        head.finish,
    )


@pack.register(BackboneBlocks)
def pack_backbone(backbone: BackboneBlocks, dtype: torch.dtype) -> PackedBackbone:
    """The weights of a backbone."""
    dtype = kernel_dtype(dtype)

    def scaled(conv: nn.Conv2d, bn: nn.Module, packing: Callable[[Tensor], Tensor]) -> Parts:
        scale, shift = fold_batch_norm(cast(nn.BatchNorm2d, bn))
        return packing(conv.weight.to(dtype)), scale.to(dtype), shift.to(dtype)

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
        for block in backbone.blocks
    ]
    return PackedBackbone(backbone, scaled(*backbone.stem, edet_kernels.pack_stem), blocks)


def fold(
    conv: nn.Conv2d, bn: nn.Module | None, dtype: torch.dtype
) -> tuple[Tensor, Tensor, Tensor]:
    """Packed weight, scale and shift of a 1×1 convolution and its batch norm."""
    weight = edet_kernels.pack_pointwise(conv.weight.to(dtype))
    if bn is not None:
        scale, shift = fold_batch_norm(cast(nn.BatchNorm2d, bn), conv.bias)
        return weight, scale.to(dtype), shift.to(dtype)
    scale = torch.ones(conv.out_channels, dtype=dtype, device=conv.weight.device)
    if conv.bias is None:
        return weight, scale, torch.zeros_like(scale)
    return weight, scale, conv.bias.to(dtype, copy=True)  # what is packed changes no more


def _coefficients(node: NodeLayers, like: Tensor) -> Tensor:
    """The node's normalised weights, for a graph whose nodes fuse in different ways."""
    if node.edge_weights is None:
        return like.new_ones(len(node.edges))
    weights = node.edge_weights.to(like.dtype)
    found = reference.fusion_coefficients(weights, len(node.edges), node.fusion)
    assert found is not None
    return found


def _is_chained(graph: FusionNodes) -> bool:
    """Whether the levels above are the usual chain: a projection pooled again and again."""
    if graph.pool == "zero" or not graph.above:
        return False
    first, top = graph.above[0], graph.inputs - 1
    return (
        first.source == top
        and first.conv is not None
        and all(edge.conv is not first.conv for node in graph.nodes for edge in node.edges)
        and all(e.source == top + i and e.conv is None for i, e in enumerate(graph.above) if i)
    )


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
        self.chained = _is_chained(graph)
        self._place(graph, self._project(graph, dtype))
        self._stack(graph.nodes, dtype)

    def _project(self, graph: FusionNodes, dtype: torch.dtype) -> dict[object, int]:
        """Folds all projections; the place of each op input, by its map or its convolution."""
        top = graph.inputs - 1
        edges = [edge for node in graph.nodes for edge in node.edges]
        self.lateral = [_Lateral([], [], []) for _ in range(graph.inputs)]
        places: dict[object, int] = {}
        for source in range(graph.inputs):
            mine = [edge for edge in edges if edge.source == source]
            if any(edge.conv is None for edge in mine):
                places[source] = len(places)
            if source == top and self.chained:
                mine.append(graph.above[0])  # the last projection is the one that is pooled
            for edge in mine:
                if edge.conv is None or edge.conv in places:
                    continue
                for tensors, tensor in zip(
                    self.lateral[source], fold(edge.conv, edge.bn, dtype), strict=True
                ):
                    tensors.append(tensor)
                if not (self.chained and edge is graph.above[0]):
                    places[edge.conv] = len(places)
        self.raw = [source in places for source in range(graph.inputs)]
        for level in range(graph.inputs, graph.levels):
            places[level] = len(places)
        self.above: list[tuple[int, _Lateral | None]] = []
        for edge in [] if self.chained else graph.above:
            lateral = None
            if edge.conv is not None:
                lateral = _Lateral(*([x] for x in fold(edge.conv, edge.bn, dtype)))
            self.above.append((edge.source, lateral))
        return places

    def _place(self, graph: FusionNodes, places: dict[object, int]) -> None:
        """Brings the graph into the ids of the ops: inputs by their ``places``, then nodes."""
        count = len(places)

        def place(edge: Edge) -> int:
            if edge.source >= graph.levels:
                return count + edge.source - graph.levels
            return places[edge.source if edge.conv is None else edge.conv]

        self.nodes = [tuple(place(edge) for edge in node.edges) for node in graph.nodes]
        self.outputs = [count + o - graph.levels for o in graph.outputs]
        # the level of each op input and node, to know which edges shrink
        edges = [edge for node in graph.nodes for edge in node.edges]
        level_of = {places[key]: key for key in places if isinstance(key, int)}
        level_of |= {places[e.conv]: e.source for e in edges if e.conv is not None}
        level_of |= {count + i: level for i, level in enumerate(self.node_levels)}
        self.shrinks = [
            tuple(level_of[e] < node.level for e in ids)
            for ids, node in zip(self.nodes, graph.nodes, strict=True)
        ]

    def _stack(self, nodes: Sequence[NodeLayers], dtype: torch.dtype) -> None:
        """Stacks the nodes' weights, edge weights padded to the most edges."""
        folded = [fold(node.conv_pw, node.bn, dtype) for node in nodes]
        pw_weight, scale, shift = (torch.stack(parts) for parts in zip(*folded, strict=True))
        fusions = {node.fusion for node in nodes}
        self.fusion = fusions.pop() if len(fusions) == 1 else "unbounded"
        most = max(len(node.edges) for node in nodes)
        weights = [_coefficients(n, scale) if fusions else n.edge_weights for n in nodes]
        edge_weights = [w.to(dtype) for w in weights if w is not None]
        self.edge_weights = None
        if edge_weights:
            self.edge_weights = torch.stack(
                [F.pad(w, (*[0, 0] * (w.dim() - 1), 0, most - w.shape[0])) for w in edge_weights]
            )
        self.dw_weight = torch.stack(
            [edet_kernels.pack_depthwise(node.conv_dw.weight.to(dtype)) for node in nodes]
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
