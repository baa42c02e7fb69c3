"""The layers of EfficientDet for other networks, and the feature networks of the paper's table 5.

A feature network is a :class:`BiFPN` with other nodes: :data:`NETWORKS` names them. All its cells
run as one fused op, as BiFPN's do.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor, nn

from edet_kernels.reference import activate

from .fused.cells import Node
from .models.bifpn import BiFPN, FusionNode, SeparableConv, bifpn_nodes
from .models.heads import CLASS_PRIOR_BIAS, Head


class SeparableConvBNAct(nn.Module):
    """Depthwise 3×3 → pointwise 1×1 → batch norm → activation.

    Args:
        in_channels, out_channels: of the map.
        bias: the pointwise convolution carries one, though a batch norm follows.
        activation: any of ``edet_kernels``.
    """

    def __init__(
        self, in_channels: int, out_channels: int, *, bias: bool = False, activation: str = "swish"
    ) -> None:
        super().__init__()
        self.conv = SeparableConv(in_channels, out_channels, bias=bias, norm=True)
        self.activation = activation

    def forward(self, x: Tensor) -> Tensor:
        """(N, in_channels, H, W) to (N, out_channels, H, W)."""
        return activate(self.conv(x), self.activation)


class ClassNet(Head):
    """The class head: for each level logits (N, anchors·classes, H, W), anchor-major.

    Args:
        width: channels of the pyramid.
        num_classes, num_anchors: per cell of a level.
        options: of :class:`edet.heads.Head`, such as ``repeats``, ``levels`` and ``activation``.
    """

    def __init__(
        self, width: int, num_classes: int, *, num_anchors: int = 9, **options: Any
    ) -> None:
        super().__init__(width, num_anchors * num_classes, prior_bias=CLASS_PRIOR_BIAS, **options)


class BoxNet(Head):
    """The box head: for each level (N, anchors·4, H, W), a box being ty, tx, th, tw.

    Args:
        width: channels of the pyramid.
        num_anchors: per cell of a level.
        options: of :class:`edet.heads.Head`, such as ``repeats``, ``levels`` and ``activation``.
    """

    def __init__(self, width: int, *, num_anchors: int = 9, **options: Any) -> None:
        super().__init__(width, num_anchors * 4, **options)


def fpn_nodes(levels: int) -> list[Node]:
    """Top-down FPN (paper, figure 2a): each level is fused with the one above."""
    nodes = [Node(levels - 1, (levels - 1,))]
    for level in reversed(range(levels - 1)):
        nodes.append(Node(level, (level, levels + len(nodes) - 1)))
    return nodes


def panet_nodes(levels: int) -> list[Node]:
    """FPN and PANet (figure 2b): a pass down, then a pass up over what it made."""
    nodes = fpn_nodes(levels)
    down = {node.level: levels + i for i, node in enumerate(nodes)}
    nodes.append(Node(0, (down[0],)))
    for level in range(1, levels):
        nodes.append(Node(level, (down[level], levels + len(nodes) - 1)))
    return nodes


def nas_fpn_nodes(levels: int = 5) -> list[Node]:
    """NAS-FPN (figure 2c; Ghiasi et al. 2019, figure 6): seven merges, for five levels.

    Its merges with global-pooling attention are weighted sums here, as all others.

    Raises:
        ValueError: not five levels.
    """
    if levels != 5:
        raise ValueError(f"levels must be 5 for NAS-FPN, got {levels}")
    p3, p4, p5, p6, p7 = range(5)
    return [
        Node(p4, (p4, p6)),
        Node(p4, (p4, 5)),
        Node(p3, (p3, 6)),
        Node(p4, (6, 7)),
        Node(p5, (p5, 8, 7)),
        Node(p7, (p7, 9, 6)),
        Node(p6, (9, 10)),
    ]


def fully_connected_nodes(levels: int) -> list[Node]:
    """Fully-connected FPN: two passes in which every level is fused with all levels."""
    first = [Node(level, tuple(range(levels))) for level in range(levels)]
    return first + [Node(level, tuple(range(levels, 2 * levels))) for level in range(levels)]


#: The nodes of a cell, for a number of levels, by the network's name.
NETWORKS: dict[str, Callable[[int], list[Node]]] = {
    "fpn": fpn_nodes,
    "panet": panet_nodes,
    "nas_fpn": nas_fpn_nodes,
    "fully_connected": fully_connected_nodes,
    "bifpn": bifpn_nodes,
}


def feature_network(
    name: str, in_channels: Sequence[int], width: int = 64, cells: int = 3, **options: Any
) -> BiFPN:
    """The feature network ``name``, repeated ``cells`` times, of separable convolutions.

    Args:
        name: one of :data:`NETWORKS`.
        in_channels, width, cells, options: of :class:`BiFPN`; ``fusion="sum"`` for no weights.

    Raises:
        ValueError: unknown name, or what :class:`BiFPN` refuses.
    """
    if name not in NETWORKS:
        raise ValueError(f"name must be one of {', '.join(NETWORKS)}, got {name!r}")
    nodes = NETWORKS[name](options.get("levels", 5))
    return BiFPN(in_channels, width, cells, nodes=nodes, **options)


__all__ = [
    "NETWORKS",
    "BiFPN",
    "BoxNet",
    "ClassNet",
    "FusionNode",
    "Node",
    "SeparableConvBNAct",
    "bifpn_nodes",
    "feature_network",
    "fpn_nodes",
    "fully_connected_nodes",
    "nas_fpn_nodes",
    "panet_nodes",
]
