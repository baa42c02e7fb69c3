"""Fusion of maps, alone and as nodes: weighted_fusion, fusion_node and bifpn."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor

from .. import reference
from ..autocast import cast
from ..backend import runs_reference
from ..fakes import empty_map, fake
from ..names import MAX_EDGES, Size
from ..operators import backward, for_reference, run
from ..packing import PANEL, as_packed_depthwise, as_packed_pointwise
from .checks import (
    check_edges,
    check_list,
    check_maps,
    check_out,
    check_resize,
    check_size,
    check_weight,
    dw_shapes,
    is_integer,
    numbers_of,
)


def weighted_fusion(
    inputs: Sequence[Tensor],
    edge_weights: Tensor | None = None,
    *,
    size: Size | None = None,
    fusion: str = "fast",
    pool: str = "same",
    activation: str = "none",
) -> Tensor:
    """Weighted fusion of resized maps: activation(Σ aᵢ·resize(xᵢ)) (EfficientDet, section 3.3).

    Args:
        inputs: n maps (N, C, Hᵢ, Wᵢ) of one float dtype and device.
        edge_weights: (n,), or (n, C) for one weight per channel; None for ``fusion="sum"``.
        size: (H, W) of the output; the first input's when None. A smaller input is enlarged by
            nearest neighbour (source floor(i·in/out)), a larger one max-pooled with stride
            s = (in−1)//out + 1, kernel s + 1 and −inf padding.
        fusion: ``fast`` a = relu(w)/(Σ relu(w) + 1e-4), ``softmax`` a = softmax(w),
            ``unbounded`` a = w, ``sum`` a = 1.
        pool: ``same`` (TensorFlow's padding, the odd pixel at the bottom and right) or
            ``symmetric`` (s−1 at the top and left).
        activation: ``none``, ``swish``, ``relu``, ``relu6`` or ``hard_swish``.

    Returns:
        (N, C, H, W) in the inputs' dtype, channels_last from a kernel.

    Raises:
        ValueError, TypeError: naming the argument, what it must be and what it was.
    """
    inputs = cast(inputs)
    check_maps("inputs", inputs)
    check_list("inputs", inputs, "maps", MAX_EDGES)
    x = inputs[0]
    numbers = numbers_of(fusion=fusion, pool=pool, activation=activation)
    size = check_size("size", x.shape[-2:] if size is None else size)
    for i, y in enumerate(inputs):
        check_resize(f"inputs[{i}]", y.shape[-2:], size)
    n = len(inputs)
    check_edges(edge_weights, [(n,), (n, x.shape[1])], fusion, x)
    if runs_reference("weighted_fusion", [*inputs, edge_weights]):
        return reference.weighted_fusion(
            inputs, edge_weights, size=size, fusion=fusion, pool=pool, activation=activation
        )
    edges = None if edge_weights is None else edge_weights.float()
    return run("weighted_fusion", list(inputs), edges, size, *numbers)


@fake("weighted_fusion")
def _fake_weighted_fusion(
    inputs: Sequence[Tensor], edge_weights: Tensor | None, size: Sequence[int], *_: Any
) -> Tensor:
    return empty_map(inputs[0], inputs[0].shape[1], *size)


@backward("weighted_fusion", "weighted_fusion_backward")
def _weighted_fusion_backward(ops: Any, args: Sequence[Any], grads: list[Tensor]) -> list[Tensor]:
    return list(ops.weighted_fusion_backward(grads[0], *args))


def fusion_node(
    inputs: Sequence[Tensor],
    edge_weights: Tensor | None,
    dw_weight: Tensor,
    pw_weight: Tensor,
    scale: Tensor,
    shift: Tensor,
    *,
    size: Size | None = None,
    fusion: str = "fast",
    pool: str = "same",
    pre_activation: str = "swish",
    post_activation: str = "none",
) -> Tensor:
    """One BiFPN node in one pass: fuse, activate, depthwise 3×3, pointwise 1×1, batch norm.

    post_activation(scale · pw(dw(pre_activation(:func:`weighted_fusion`))) + shift), as in the
    published models (swish before the convolution); pass ``pre_activation="none",
    post_activation="swish"`` for the order in the paper's text.

    Args:
        inputs, edge_weights, size, fusion, pool: as for :func:`weighted_fusion`.
        dw_weight: (C, 1, 3, 3), or (9, C) from :func:`pack_depthwise`.
        pw_weight: (C_out, C, 1, 1), or (⌈C_out/16⌉, C, 16) from :func:`pack_pointwise`.
        scale, shift: (C_out,) folded batch norm; a pointwise bias belongs into ``shift``.
        pre_activation, post_activation: as ``activation`` of :func:`weighted_fusion`.

    Returns:
        (N, C_out, H, W) in the inputs' dtype, channels_last.

    Raises:
        ValueError, TypeError: naming the argument, what it must be and what it was.
    """
    inputs = cast(inputs)
    check_maps("inputs", inputs)
    check_list("inputs", inputs, "maps", MAX_EDGES)
    x = inputs[0]
    words: dict[str, Any] = {
        "fusion": fusion,
        "pool": pool,
        "pre_activation": pre_activation,
        "post_activation": post_activation,
    }
    numbers = numbers_of(**words)
    size = check_size("size", x.shape[-2:] if size is None else size)
    for i, y in enumerate(inputs):
        check_resize(f"inputs[{i}]", y.shape[-2:], size)
    n, c = len(inputs), x.shape[1]
    check_edges(edge_weights, [(n,), (n, c)], fusion, x)
    check_weight("dw_weight", dw_weight, dw_shapes(c), x)
    check_out(scale, shift, pw_weight, c, x)
    weights = (edge_weights, dw_weight, pw_weight, scale, shift)
    if runs_reference("fusion_node", [*inputs, *weights]):
        return reference.fusion_node(inputs, *weights, size=size, **words)
    return run(
        "fusion_node",
        list(inputs),
        None if edge_weights is None else edge_weights.float(),
        as_packed_depthwise(dw_weight).float(),
        as_packed_pointwise(pw_weight).float(),
        scale.float(),
        shift.float(),
        size,
        *numbers,
    )


@fake("fusion_node")
def _fake_fusion_node(
    inputs: Sequence[Tensor],
    edge_weights: Tensor | None,
    dw_weight: Tensor,
    pw_weight: Tensor,
    scale: Tensor,
    shift: Tensor,
    size: Sequence[int],
    *_: Any,
) -> Tensor:
    return empty_map(inputs[0], scale.shape[0], *size)


@backward("fusion_node", "fusion_node_backward")
def _fusion_node_backward(ops: Any, args: Sequence[Any], grads: list[Tensor]) -> list[Tensor]:
    return list(ops.fusion_node_backward(grads[0], *args))


@functools.lru_cache(maxsize=64)
def _graph_lists(
    extents: tuple[Size, ...],
    nodes: tuple[tuple[int, ...], ...],
    sizes: tuple[Size, ...],
    outputs: tuple[int, ...],
    name: str,
) -> tuple[list[int], list[int], list[int], list[int]]:
    """Checks a node graph over inputs of ``extents`` (H, W); its edges, counts, sizes, outputs."""
    first = len(extents)
    if len(sizes) != len(nodes):
        raise ValueError(
            f"sizes must hold one (H, W) per node, got {len(sizes)} for {len(nodes)} nodes"
        )
    known = list(extents)
    for i, (edges, size) in enumerate(zip(nodes, sizes, strict=True)):
        check_list(f"{name}[{i}]", edges, "ids", MAX_EDGES)
        if not all(0 <= e < len(known) for e in edges):
            last = len(known) - 1
            raise ValueError(
                f"{name}[{i}] must name inputs or earlier nodes (0 to {last}), got {edges}"
            )
        for e in edges:
            check_resize(f"{name}[{i}], edge {e},", known[e], size)
        known.append(size)
    if len(set(outputs)) != len(outputs):
        raise ValueError(f"outputs must be different nodes, got {outputs}")
    for o in outputs:
        if not first <= o < len(known):
            raise ValueError(f"outputs must be ids of nodes ({first} to {len(known) - 1}), got {o}")
    return (
        [e for edges in nodes for e in edges],
        [len(edges) for edges in nodes],
        [n for size in sizes for n in size],
        list(outputs),
    )


def _split(values: Sequence[int], counts: Sequence[int]) -> list[list[int]]:
    """The edges of each node, of which :func:`_graph_lists` makes one list."""
    ends = accumulate(counts)
    return [list(values[end - count : end]) for end, count in zip(ends, counts, strict=True)]


def _check_ids(name: str, ids: object) -> None:
    if not isinstance(ids, (list, tuple)) or not all(map(is_integer, ids)):
        raise ValueError(f"{name} must be a tuple of ids, got {ids!r:.80}")


def graph_lists(
    inputs: Sequence[Tensor],
    nodes: Sequence[Sequence[int]],
    sizes: Sequence[Size],
    outputs: Sequence[int],
    name: str = "nodes",
) -> tuple[list[int], list[int], list[int], list[int]]:
    """Checks a graph of nodes over ``inputs``; its edges, their counts, sizes and outputs, flat.

    ``name`` is that of the argument ``nodes``. What was checked once is remembered.
    """
    for argument, value in ((name, nodes), ("sizes", sizes), ("outputs", outputs)):
        check_list(argument, value, "nodes" if argument == "outputs" else "tuples")
    for i, edges in enumerate(nodes):
        _check_ids(f"{name}[{i}]", edges)
    _check_ids("outputs", outputs)
    for i, size in enumerate(sizes):
        check_size(f"sizes[{i}]", size)
    extents = tuple((y.shape[-2], y.shape[-1]) for y in inputs)
    # Dynamo warns of caches, which it does not need
    lists = _graph_lists.__wrapped__ if torch.compiler.is_compiling() else _graph_lists
    return lists(extents, tuple(map(tuple, nodes)), tuple(map(tuple, sizes)), tuple(outputs), name)


def bifpn(
    inputs: Sequence[Tensor],
    edge_weights: Tensor | None,
    dw_weight: Tensor,
    pw_weight: Tensor,
    scale: Tensor,
    shift: Tensor,
    *,
    nodes: Sequence[Sequence[int]],
    sizes: Sequence[Size],
    outputs: Sequence[int],
    fusion: str = "fast",
    pool: str = "same",
    pre_activation: str = "swish",
    post_activation: str = "none",
) -> list[Tensor]:
    """All nodes of all BiFPN cells (or of any other feature network) in one call.

    Args:
        inputs: maps (N, C, Hᵢ, Wᵢ), ids 0 … len(inputs)−1.
        edge_weights: (nodes, n) with n the largest number of edges (unused ones are ignored), or
            (nodes, n, C) for one weight per channel; None for ``fusion="sum"``.
        dw_weight: (nodes, 9, C), packed by :func:`pack_depthwise`.
        pw_weight: (nodes, ⌈C/16⌉, C, 16), packed by :func:`pack_pointwise`.
        scale, shift: (nodes, C).
        nodes: for each node the ids it fuses: inputs, or earlier nodes (id len(inputs) + index).
        sizes: for each node its (H, W).
        outputs: ids of the nodes to return.
        fusion, pool, pre_activation, post_activation: as for :func:`fusion_node`.

    Returns:
        One map (N, C, H, W) for each of ``outputs``.

    Raises:
        ValueError, TypeError: naming the argument, what it must be and what it was.
    """
    inputs = cast(inputs)
    check_maps("inputs", inputs)
    x = inputs[0]
    words: dict[str, Any] = {
        "fusion": fusion,
        "pool": pool,
        "pre_activation": pre_activation,
        "post_activation": post_activation,
    }
    numbers = numbers_of(**words)
    graph = graph_lists(inputs, nodes, sizes, outputs)
    c, count, most = x.shape[1], len(nodes), max(graph[1])
    check_edges(edge_weights, [(count, most), (count, most, c)], fusion, x)
    panels = -(-c // PANEL)
    check_weight("dw_weight", dw_weight, [(count, 9, c)], x)
    check_weight("pw_weight", pw_weight, [(count, panels, c, PANEL)], x)
    check_weight("scale", scale, [(count, c)], x)
    check_weight("shift", shift, [(count, c)], x)
    weights = (edge_weights, dw_weight, pw_weight, scale, shift)
    if runs_reference("bifpn", [*inputs, *weights]):
        return reference.bifpn(inputs, *weights, nodes=nodes, sizes=sizes, outputs=outputs, **words)
    return run(
        "bifpn",
        list(inputs),
        None if edge_weights is None else edge_weights.float(),
        dw_weight.float(),
        pw_weight.float(),
        scale.float(),
        shift.float(),
        *graph,
        *numbers,
    )


@fake("bifpn")
def _fake_bifpn(
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
    *_: Any,
) -> list[Tensor]:
    first = len(inputs)
    return [
        empty_map(inputs[0], scale.shape[1], sizes[2 * (o - first)], sizes[2 * (o - first) + 1])
        for o in outputs
    ]


@for_reference("bifpn")
def _bifpn_for_reference(given: dict[str, Any]) -> dict[str, Any]:
    nodes = _split(given.pop("edges"), given.pop("edge_counts"))
    sizes = given.pop("sizes")
    return {**given, "nodes": nodes, "sizes": list(zip(sizes[::2], sizes[1::2], strict=True))}


@backward("bifpn", "fusion_node_backward")
def _bifpn_backward(ops: Any, args: Sequence[Any], grads: list[Tensor]) -> list[Tensor]:
    inputs, edge_weights, dw, pw, scale, shift, edges, counts, sizes, outputs, *numbers = args
    nodes = _split(edges, counts)
    known = list(inputs)

    def arguments(i: int) -> tuple[Any, ...]:
        weights = None if edge_weights is None else edge_weights[i, : counts[i]]
        size = sizes[2 * i : 2 * i + 2]
        maps = [known[e] for e in nodes[i]]
        return (maps, weights, dw[i], pw[i], scale[i], shift[i], size, *numbers)

    for i in range(len(nodes)):
        known.append(ops.fusion_node(*arguments(i)))
    total: list[Tensor | None] = [None] * len(known)
    for o, grad in zip(outputs, grads, strict=True):
        total[o] = grad
    edge_grad = None if edge_weights is None else torch.zeros_like(edge_weights)
    weight_grads = [torch.zeros_like(w) for w in (dw, pw, scale, shift)]
    for i in reversed(range(len(nodes))):
        node_grad = total.pop()
        if node_grad is not None:
            found = ops.fusion_node_backward(node_grad, *arguments(i))
            for e, g in zip(nodes[i], found, strict=False):
                previous = total[e]
                total[e] = g if previous is None else previous + g
            if edge_grad is not None:
                edge_grad[i, : counts[i]] = found[counts[i]]
            for stacked, g in zip(weight_grads, found[counts[i] + 1 :], strict=True):
                stacked[i] = g.view_as(stacked[i])
        known.pop()
    input_grads = [
        torch.zeros_like(x) if g is None else g for x, g in zip(inputs, total, strict=True)
    ]
    none = dw.new_empty(0)
    return [*input_grads, none if edge_grad is None else edge_grad, *weight_grads]
