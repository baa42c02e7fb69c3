"""What the ops on maps of bytes check of their arguments before any memory is touched."""

from __future__ import annotations

import functools
from collections.abc import Sequence

import torch
from torch import Tensor

from ..names import Size
from ..packing import PANEL
from .checks import (
    check_integer,
    check_like,
    check_list,
    check_map,
    check_parts,
    check_weight,
    columns_of,
    length_of,
    shape_of,
)
from .fusion import graph_lists


def pointwise_shape(c_out: int, c_in: int) -> tuple[int, int, int, int]:
    """The shape of a weight of ``pack_pointwise_int8``."""
    return -(-c_out // PANEL), -(-c_in // 4), PANEL, 4


def check_mbconv(
    input: Tensor,
    expand: Sequence[Tensor] | None,
    depthwise: Sequence[Tensor],
    squeeze: Sequence[Tensor] | None,
    project: Sequence[Tensor],
) -> int:
    """Checks the parts of a block; the side of its depthwise kernel."""
    check_parts("depthwise", depthwise, "weight, rows, pad")
    check_parts("project", project, "weight, rows")
    weight, rows, pad = depthwise
    c_in, c_mid = input.shape[1], length_of("pad", pad, "C_mid")
    c_out, kernel = columns_of("project rows", project[1], 2), len(weight) if weight.dim() else 0
    if kernel not in (3, 5):
        raise ValueError(f"the depthwise weight must be packed 3×3 or 5×5, got {shape_of(weight)}")
    wide = 4 if kernel == 3 else 8
    floats, whole, words = torch.float32, torch.int8, torch.int16
    wanted: list[tuple[str, Tensor, tuple[int, ...], torch.dtype]] = [
        ("depthwise weight", weight, (kernel, c_mid, wide), whole),
        ("depthwise rows", rows, (4, c_mid), floats),
        ("pad", pad, (c_in if expand is None else c_mid,), torch.uint8),
        ("project rows", project[1], (2, c_out), floats),
    ]
    if expand is not None:
        check_parts("expand", expand, "weight, rows")
        wanted += [
            ("expand weight", expand[0], pointwise_shape(c_mid, c_in), whole),
            ("expand rows", expand[1], (4, c_mid), floats),
        ]
    if squeeze is None:
        wanted.append(("project weight", project[0], pointwise_shape(c_out, c_mid), whole))
    else:
        check_parts("squeeze", squeeze, "reduce, reduce_rows, excite, excite_rows, zeros")
        reduced = columns_of("reduce rows", squeeze[1], 2)
        wanted += [
            ("project weight", project[0], (-(-c_out // PANEL), c_mid, PANEL), floats),
            ("reduce weight", squeeze[0], (reduced, c_mid), words),
            ("reduce rows", squeeze[1], (2, reduced), floats),
            ("excite weight", squeeze[2], (c_mid, reduced), words),
            ("excite rows", squeeze[3], (2, c_mid), floats),
            ("zeros", squeeze[4], (c_mid,), floats),
        ]
    for name, t, shape, dtype in wanted:
        check_weight(name, t, [shape], input, dtype)
    return kernel


#: Of a layer of nodes: nodes, rows of ``fuse_rows``, C, C_out, rows of ``out_rows``.
_Layer = tuple[int, int, int, int, int]


def check_layer(
    i: int, fuse: Tensor, dw: Tensor, mid: Tensor, pw: Tensor, out: Tensor, x: Tensor
) -> _Layer:
    """Checks layer ``i``; its numbers."""
    name = f"[{i}]"
    for word, t, dims in (("fuse_rows", fuse, 3), ("out_rows", out, 3), ("dw_weights", dw, 4)):
        if not isinstance(t, Tensor) or t.dim() != dims or 0 in t.shape:
            raise ValueError(
                f"{word}{name} must be a tensor of {dims} dimensions, got {shape_of(t)}"
            )
    rows, kinds, c = fuse.shape
    c_out, weights = out.shape[2], dw.shape[0]
    if kinds != 1 and kinds < 4:
        raise ValueError(f"fuse_rows{name} must have 1 or n + 3 rows, got {kinds}")
    if out.shape[1] not in (2, 4):
        raise ValueError(f"out_rows{name} must have 2 or 4 rows, got {out.shape[1]}")
    if weights not in (1, rows):
        raise ValueError(f"dw_weights{name} must have 1 or {rows} rows, got {weights}")
    check_weight(f"fuse_rows{name}", fuse, [(rows, kinds, c)], x, torch.float32)
    check_weight(f"dw_weights{name}", dw, [(weights, 3, c, 4)], x, torch.int8)
    check_weight(f"mid_rows{name}", mid, [(rows, 2, c)], x, torch.float32)
    shape = (weights, *pointwise_shape(c_out, c))
    check_weight(f"pw_weights{name}", pw, [shape], x, torch.int8)
    check_weight(f"out_rows{name}", out, [(rows, out.shape[1], c_out)], x, torch.float32)
    return rows, kinds, c, c_out, out.shape[1]


@functools.lru_cache(maxsize=64)
def _check_nodes(
    channels: int,
    extents: tuple[Size, ...],
    kinds: tuple[_Layer, ...],
    layers: tuple[int, ...],
    edges: tuple[tuple[int, ...], ...],
    sizes: tuple[Size, ...],
    outputs: tuple[int, ...],
) -> None:
    """Checks that each node of a checked graph can read its maps, and has a row of its layer."""
    known = [(channels, *size, False) for size in extents]
    used = [0] * len(kinds)
    for i, (layer, ids, size) in enumerate(zip(layers, edges, sizes, strict=True)):
        nodes, rows, c, c_out, out_rows = kinds[layer]
        used[layer] += 1
        if used[layer] > nodes:
            raise ValueError(f"layers must name layer {layer} at most {nodes} times, got more")
        if len(ids) != max(rows - 3, 1):
            raise ValueError(f"edges[{i}] must be {max(rows - 3, 1)} ids, got {len(ids)}")
        for e in ids:
            if known[e][0] != c or known[e][3]:
                raise ValueError(f"edges[{i}] must name maps of {c} channels of bytes, got {e}")
            if rows == 1 and known[e][1:3] != size:
                raise ValueError(f"sizes[{i}] must be that of map {e}, which is not fused")
        floats = out_rows == 2
        known.append((c_out, *size, floats))
        if floats and i + len(extents) not in outputs:
            raise ValueError(f"outputs must name every map of floats, {i + len(extents)} too")


def check_inputs(inputs: Sequence[Tensor]) -> None:
    """Checks maps of bytes with the same channels."""
    check_list("inputs", inputs, "maps")
    for i, x in enumerate(inputs):
        check_map(f"inputs[{i}]", x, torch.uint8)
        check_like("inputs", i, x, inputs[0], same_channels=True)


def check_graph(
    inputs: Sequence[Tensor],
    kinds: Sequence[_Layer],
    layers: Sequence[int],
    edges: Sequence[Sequence[int]],
    sizes: Sequence[Size],
    outputs: Sequence[int],
) -> tuple[list[int], list[int], list[int], list[int]]:
    """:func:`graph_lists` of nodes, of which each can read its maps and has a row of its layer."""
    graph = graph_lists(inputs, edges, sizes, outputs, "edges")
    check_list("layers", layers, "numbers")
    for i, layer in enumerate(layers):
        check_integer(f"layers[{i}]", layer, 0, len(kinds) - 1)
    if len(layers) != len(edges):
        raise ValueError("layers, edges and sizes must name the same nodes")
    # Dynamo warns of caches, which it does not need
    check = _check_nodes.__wrapped__ if torch.compiler.is_compiling() else _check_nodes
    check(
        inputs[0].shape[1],
        tuple((x.shape[2], x.shape[3]) for x in inputs),
        tuple(kinds),
        tuple(layers),
        tuple(map(tuple, edges)),
        tuple((size[0], size[1]) for size in sizes),
        tuple(outputs),
    )
    return graph
