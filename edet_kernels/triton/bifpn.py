"""bifpn in Triton: its nodes one after the other, each a launch (or two) of fusion_node."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from .fusion_node import fusion_node


def bifpn(
    inputs: Sequence[Tensor],
    edge_weights: Tensor | None,
    dw_weight: Tensor,
    pw_weight: Tensor,
    scale: Tensor,
    shift: Tensor,
    edges: Sequence[int],
    edge_counts: Sequence[int],
    sizes: Sequence[int],
    outputs: Sequence[int],
    fusion: int,
    pool: int,
    pre_activation: int,
    post_activation: int,
) -> list[Tensor]:
    """The operator ``bifpn``; see :func:`edet_kernels.bifpn`."""
    maps, first = list(inputs), 0
    for i, count in enumerate(edge_counts):
        maps.append(
            fusion_node(
                [maps[e] for e in edges[first : first + count]],
                None if edge_weights is None else edge_weights[i, :count],
                dw_weight[i],
                pw_weight[i],
                scale[i],
                shift[i],
                sizes[2 * i : 2 * i + 2],
                fusion,
                pool,
                pre_activation,
                post_activation,
            )
        )
        first += count
    return [maps[o] for o in outputs]
