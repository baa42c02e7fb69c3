"""Cells of a feature network as lists of node ids, and what their repetition makes of the ids."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple


class Node(NamedTuple):
    """One node of a cell: the level it writes and the ids it fuses.

    Ids 0 … levels−1 are the cell's inputs, then come the nodes in order.
    """

    level: int
    edges: tuple[int, ...]


class Graph(NamedTuple):
    """The nodes of all cells, whose ids now count the network's inputs and all nodes before.

    Attributes:
        nodes: in the order they run.
        outputs: for each level the id of its newest node.
    """

    nodes: list[Node]
    outputs: list[int]

    @property
    def edges(self) -> list[tuple[int, ...]]:
        """For each node the ids it fuses, as ``edet_kernels.bifpn`` is told."""
        return [node.edges for node in self.nodes]


def graph_of(cells: Sequence[Sequence[Node]], levels: int) -> Graph:
    """Cells one after the other, each fed with the newest map of each level of the one before."""
    nodes: list[Node] = []
    newest = list(range(levels))
    for cell in cells:
        known = list(newest)  # ids that the cell's own ids stand for
        for level, edges in cell:
            nodes.append(Node(level, tuple(known[e] for e in edges)))
            newest[level] = levels + len(nodes) - 1
            known.append(newest[level])
    return Graph(nodes, newest)
