"""BiFPN: the weighted bi-directional feature pyramid network, with effdet's state-dict keys."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn

import edet_kernels
from edet_kernels import reference
from edet_kernels.autocast import autocast_dtype

from ..fused.cells import Node, graph_of
from ..fused.describe import Edge, FusionNodes, Mismatch, NodeLayers
from ..fused.int8 import Int8Nodes
from ..fused.module import PackedModule, check_exported_size
from ..fused.packed import PackedNodes, pack_nodes
from ..fused.sources import own_weight
from .batch_norm import Normalised, SharedBatchNorm2d, normalise, training_maps
from .configs import FUSIONS


def bifpn_nodes(levels: int) -> list[Node]:
    """The nodes of one BiFPN cell (paper, figure 2d); the last ``levels`` of them are its outputs.

    Top-down, each level but the top one is fused with the level above; bottom-up, each level but
    the lowest with its own top-down node and the level below.
    """
    ids = [[level] for level in range(levels)]
    nodes: list[Node] = []
    top_down = [(level, level + 1) for level in reversed(range(levels - 1))]
    bottom_up = [(level, level - 1) for level in range(1, levels)]
    for level, neighbour in top_down + bottom_up:
        nodes.append(Node(level, (*ids[level], ids[neighbour][-1])))
        ids[level].append(levels + len(nodes) - 1)
    return nodes


def check_nodes(nodes: Sequence[Node], levels: int) -> None:
    """Checks that ``nodes`` are those of a cell: each reads what is there, each level has one.

    Raises:
        ValueError: naming the node or the level.
    """
    for i, (level, edges) in enumerate(nodes):
        if not 0 <= level < levels:
            raise ValueError(f"nodes[{i}].level must be 0 to {levels - 1}, got {level}")
        if not edges or not all(0 <= e < levels + i for e in edges):
            raise ValueError(f"nodes[{i}].edges must be of 0 to {levels + i - 1}, got {edges}")
    missing = set(range(levels)) - {level for level, _ in nodes}
    if missing:
        raise ValueError(f"nodes must give every level an output, level {min(missing)} has none")


def check_maps(maps: Any, channels: Sequence[int], weight: Tensor | None) -> None:
    """Checks that ``maps`` is a list of NCHW maps with these channels, fit for ``weight``.

    Args:
        weight: of the layers that get the maps; None when they have none.

    Raises:
        TypeError, ValueError: naming the map, what it must be and what it was.
    """
    if isinstance(maps, Tensor) or len(maps) != len(channels):
        got = f"a tensor {tuple(maps.shape)}" if isinstance(maps, Tensor) else f"{len(maps)}"
        raise ValueError(f"maps must be a list of {len(channels)} maps, got {got}")
    for i, (x, c) in enumerate(zip(maps, channels, strict=True)):
        if not isinstance(x, Tensor):
            raise TypeError(f"maps[{i}] must be a tensor, got {type(x).__name__}")
        if x.dim() != 4 or x.shape[1] != c:
            raise ValueError(f"maps[{i}] must be (N, {c}, H, W), got {tuple(x.shape)}")
        if weight is None:
            continue
        if x.device != weight.device:
            raise ValueError(
                f"maps[{i}] must be on {weight.device} like the weights, got {x.device}"
            )
        if x.dtype != weight.dtype and autocast_dtype(x) is None:
            raise TypeError(f"maps[{i}] must be {weight.dtype} like the weights, got {x.dtype}")


def batch_norm(channels: int) -> nn.BatchNorm2d:
    """The batch norm of the BiFPN and the heads: the published weights' ε and momentum."""
    return nn.BatchNorm2d(channels, eps=1e-3, momentum=0.01)


def glorot_uniform_(weight: Tensor, groups: int) -> None:
    """Fills a convolution weight by U(−l, l), l² = 6/(fan-in + fan-out) (Glorot & Bengio 2010)."""
    taps = weight[0, 0].numel()
    limit = (6 / ((weight.shape[1] + weight.shape[0] // groups) * taps)) ** 0.5
    nn.init.uniform_(weight, -limit, limit)


class ConvNorm(nn.Module):
    """1×1 convolution and batch norm."""

    def __init__(self, in_channels: int, out_channels: int, bias: bool) -> None:
        super().__init__()
        self.conv = nn.Conv2d(in_channels, out_channels, 1, bias=bias)
        self.bn = batch_norm(out_channels)

    def forward(self, x: Tensor) -> Tensor:
        return cast(Tensor, self.bn(self.conv(x)))


class Projection(nn.Module):
    """Brings a backbone map to the BiFPN's width."""

    def __init__(self, in_channels: int, out_channels: int, bias: bool) -> None:
        super().__init__()
        self.conv = ConvNorm(in_channels, out_channels, bias)

    def forward(self, x: Tensor) -> Tensor:
        return cast(Tensor, self.conv(x))


class SeparableConv(nn.Module):
    """Depthwise 3×3, pointwise 1×1 and, if asked for, a batch norm; no activation."""

    def __init__(
        self, in_channels: int, out_channels: int, *, bias: bool, norm: bool = False
    ) -> None:
        super().__init__()
        self.conv_dw = nn.Conv2d(
            in_channels, in_channels, 3, padding=1, groups=in_channels, bias=False
        )
        self.conv_pw = nn.Conv2d(in_channels, out_channels, 1, bias=bias)
        self.bn = batch_norm(out_channels) if norm else None

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv_pw(self.conv_dw(x))
        return x if self.bn is None else self.bn(x)

    def training_weights(self) -> tuple[Tensor, Tensor, Tensor]:
        """Depthwise weight, pointwise weight and bias, for ``edet_kernels.training_node``."""
        weight, bias = self.conv_pw.weight, self.conv_pw.bias
        return (
            self.conv_dw.weight,
            weight,
            weight.new_zeros(weight.shape[0]) if bias is None else bias,
        )


def check_separable_layers(name: str, conv: SeparableConv) -> None:
    """Checks that the convolutions of ``conv`` are padded as they were made.

    Raises:
        Mismatch: they are not.
    """
    for layer, zeros in ((conv.conv_dw, 1), (conv.conv_pw, 0)):
        if layer.padding != (zeros, zeros) or layer.padding_mode != "zeros":
            raise Mismatch(f"{name} is padded in another way")


class Combine(nn.Module):
    """The edges of a node: their weights, and the projections of those from the backbone."""

    edge_weights: nn.Parameter | None

    def __init__(self, weights: tuple[int, ...] | None, projections: dict[int, Projection]) -> None:
        super().__init__()
        self.edge_weights = None if weights is None else nn.Parameter(torch.ones(weights))
        self.resample = nn.ModuleDict({str(edge): layer for edge, layer in projections.items()})

    @property
    def projections(self) -> dict[int, Projection]:
        """The projection of each edge that has one."""
        return {int(edge): cast(Projection, layer) for edge, layer in self.resample.items()}


class AfterCombine(nn.Module):
    """The convolution of a node."""

    def __init__(self, width: int, bias: bool) -> None:
        super().__init__()
        self.conv = SeparableConv(width, width, bias=bias, norm=True)

    def forward(self, x: Tensor) -> Tensor:
        return cast(Tensor, self.conv(x))


class FusionNode(nn.Module):
    """Weighted fusion → activation → depthwise 3×3 → pointwise 1×1 → batch norm.

    Args:
        edges: ids of the maps it fuses.
        width: channels.
        in_channels: channels of the edges that need a projection, by id.
        fusion, fusion_per_channel, pool, activation, redundant_bias: as for :class:`BiFPN`.
    """

    def __init__(
        self,
        edges: tuple[int, ...],
        width: int,
        in_channels: dict[int, int],
        *,
        fusion: str,
        fusion_per_channel: bool,
        pool: str,
        activation: str,
        redundant_bias: bool,
    ) -> None:
        super().__init__()
        self.edges = edges
        self.fusion, self.pool, self.activation = fusion, pool, activation
        weights = (len(edges), width) if fusion_per_channel else (len(edges),)
        self.combine = Combine(
            None if fusion == "sum" else weights,
            {edge: Projection(c, width, redundant_bias) for edge, c in in_channels.items()},
        )
        self.after_combine = AfterCombine(width, redundant_bias)

    def forward(self, maps: Sequence[Tensor], size: tuple[int, int]) -> Tensor:
        """The node's map of ``size`` (H, W) from ``maps``, which its edges index."""
        projections = self.combine.projections
        fused = reference.weighted_fusion(
            [projections[e](maps[e]) if e in projections else maps[e] for e in self.edges],
            self.combine.edge_weights,
            size=size,
            fusion=self.fusion,
            pool=self.pool,
            activation=self.activation,
        )
        return cast(Tensor, self.after_combine(fused))

    def forward_training(self, maps: Sequence[Normalised], size: tuple[int, int]) -> Normalised:
        """:meth:`forward` by ``edet_kernels.training_node``."""
        projections = self.combine.projections
        fused = [
            Normalised(projections[e](maps[e].x).to(maps[e].x.dtype))
            if e in projections
            else maps[e]
            for e in self.edges
        ]
        conv = self.after_combine.conv
        [x], mean, deviations = edet_kernels.training_node(
            *Normalised.stack(fused),
            self.combine.edge_weights,
            *conv.training_weights(),
            edge_counts=[len(fused)],
            sizes=[size],
            fusion=self.fusion,
            pool=self.pool,
            activation=self.activation,
        )
        assert conv.bn is not None
        scale, offset = normalise([conv.bn], mean, deviations, [x.shape[0] * size[0] * size[1]])
        return Normalised(x, scale[0], offset[0])


class BiFPNCell(nn.Module):
    """One pass down and up the pyramid."""

    def __init__(self, nodes: Sequence[FusionNode], node_levels: Sequence[int]) -> None:
        super().__init__()
        self.fnode = nn.ModuleList(nodes)
        self.node_levels = tuple(node_levels)
        # the newest map of each level
        levels = max(self.node_levels) + 1
        newest = {level: levels + i for i, level in enumerate(self.node_levels)}
        self.outputs = tuple(newest[level] for level in range(levels))

    @property
    def nodes(self) -> list[FusionNode]:
        """The nodes in the order they run."""
        return cast("list[FusionNode]", list(self.fnode))

    def forward(self, maps: Sequence[Tensor], sizes: Sequence[tuple[int, int]]) -> list[Tensor]:
        """One map per level to one map per level, of ``sizes``."""
        known = list(maps)
        for node, level in zip(self.nodes, self.node_levels, strict=True):
            known.append(node(known, sizes[level]))
        return [known[i] for i in self.outputs]


class BiFPN(PackedModule):
    """Bi-directional feature pyramid network (EfficientDet paper, section 3).

    In the first cell every edge from a backbone map whose channels differ from ``width`` has its
    own 1×1 convolution and batch norm; the levels above the last backbone map are max-pooled from
    one more projection of it. Without gradients the projections of each map are one
    ``edet_kernels.lateral``, and all nodes of all cells one ``edet_kernels.bifpn``; in training
    each node is one ``edet_kernels.training_node``.

    Args:
        in_channels: channels of the backbone's maps, from the lowest level up.
        width: channels of the pyramid.
        cells: number of cells.
        levels: number of pyramid levels, at least ``len(in_channels)``.
        fusion: ``fast``, ``softmax``, ``unbounded`` or ``sum``.
        fusion_per_channel: one edge weight per channel instead of one per edge.
        pool: padding of the max pools, ``same`` or ``symmetric``.
        activation: before the convolutions, any of ``edet_kernels``.
        redundant_bias: convolutions before a batch norm carry a bias.
        nodes: the nodes of a cell, for another feature network; those of a BiFPN when None. The
            newest node of each level is its output.

    Raises:
        ValueError: no cell, no map, more maps than levels, fewer than two levels, unknown fusion, a
            level without a node or a node that reads what is not there.
    """

    layer_types = frozenset(
        (
            *(BiFPNCell, FusionNode, Combine, AfterCombine, Projection, ConvNorm, SeparableConv),
            *(nn.Conv2d, nn.BatchNorm2d, nn.SyncBatchNorm, SharedBatchNorm2d),
            *(nn.ModuleList, nn.ModuleDict),
        )
    )

    def __init__(
        self,
        in_channels: Sequence[int],
        width: int = 64,
        cells: int = 3,
        *,
        levels: int = 5,
        fusion: str = "fast",
        fusion_per_channel: bool = False,
        pool: str = "same",
        activation: str = "swish",
        redundant_bias: bool = True,
        nodes: Sequence[Node] | None = None,
    ) -> None:
        super().__init__()
        if levels < 2 or not 1 <= len(in_channels) <= levels:
            raise ValueError(
                "levels must be at least 2 and in_channels name 1 to `levels` maps, "
                f"got {levels} levels and {len(in_channels)} maps"
            )
        if cells < 1:
            raise ValueError(f"cells must be at least 1, got {cells}")
        if fusion not in FUSIONS:
            raise ValueError(f"fusion must be one of {', '.join(FUSIONS)}, got {fusion!r}")
        if fusion == "sum" and fusion_per_channel:
            raise ValueError("fusion_per_channel must be False for fusion 'sum', got True")
        self.in_channels = tuple(in_channels)
        self.width, self.levels = width, levels
        self.fusion, self.pool, self.activation = fusion, pool, activation
        self._nodes = bifpn_nodes(levels) if nodes is None else [Node(*node) for node in nodes]
        check_nodes(self._nodes, levels)
        needs_projection = {e: c for e, c in enumerate(in_channels) if c != width}
        top = len(in_channels) - 1
        # in effdet's keys the first level above the backbone holds the projection of them all
        self.resample = nn.ModuleDict()
        if levels > len(in_channels) and top in needs_projection:
            layer = Projection(in_channels[top], width, redundant_bias)
            self.resample[str(top + 1)] = layer
        self.cell = nn.ModuleList()
        for c in range(cells):
            in_first = needs_projection if c == 0 else {}
            fusion_nodes = [
                FusionNode(
                    node.edges,
                    width,
                    {e: in_first[e] for e in node.edges if e in in_first},
                    fusion=fusion,
                    fusion_per_channel=fusion_per_channel,
                    pool=pool,
                    activation=activation,
                    redundant_bias=redundant_bias,
                )
                for node in self._nodes
            ]
            self.cell.append(BiFPNCell(fusion_nodes, [node.level for node in self._nodes]))
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                glorot_uniform_(module.weight, module.groups)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)

    @property
    def cells(self) -> list[BiFPNCell]:
        """The cells in the order they run."""
        return cast("list[BiFPNCell]", list(self.cell))

    def forward(self, maps: Sequence[Tensor]) -> list[Tensor]:
        """Backbone maps (N, in_channels[i], Hᵢ, Wᵢ) to one map (N, width, H, W) per level.

        Raises:
            TypeError, ValueError: ``maps`` are not what ``in_channels`` says.
        """
        check_maps(maps, self.in_channels, own_weight(self))
        for i, x in enumerate(maps):
            check_exported_size(f"maps[{i}]", x)
        sizes = [(int(x.shape[-2]), int(x.shape[-1])) for x in maps]
        while len(sizes) < self.levels:
            sizes.append(((sizes[-1][0] + 1) // 2, (sizes[-1][1] + 1) // 2))
        packed = self.packed(maps[0])
        if packed is not None:
            weights, dtype = packed
            return cast("list[Tensor]", weights.run(maps, dtype))
        training = training_maps(self, maps)
        pyramid = list(maps if training is None else training)
        for level in range(len(maps), self.levels):
            x = pyramid[-1]
            if str(level) in self.resample:
                x = self.resample[str(level)](x)
            pyramid.append(reference.resize(x, sizes[level], self.pool))
        if training is not None:
            return self._forward_training(pyramid, sizes)
        for cell in self.cells:
            pyramid = cell(pyramid, sizes)
        return pyramid

    def _forward_training(
        self, pyramid: Sequence[Tensor], sizes: Sequence[tuple[int, int]]
    ) -> list[Tensor]:
        inputs = [Normalised(x) for x in pyramid]
        for cell in self.cells:
            known = list(inputs)
            for node, level in zip(cell.nodes, cell.node_levels, strict=True):
                known.append(node.forward_training(known, sizes[level]))
            inputs = [known[i] for i in cell.outputs]
        return [x.tensor() for x in inputs]

    def as_fusion_nodes(self) -> FusionNodes:
        """What this network is made of, for the fused ops."""

        def edge(source: int, layer: nn.Module | None) -> Edge:
            conv = None if layer is None else cast(Projection, layer).conv
            return Edge(source) if conv is None else Edge(source, conv.conv, conv.bn)

        given = len(self.in_channels)
        above = [
            edge(level - 1, dict(self.resample.items()).get(str(level)))
            for level in range(given, self.levels)
        ]
        graph = graph_of(
            [
                [Node(level, n.edges) for n, level in zip(c.nodes, c.node_levels, strict=True)]
                for c in self.cells
            ],
            self.levels,
        )
        nodes = []
        for own, (level, sources) in zip(
            [node for cell in self.cells for node in cell.nodes], graph.nodes, strict=True
        ):
            projections, conv = own.combine.projections, own.after_combine.conv
            edges = [
                edge(source, projections.get(e))
                for source, e in zip(sources, own.edges, strict=True)
            ]
            weights = own.combine.edge_weights
            layers = conv.conv_dw, conv.conv_pw, conv.bn
            nodes.append(NodeLayers(level, edges, *layers, weights, self.fusion))
        return FusionNodes(given, nodes, graph.outputs, above, self.pool, self.activation)

    def check_layers(self) -> None:
        layers = dict(self.resample.items())
        for c, cell in enumerate(self.cells):
            for n, node in enumerate(cell.nodes):
                name = f"cell.{c}.fnode.{n}"
                check_separable_layers(name, node.after_combine.conv)
                if (node.pool, node.activation, node.fusion) != (
                    *(self.pool, self.activation),
                    self.fusion,
                ):
                    raise Mismatch(f"{name} fuses, pools or activates in another way")
                layers |= {f"{name}.{e}": p for e, p in node.combine.projections.items()}
        for name, layer in layers.items():
            if cast(Projection, layer).conv.conv.padding != (0, 0):
                raise Mismatch(f"{name} is padded in another way")
        self.as_fusion_nodes().check()

    def pack(self, dtype: torch.dtype) -> PackedNodes | Int8Nodes:
        weights = pack_nodes(self.as_fusion_nodes(), dtype)
        return weights if self.int8 is None else Int8Nodes(weights, self.int8, dtype)
