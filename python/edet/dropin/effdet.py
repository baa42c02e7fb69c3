"""Recognises effdet's feature networks and heads."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import cast

from torch import nn

from ..fused.cells import Node, graph_of
from ..fused.describe import (
    Edge,
    FusionNodes,
    HeadLayers,
    Mismatch,
    NodeLayers,
)
from .attributes import activation, attributes

#: Names of fusion methods in other code.
_FUSIONS = {"fastattn": "fast", "attn": "softmax", "sum": "sum"}


def _projection(layers: nn.Module, name: str) -> tuple[nn.Conv2d | None, nn.Module | None]:
    """The 1×1 convolution and batch norm of a ResampleFeatureMap, whose resizing is checked."""
    conv = bn = None
    for key, layer in layers.named_children():
        if key == "conv":
            conv, bn, act = attributes(layer, "conv", "bn", "act")
            if act is not None:
                raise Mismatch(f"{name}: an activation after the projection")
        elif key == "upsample":
            if getattr(layer, "mode", None) != "nearest":
                raise Mismatch(f"{name}: {getattr(layer, 'mode', type(layer).__name__)} upsampling")
        elif not isinstance(layer, nn.MaxPool2d):
            raise Mismatch(f"{name}: downsampling by {type(layer).__name__}")
    return conv, bn


def _pools(modules: Sequence[nn.Module]) -> str:
    """The padding of all max pools below ``modules``; ``same`` when there are none."""
    found = set()
    for pool in (m for top in modules for m in top.modules() if isinstance(m, nn.MaxPool2d)):
        kernel, stride, padding = (
            (v, v) if isinstance(v, int) else tuple(v)
            for v in (pool.kernel_size, pool.stride, pool.padding)
        )
        if pool.ceil_mode or any(k != s + 1 for k, s in zip(kernel, stride, strict=True)):
            raise Mismatch(f"a max pool of kernel {kernel} and stride {stride}")
        if "Same" in type(pool).__name__:
            found.add("same")
        elif padding == tuple(s - 1 for s in stride):
            found.add("symmetric")
        else:
            raise Mismatch(f"a max pool of stride {stride} padded by {padding}")
    if len(found) > 1:
        raise Mismatch("max pools are padded in different ways")
    return found.pop() if found else "same"


def _nodes_of(cells: Sequence[nn.Module]) -> Iterator[tuple[str, nn.Module]]:
    """Name and module of every node of all cells."""
    for c, cell in enumerate(cells):
        for n, fnode in enumerate(cast(nn.ModuleList, cell.fnode)):
            yield f"cell.{c}.fnode.{n}", fnode


def _cell_nodes(cell: nn.Module, levels: int) -> list[Node]:
    """The nodes of a cell in its own ids; of a node's edges the first is from its own level."""
    nodes: list[Node] = []
    level_of = list(range(levels))
    for _, fnode in _nodes_of([cell]):
        [combine] = attributes(fnode, "combine")
        [offsets] = attributes(combine, "inputs_offsets")
        level_of.append(level_of[offsets[0]])
        nodes.append(Node(level_of[-1], tuple(offsets)))
    if level_of[-levels:] != list(range(levels)):
        raise Mismatch("the last nodes of a cell are not one for each level, from the lowest up")
    return nodes


def fpn(module: nn.Module) -> FusionNodes | None:
    if not (hasattr(module, "cell") and hasattr(module, "resample")):
        return None
    cells = list(cast(nn.Module, module.cell).children())
    if not cells or not all(hasattr(cell, "fnode") for cell in cells):
        return None
    levels = cast(int, attributes(module, "num_levels")[0])
    resample = cast(nn.ModuleDict, module.resample)
    inputs = levels - len(resample)
    above = [
        Edge(inputs - 1 + i, *_projection(layer, f"resample.{key}"))
        for i, (key, layer) in enumerate(resample.items())
    ]
    graph = graph_of([_cell_nodes(cell, levels) for cell in cells], levels)
    nodes: list[NodeLayers] = []
    activations = set()
    for (name, fnode), (level, sources) in zip(_nodes_of(cells), graph.nodes, strict=True):
        combine, after = attributes(fnode, "combine", "after_combine")
        method, offsets = attributes(combine, "weight_method", "inputs_offsets")
        if method not in _FUSIONS:
            raise Mismatch(f"{name}: fusion method {method!r}")
        edges = [
            Edge(source, *_projection(combine.resample[str(o)], name))
            for source, o in zip(sources, offsets, strict=True)
        ]
        if not hasattr(after, "conv") or not hasattr(after.conv, "conv_dw"):
            raise Mismatch(f"{name}: its convolution is not separable")
        dw, pw, bn, act = attributes(after.conv, "conv_dw", "conv_pw", "bn", "act")
        activations.add((activation(getattr(after, "act", None)), activation(act)))
        weights = combine.edge_weights
        nodes.append(NodeLayers(level, edges, dw, pw, bn, weights, _FUSIONS[method]))
    if len(activations) > 1:
        raise Mismatch("nodes have different activations")
    ((pre, post),) = activations
    pool = _pools([resample, *cells])
    return FusionNodes(inputs, nodes, graph.outputs, above, pool, pre, post)


def head(module: nn.Module) -> HeadLayers | None:
    if not all(hasattr(module, name) for name in ("conv_rep", "bn_rep", "predict")):
        return None
    level_first, act, reps, norms, predict = attributes(
        module, "bn_level_first", "act", "conv_rep", "bn_rep", "predict"
    )
    convs = []
    for name, conv in [*reps.named_children(), ("predict", predict)]:
        if not hasattr(conv, "conv_dw"):
            raise Mismatch(f"conv_rep.{name}: its convolution is not separable")
        if getattr(conv, "bn", None) is not None or getattr(conv, "act", None) is not None:
            raise Mismatch(f"conv_rep.{name}: a batch norm or activation of its own")
        convs.append((conv.conv_dw, conv.conv_pw))
    table = [[getattr(bn, "bn", bn) for bn in row] for row in norms]
    if level_first:
        table = [list(layer) for layer in zip(*table, strict=True)]
    return HeadLayers(convs[:-1], table, convs[-1], activation(act))
