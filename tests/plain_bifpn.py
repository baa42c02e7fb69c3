"""A whole feature network by one call for each node."""

import torch

import edet_kernels
from edet_kernels.testing.samples import Call


def node_by_node(call: Call) -> list[torch.Tensor]:
    """The result of a ``bifpn`` from one ``fusion_node`` for each node."""
    edge_weights, *weights = call.weights
    options = dict(call.options)
    nodes, sizes, outputs = (options.pop(name) for name in ("nodes", "sizes", "outputs"))
    maps = list(call.maps)
    for i, (edges, size) in enumerate(zip(nodes, sizes, strict=True)):
        edge = None if edge_weights is None else edge_weights[i, : len(edges)]
        node = [w[i] for w in weights]
        maps.append(
            edet_kernels.fusion_node([maps[e] for e in edges], edge, *node, size=size, **options)
        )
    return [maps[o] for o in outputs]
