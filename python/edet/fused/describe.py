"""Descriptions of feature networks, heads and backbones of any code base, for the fused ops.

What describes itself can be run on fused ops (:mod:`edet.fused.packed`): a feature network has a
method ``as_fusion_nodes()`` that returns :class:`FusionNodes`, a head a method ``as_head_layers()``
that returns :class:`HeadLayers`, a backbone ``as_backbone_blocks()`` that returns
:class:`BackboneBlocks`. :func:`edet.accelerate` finds all three.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from torch import Tensor, nn

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
    if conv.padding not in ((0, 0), "same", "valid"):
        raise Mismatch(f"{name}: the 1×1 convolution has a padding")


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
    if not is_batch_norm(bn) and not _is_norm_with_activation(bn):
        raise Mismatch(f"{name}: {type(bn).__name__} is not a batch norm")
    if bn.running_mean is None or bn.weight is None:
        raise Mismatch(f"{name}: the batch norm has no running statistics or no weights")


def is_batch_norm(layer: nn.Module) -> bool:
    """Whether ``layer`` is a batch norm that in eval mode does nothing else, also our own kinds."""
    kind = type(layer)
    return kind in (nn.BatchNorm2d, nn.SyncBatchNorm) or (
        isinstance(layer, nn.BatchNorm2d) and kind.__module__.startswith("edet.")
    )


def _is_norm_with_activation(bn: nn.Module) -> bool:
    """Whether ``bn`` is timm's batch norm with an activation behind it, which is not part of it."""
    return isinstance(bn, nn.BatchNorm2d) and type(bn).__name__ == "BatchNormAct2d"


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
