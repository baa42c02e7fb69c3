"""The nodes that training runs, in front of their batch norm: training_node."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from .. import reference
from ..autocast import cast
from ..backend import runs_reference
from ..fakes import empty_gradients, empty_map, fake
from ..names import MAX_EDGES, Size
from ..operators import backward, for_reference, run
from ..packing import as_packed_depthwise, as_packed_pointwise
from .checks import (
    check_edges,
    check_flag,
    check_integer,
    check_list,
    check_maps,
    check_out,
    check_resize,
    check_size,
    check_weight,
    dw_shapes,
    numbers_of,
)


def _check_nodes(
    inputs: Sequence[Tensor],
    edge_counts: Sequence[int],
    sizes: Sequence[Size],
    edge_weights: Tensor | None,
    statistics: bool,
) -> None:
    """Checks that ``edge_counts`` and ``sizes`` describe nodes over ``inputs``, and their edges."""
    check_flag("statistics", statistics)
    check_list("edge_counts", edge_counts, "numbers")
    check_list("sizes", sizes, "tuples")
    for i, count in enumerate(edge_counts):
        check_integer(f"edge_counts[{i}]", count, 1, MAX_EDGES)
    if sum(edge_counts) != len(inputs) or len(sizes) != len(edge_counts):
        raise ValueError(
            "edge_counts and sizes must describe every node and input, got "
            f"{list(edge_counts)} and {len(sizes)} sizes for {len(inputs)} inputs"
        )
    first = 0
    for i, (count, size) in enumerate(zip(edge_counts, sizes, strict=True)):
        check_size(f"sizes[{i}]", size)
        check_list(f"inputs of node {i}", inputs[first : first + count], "maps", MAX_EDGES)
        for e in range(first, first + count):
            check_resize(f"inputs[{e}]", inputs[e].shape[-2:], (size[0], size[1]))
        first += count
    if edge_weights is not None and len(sizes) > 1:
        raise ValueError("edge_weights must be None for more than one node")


def training_node(
    inputs: Sequence[Tensor],
    scales: Tensor | None,
    offsets: Tensor | None,
    edge_weights: Tensor | None,
    dw_weight: Tensor,
    pw_weight: Tensor,
    shift: Tensor,
    *,
    edge_counts: Sequence[int],
    sizes: Sequence[Size],
    fusion: str = "sum",
    pool: str = "same",
    activation: str = "swish",
    statistics: bool = True,
) -> tuple[list[Tensor], Tensor, Tensor]:
    """Nodes in front of their batch norm, and what the batch norm needs: for training.

    Each node is pw(dw(activation(:func:`weighted_fusion`))) + shift with one convolution for all
    nodes: one BiFPN node, or one layer of a head on all levels. A batch norm over a node's map is
    not applied but handed on: the statistics are an output, with gradients, and whoever reads the
    map gives its batch norm as ``scales`` and ``offsets``. So only the map itself is kept for the
    backward pass.

    Args:
        inputs: the maps (N, C, Hᵢ, Wᵢ) that the first node fuses, then those of the second, …
        scales, offsets: (len(inputs), C), an input is read as scale·x + offset; None: as it is.
        edge_weights: as for :func:`weighted_fusion`; None where there is more than one node.
        dw_weight, pw_weight: as for :func:`fusion_node`.
        shift: (C_out,), the bias of the pointwise convolution.
        edge_counts: how many inputs each node fuses.
        sizes: (H, W) of each node.
        fusion, pool, activation: as for :func:`weighted_fusion`.
        statistics: False where no batch norm follows.

    Returns:
        one map (N, C_out, H, W) per node; the mean of each channel over its N·H·W values, and the
        sum of their squared deviations from it, (nodes, C_out) in float32 (float64 for float64),
        (0, C_out) without ``statistics``.

    Raises:
        ValueError, TypeError: naming the argument, what it must be and what it was.
    """
    inputs = cast(inputs)
    check_maps("inputs", inputs)
    x, n, c = inputs[0], len(inputs), inputs[0].shape[1]
    words: dict[str, Any] = {"fusion": fusion, "pool": pool, "activation": activation}
    numbers = numbers_of(**words)
    _check_nodes(inputs, edge_counts, sizes, edge_weights, statistics)
    check_edges(edge_weights, [(n,), (n, c)], fusion, x)
    if (scales is None) != (offsets is None):
        raise ValueError("scales and offsets must be given together")
    for name, t in (("scales", scales), ("offsets", offsets)):
        if t is not None:
            check_weight(name, t, [(n, c)], x)
    check_weight("dw_weight", dw_weight, dw_shapes(c), x)
    check_out(shift, shift, pw_weight, c, x)
    tensors = (scales, offsets, edge_weights, dw_weight, pw_weight, shift)
    if runs_reference("training_node", [*inputs, *tensors]):
        return reference.training_node(
            inputs,
            *tensors,
            edge_counts=edge_counts,
            sizes=sizes,
            statistics=statistics,
            **words,
        )
    *maps, mean, deviations = run(
        "training_node",
        list(inputs),
        *(None if t is None else t.float() for t in (scales, offsets, edge_weights)),
        as_packed_depthwise(dw_weight).float(),
        as_packed_pointwise(pw_weight).float(),
        shift.float(),
        list(edge_counts),
        [n for size in sizes for n in size],
        *numbers,
        statistics,
    )
    return maps, mean, deviations


@fake("training_node")
def _fake_training_node(
    inputs: Sequence[Tensor],
    scales: Tensor | None,
    offsets: Tensor | None,
    edge_weights: Tensor | None,
    dw_weight: Tensor,
    pw_weight: Tensor,
    shift: Tensor,
    edge_counts: Sequence[int],
    sizes: Sequence[int],
    fusion: int,
    pool: int,
    activation: int,
    statistics: bool,
) -> list[Tensor]:
    channels, extents = shift.shape[0], zip(sizes[::2], sizes[1::2], strict=True)
    maps = [empty_map(inputs[0], channels, h, w) for h, w in extents]
    rows = len(edge_counts) if statistics else 0
    return [*maps, *(shift.new_empty((rows, channels)) for _ in range(2))]


@fake("training_node_backward")
def _fake_training_node_backward(
    grads: Sequence[Tensor],
    grad_mean: Tensor,
    grad_m2: Tensor,
    outputs: Sequence[Tensor],
    mean: Tensor | None,
    *arguments: Any,
) -> list[Tensor]:
    return empty_gradients(grads, *arguments)


@for_reference("training_node")
def _training_node_for_reference(given: dict[str, Any]) -> dict[str, Any]:
    sizes = given["sizes"]
    return {**given, "sizes": list(zip(sizes[::2], sizes[1::2], strict=True))}


@backward("training_node", "training_node_backward", results_kept=lambda args: bool(args[-1]))
def _training_node_backward(
    ops: Any, args: Sequence[Any], grads: list[Tensor], results: list[Tensor]
) -> list[Tensor]:
    *maps, mean, _ = results or (None, None)  # nothing is kept where there are no statistics
    *map_grads, mean_grad, m2_grad = grads
    found = ops.training_node_backward(map_grads, mean_grad, m2_grad, maps, mean, *args[:-1])
    return list(found)
