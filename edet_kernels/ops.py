"""The functional API: one function per kernel; arguments are checked, the backend is chosen."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from . import reference
from .autocast import autocast_dtype, cast
from .backend import namespace, runs_reference
from .names import ACTIVATIONS, FUSIONS, MAX_EDGES, NMS_METHODS, POOLS
from .names import Size as Size
from .packing import PANEL, as_packed_depthwise, as_packed_pointwise, pack_stem


def _run(op: str, *args: Any) -> Any:
    """Calls the operator ``op``, on a map or maps first, of the backend that runs it.

    Past autograd, which costs 20 µs, where gradients are off.
    """
    x = args[0] if isinstance(args[0], Tensor) else args[0][0]
    function = getattr(getattr(torch.ops, namespace(op, x)), op)
    if torch.is_grad_enabled() or torch.compiler.is_compiling():
        return function(*args)
    with torch._C._AutoDispatchBelowAutograd():
        return function(*args)


def _number(argument: str, name: str, names: Sequence[str]) -> int:
    try:
        return names.index(name)
    except ValueError:
        raise ValueError(f"{argument} must be one of {', '.join(names)}, got {name!r}") from None


def _shape(x: Tensor) -> str:
    return f"{tuple(x.shape)}"


def _check_list(argument: str, value: object, content: str, most: int | None = None) -> None:
    """Checks that ``value`` is a list or tuple of 1 to ``most`` entries."""
    if not isinstance(value, (list, tuple)):
        got = f"a tensor of shape {_shape(value)}" if isinstance(value, Tensor) else repr(value)
        raise ValueError(f"{argument} must be a non-empty list of {content}, got {got}")
    if not value:
        raise ValueError(f"{argument} must be a non-empty list of {content}, got none")
    if most is not None and len(value) > most:
        raise ValueError(f"{argument} must be at most {most} {content}, got {len(value)}")


def _check_maps(argument: str, inputs: Sequence[Tensor], *, same_channels: bool = True) -> None:
    """Checks that ``inputs`` are float NCHW maps of one dtype, device and batch size."""
    _check_list(argument, inputs, "maps")
    for i, x in enumerate(inputs):
        name = f"{argument}[{i}]"
        if not isinstance(x, Tensor):
            raise TypeError(f"{name} must be a tensor, got {type(x).__name__}")
        if x.dim() != 4 or 0 in x.shape[1:]:
            raise ValueError(f"{name} must be (N, C, H, W) with C, H, W ≥ 1, got {_shape(x)}")
        if x.layout != torch.strided:
            raise ValueError(f"{name} must be a dense (strided) tensor, got layout {x.layout}")
        if not x.is_floating_point():
            raise TypeError(f"{name} must be a float tensor, got {x.dtype}")
        first = inputs[0]
        if x.dtype != first.dtype:
            raise TypeError(f"{name} must be {first.dtype} like {argument}[0], got {x.dtype}")
        if x.device != first.device:
            raise ValueError(f"{name} must be on {first.device} like {argument}[0], got {x.device}")
        if x.shape[0] != first.shape[0]:
            raise ValueError(
                f"{name} must have batch {first.shape[0]} like {argument}[0], got {x.shape[0]}"
            )
        if same_channels and x.shape[1] != first.shape[1]:
            raise ValueError(
                f"{name} must have {first.shape[1]} channels like {argument}[0], got {x.shape[1]}"
            )


def _check_weight(name: str, w: Tensor, shapes: Sequence[tuple[int, ...]], x: Tensor) -> None:
    """Checks a weight's shape (any of ``shapes``), that it is float and that it is with ``x``."""
    if not isinstance(w, Tensor):
        raise TypeError(f"{name} must be a tensor, got {type(w).__name__}")
    if tuple(w.shape) not in shapes:
        wanted = " or ".join(str(s) for s in shapes)
        raise ValueError(f"{name} must be {wanted}, got {_shape(w)}")
    if not w.is_floating_point():
        raise TypeError(f"{name} must be a float tensor, got {w.dtype}")
    if w.device != x.device:
        raise ValueError(f"{name} must be on {x.device} like the maps, got {w.device}")


def _check_edges(
    edge_weights: Tensor | None, shapes: list[tuple[int, ...]], fusion: str, x: Tensor
) -> None:
    if fusion == "sum":
        if edge_weights is not None:
            raise ValueError(f"edge_weights must be None for fusion 'sum', got {edge_weights!r}")
    elif edge_weights is None:
        raise ValueError(f"edge_weights must be given for fusion {fusion!r}, got None")
    else:
        _check_weight("edge_weights", edge_weights, shapes, x)


def _check_size(name: str, size: Sequence[int]) -> Size:
    pair = tuple(size) if isinstance(size, (list, tuple)) else size  # torch.Size is a tuple
    if (
        not isinstance(pair, tuple)
        or len(pair) != 2
        or not all(isinstance(n, (int, torch.SymInt)) and n > 0 for n in pair)
    ):
        raise ValueError(f"{name} must be two positive integers (H, W), got {pair}")
    return size[0], size[1]


def _check_resize(name: str, in_size: Sequence[int], size: Size) -> None:
    h, w = in_size
    if (h < size[0] and w > size[1]) or (h > size[0] and w < size[1]):
        raise ValueError(
            f"{name} must grow or shrink to {size} along both axes, got a map of {(h, w)}"
        )


def _dw_shapes(channels: int) -> list[tuple[int, ...]]:
    return [(channels, 1, 3, 3), (9, channels)]


def _check_out(scale: Tensor, shift: Tensor, pw_weight: Tensor, channels: int, x: Tensor) -> None:
    """Checks a pointwise weight with its folded batch norm, (C_out,) each."""
    if not isinstance(scale, Tensor) or scale.dim() != 1:
        got = _shape(scale) if isinstance(scale, Tensor) else type(scale).__name__
        raise ValueError(f"scale must be (C_out,), got {got}")
    c_out = scale.shape[0]
    _check_weight("scale", scale, [(c_out,)], x)
    _check_weight("shift", shift, [(c_out,)], x)
    panels = -(-c_out // PANEL)
    shapes = [(c_out, channels, 1, 1), (panels, channels, PANEL)]
    _check_weight("pw_weight", pw_weight, shapes, x)


def _check_nms(iou_threshold: float, sigma: float, score_threshold: float, **counts: int) -> None:
    """Checks the numbers of a non-maximum suppression; ``counts`` must be positive integers."""
    numbers = {"iou_threshold": iou_threshold, "sigma": sigma, "score_threshold": score_threshold}
    for name, value in numbers.items():
        if not isinstance(value, (int, float)) or (value != value and name != "sigma"):
            raise ValueError(f"{name} must be a number, got {value!r}")
    if not sigma > 0:
        raise ValueError(f"sigma must be positive, got {sigma}")
    for name, value in counts.items():
        if not isinstance(value, int) or value < 1:
            raise ValueError(f"{name} must be a positive integer, got {value!r}")


def _refuse_gradients(op: str, **arguments: Sequence[Tensor | None]) -> None:
    if torch.is_grad_enabled():
        for name, given in arguments.items():
            if any(t is not None and t.requires_grad for t in given):
                raise ValueError(
                    f"{name} must not require gradients, because {op} has none: call it under "
                    "torch.no_grad() or on detached tensors"
                )


def _check_levels(name: str, t: Tensor, levels: int) -> None:
    """Checks that ``t`` is (C_out,) or one row per level."""
    if not isinstance(t, Tensor) or t.dim() not in (1, 2) or t.shape[:-1] not in ((), (levels,)):
        got = _shape(t) if isinstance(t, Tensor) else type(t).__name__
        raise ValueError(f"{name} must be (C_out,) or ({levels}, C_out), got {got}")


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
    _check_maps("inputs", inputs)
    _check_list("inputs", inputs, "maps", MAX_EDGES)
    x = inputs[0]
    numbers = (
        _number("fusion", fusion, FUSIONS),
        _number("pool", pool, POOLS),
        _number("activation", activation, ACTIVATIONS),
    )
    size = _check_size("size", x.shape[-2:] if size is None else size)
    for i, y in enumerate(inputs):
        _check_resize(f"inputs[{i}]", y.shape[-2:], size)
    n = len(inputs)
    _check_edges(edge_weights, [(n,), (n, x.shape[1])], fusion, x)
    if runs_reference("weighted_fusion", [*inputs, edge_weights]):
        return reference.weighted_fusion(
            inputs, edge_weights, size=size, fusion=fusion, pool=pool, activation=activation
        )
    edges = None if edge_weights is None else edge_weights.float()
    return _run("weighted_fusion", list(inputs), edges, size, *numbers)


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
    _check_maps("inputs", inputs)
    _check_list("inputs", inputs, "maps", MAX_EDGES)
    x = inputs[0]
    numbers = (
        _number("fusion", fusion, FUSIONS),
        _number("pool", pool, POOLS),
        _number("pre_activation", pre_activation, ACTIVATIONS),
        _number("post_activation", post_activation, ACTIVATIONS),
    )
    size = _check_size("size", x.shape[-2:] if size is None else size)
    for i, y in enumerate(inputs):
        _check_resize(f"inputs[{i}]", y.shape[-2:], size)
    n, c = len(inputs), x.shape[1]
    _check_edges(edge_weights, [(n,), (n, c)], fusion, x)
    _check_weight("dw_weight", dw_weight, _dw_shapes(c), x)
    _check_out(scale, shift, pw_weight, c, x)
    weights = (edge_weights, dw_weight, pw_weight, scale, shift)
    if runs_reference("fusion_node", [*inputs, *weights]):
        return reference.fusion_node(
            inputs,
            *weights,
            size=size,
            fusion=fusion,
            pool=pool,
            pre_activation=pre_activation,
            post_activation=post_activation,
        )
    return _run(
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


@functools.lru_cache(maxsize=64)
def _graph_lists(
    extents: tuple[Size, ...],
    nodes: tuple[tuple[int, ...], ...],
    sizes: tuple[Size, ...],
    outputs: tuple[int, ...],
) -> tuple[list[int], list[int], list[int], list[int]]:
    """Checks a node graph over inputs of ``extents`` (H, W); its edges, counts, sizes, outputs."""
    first = len(extents)
    if len(sizes) != len(nodes):
        raise ValueError(
            f"sizes must hold one (H, W) per node, got {len(sizes)} for {len(nodes)} nodes"
        )
    known = list(extents)
    for i, (edges, size) in enumerate(zip(nodes, sizes, strict=True)):
        _check_list(f"nodes[{i}]", edges, "ids", MAX_EDGES)
        if not all(0 <= e < len(known) for e in edges):
            raise ValueError(
                f"nodes[{i}] must name inputs or earlier nodes (0 to {len(known) - 1}), got {edges}"
            )
        for e in edges:
            _check_resize(f"nodes[{i}], edge {e},", known[e], size)
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
    _check_maps("inputs", inputs)
    x = inputs[0]
    numbers = (
        _number("fusion", fusion, FUSIONS),
        _number("pool", pool, POOLS),
        _number("pre_activation", pre_activation, ACTIVATIONS),
        _number("post_activation", post_activation, ACTIVATIONS),
    )
    for name, value in (("nodes", nodes), ("sizes", sizes), ("outputs", outputs)):
        _check_list(name, value, "nodes" if name == "outputs" else "tuples")
    for i, edges in enumerate(nodes):
        if not isinstance(edges, (list, tuple)):
            raise ValueError(f"nodes[{i}] must be a tuple of ids, got {edges!r}")
    for i, size in enumerate(sizes):
        _check_size(f"sizes[{i}]", size)
    c, count = x.shape[1], len(nodes)
    extents = tuple((y.shape[-2], y.shape[-1]) for y in inputs)
    # Dynamo warns of caches, which it does not need
    lists = _graph_lists.__wrapped__ if torch.compiler.is_compiling() else _graph_lists
    graph = lists(extents, tuple(map(tuple, nodes)), tuple(map(tuple, sizes)), tuple(outputs))
    most = max(graph[1])
    _check_edges(edge_weights, [(count, most), (count, most, c)], fusion, x)
    panels = -(-c // PANEL)
    _check_weight("dw_weight", dw_weight, [(count, 9, c)], x)
    _check_weight("pw_weight", pw_weight, [(count, panels, c, PANEL)], x)
    _check_weight("scale", scale, [(count, c)], x)
    _check_weight("shift", shift, [(count, c)], x)
    weights = (edge_weights, dw_weight, pw_weight, scale, shift)
    if runs_reference("bifpn", [*inputs, *weights]):
        return reference.bifpn(
            inputs,
            *weights,
            nodes=nodes,
            sizes=sizes,
            outputs=outputs,
            fusion=fusion,
            pool=pool,
            pre_activation=pre_activation,
            post_activation=post_activation,
        )
    return _run(
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


def separable_conv(
    inputs: Sequence[Tensor],
    dw_weight: Tensor,
    pw_weight: Tensor,
    scale: Tensor,
    shift: Tensor,
    *,
    activation: str = "swish",
) -> list[Tensor]:
    """One layer of a class or box head on all pyramid levels in one call.

    activation(scale[l] · pw(dw(x_l)) + shift[l]): the convolution is shared by the levels, the
    batch norm is each level's own (EfficientDet paper, section 4, and the published code).

    Args:
        inputs: one map (N, C, H_l, W_l) per level.
        dw_weight: (C, 1, 3, 3), or (9, C) from :func:`pack_depthwise`.
        pw_weight: (C_out, C, 1, 1), or (⌈C_out/16⌉, C, 16) from :func:`pack_pointwise`.
        scale, shift: (levels, C_out), or (C_out,) for all levels.
        activation: as for :func:`weighted_fusion`.

    Returns:
        One map (N, C_out, H_l, W_l) per level, channels_last.

    Raises:
        ValueError, TypeError: naming the argument, what it must be and what it was.
    """
    inputs = cast(inputs)
    _check_maps("inputs", inputs)
    x = inputs[0]
    number = _number("activation", activation, ACTIVATIONS)
    c, levels = x.shape[1], len(inputs)
    _check_weight("dw_weight", dw_weight, _dw_shapes(c), x)
    _check_levels("scale", scale, levels)
    _check_levels("shift", shift, levels)
    scales = scale.expand(levels, -1) if scale.dim() == 1 else scale
    shifts = shift.expand(levels, -1) if shift.dim() == 1 else shift
    _check_out(scales[0], shifts[0], pw_weight, c, x)
    if runs_reference("separable_conv", [*inputs, dw_weight, pw_weight, scale, shift]):
        return reference.separable_conv(
            inputs, dw_weight, pw_weight, scale, shift, activation=activation
        )
    return _run(
        "separable_conv",
        list(inputs),
        as_packed_depthwise(dw_weight).float(),
        as_packed_pointwise(pw_weight).float(),
        scales.float().contiguous(),
        shifts.float().contiguous(),
        number,
    )


def lateral(
    input: Tensor,
    pw_weights: Sequence[Tensor],
    scales: Sequence[Tensor],
    shifts: Sequence[Tensor],
    *,
    pooled: int = 0,
    pool: str = "same",
) -> list[Tensor]:
    """All 1×1 + batch-norm projections of one backbone map in one pass over it.

    In the first BiFPN cell every edge from a backbone feature has its own projection; P6, P7 (and
    P8) are max pools of one more projection of the last feature.

    Args:
        input: (N, C_in, H, W).
        pw_weights: for each projection (C_out, C_in, 1, 1), or packed by :func:`pack_pointwise`.
        scales, shifts: for each projection (C_out,).
        pooled: when positive, the last projection is max-pooled this many times by 3×3, stride 2,
            and the pooled maps are returned in its place.
        pool: ``same`` or ``symmetric``, as for :func:`weighted_fusion`.

    Returns:
        One map (N, C_out, H, W) per projection, then the pooled ones (⌈H/2⌉, ⌈W/2⌉), …

    Raises:
        ValueError, TypeError: naming the argument, what it must be and what it was.
    """
    input = cast(input)
    _check_maps("input", [input])
    number = _number("pool", pool, POOLS)
    for name, value in (("pw_weights", pw_weights), ("scales", scales), ("shifts", shifts)):
        _check_list(name, value, "tensors", MAX_EDGES)
    if not len(pw_weights) == len(scales) == len(shifts):
        raise ValueError(
            "pw_weights, scales and shifts must be lists of one length, "
            f"got {len(pw_weights)}, {len(scales)} and {len(shifts)}"
        )
    if not isinstance(pooled, int) or pooled < 0:
        raise ValueError(f"pooled must be an integer ≥ 0, got {pooled!r}")
    for weight, scale, shift in zip(pw_weights, scales, shifts, strict=True):
        _check_out(scale, shift, weight, input.shape[1], input)
    if runs_reference("lateral", [input, *pw_weights, *scales, *shifts]):
        return reference.lateral(input, pw_weights, scales, shifts, pooled=pooled, pool=pool)
    return _run(
        "lateral",
        input,
        [as_packed_pointwise(w).float() for w in pw_weights],
        [s.float() for s in scales],
        [s.float() for s in shifts],
        pooled,
        number,
    )


def head(
    inputs: Sequence[Tensor],
    dw_weights: Sequence[Tensor],
    pw_weights: Sequence[Tensor],
    scales: Sequence[Tensor],
    shifts: Sequence[Tensor],
    *,
    activation: str = "swish",
) -> list[Tensor]:
    """A whole prediction head: every layer on every pyramid level in one call.

    Each layer is a :func:`separable_conv`; ``activation`` follows all of them but the last, the
    prediction (EfficientDet paper, section 4).

    Args:
        inputs: one map (N, C, H_l, W_l) per level.
        dw_weights: for each layer as ``dw_weight`` of :func:`separable_conv`.
        pw_weights: for each layer as ``pw_weight`` of :func:`separable_conv`.
        scales, shifts: for each layer (levels, C_out), or (C_out,) for all levels.
        activation: as for :func:`weighted_fusion`.

    Returns:
        One map (N, C_out of the last layer, H_l, W_l) per level, channels_last.

    Raises:
        ValueError, TypeError: naming the argument, what it must be and what it was.
    """
    inputs = cast(inputs)
    _check_maps("inputs", inputs)
    x = inputs[0]
    number = _number("activation", activation, ACTIVATIONS)
    for name, value in (
        ("dw_weights", dw_weights),
        ("pw_weights", pw_weights),
        ("scales", scales),
        ("shifts", shifts),
    ):
        _check_list(name, value, "tensors")
    layers = len(dw_weights)
    if not layers == len(pw_weights) == len(scales) == len(shifts):
        raise ValueError(
            "dw_weights, pw_weights, scales and shifts must be non-empty lists of one length, got "
            f"{layers}, {len(pw_weights)}, {len(scales)} and {len(shifts)}"
        )
    c, levels = x.shape[1], len(inputs)
    wide_scales, wide_shifts = [], []
    for dw, pw, scale, shift in zip(dw_weights, pw_weights, scales, shifts, strict=True):
        _check_weight("dw_weights", dw, _dw_shapes(c), x)
        _check_levels("scales", scale, levels)
        _check_levels("shifts", shift, levels)
        wide_scales.append(scale.expand(levels, -1) if scale.dim() == 1 else scale)
        wide_shifts.append(shift.expand(levels, -1) if shift.dim() == 1 else shift)
        _check_out(wide_scales[-1][0], wide_shifts[-1][0], pw, c, x)
        c = scale.shape[-1]
    if runs_reference("head", [*inputs, *dw_weights, *pw_weights, *scales, *shifts]):
        return reference.head(inputs, dw_weights, pw_weights, scales, shifts, activation=activation)
    return _run(
        "head",
        list(inputs),
        [as_packed_depthwise(w).float() for w in dw_weights],
        [as_packed_pointwise(w).float() for w in pw_weights],
        [s.float().contiguous() for s in wide_scales],
        [s.float().contiguous() for s in wide_shifts],
        number,
    )


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
    _check_maps("inputs", inputs)
    x = inputs[0]
    numbers = (
        _number("fusion", fusion, FUSIONS),
        _number("pool", pool, POOLS),
        _number("activation", activation, ACTIVATIONS),
    )
    _check_list("edge_counts", edge_counts, "numbers")
    _check_list("sizes", sizes, "tuples")
    if sum(edge_counts) != len(inputs) or len(sizes) != len(edge_counts):
        raise ValueError(
            "edge_counts and sizes must describe every node and input, got "
            f"{list(edge_counts)} and {len(sizes)} sizes for {len(inputs)} inputs"
        )
    n, c, first = len(inputs), x.shape[1], 0
    for i, (count, size) in enumerate(zip(edge_counts, sizes, strict=True)):
        _check_size(f"sizes[{i}]", size)
        _check_list(f"inputs of node {i}", inputs[first : first + count], "maps", MAX_EDGES)
        for e in range(first, first + count):
            _check_resize(f"inputs[{e}]", inputs[e].shape[-2:], (size[0], size[1]))
        first += count
    if edge_weights is not None and len(sizes) > 1:
        raise ValueError("edge_weights must be None for more than one node")
    _check_edges(edge_weights, [(n,), (n, c)], fusion, x)
    if (scales is None) != (offsets is None):
        raise ValueError("scales and offsets must be given together")
    for name, t in (("scales", scales), ("offsets", offsets)):
        if t is not None:
            _check_weight(name, t, [(n, c)], x)
    _check_weight("dw_weight", dw_weight, _dw_shapes(c), x)
    _check_out(shift, shift, pw_weight, c, x)
    tensors = (scales, offsets, edge_weights, dw_weight, pw_weight, shift)
    if runs_reference("training_node", [*inputs, *tensors]):
        return reference.training_node(
            inputs,
            *tensors,
            edge_counts=edge_counts,
            sizes=sizes,
            fusion=fusion,
            pool=pool,
            activation=activation,
            statistics=statistics,
        )
    *maps, mean, deviations = _run(
        "training_node",
        list(inputs),
        None if scales is None else scales.float(),
        None if offsets is None else offsets.float(),
        None if edge_weights is None else edge_weights.float(),
        as_packed_depthwise(dw_weight).float(),
        as_packed_pointwise(pw_weight).float(),
        shift.float(),
        list(edge_counts),
        [n for size in sizes for n in size],
        *numbers,
        statistics,
    )
    return maps, mean, deviations


def _conv_geometry(x: Tensor, kernel: int, stride: int, padding: str) -> tuple[list[int], Size]:
    """Leading padding (top, left) and output size of a convolution."""
    axes = [reference.conv_geometry(n, kernel, stride, padding) for n in x.shape[-2:]]
    return [before for before, _ in axes], (axes[0][1], axes[1][1])


def _check_parts(name: str, parts: Sequence[Tensor], content: str) -> None:
    count = content.count(",") + 1
    if len(parts) != count:
        raise ValueError(f"{name} must be ({content}), got {len(parts)} tensors")


def mbconv(
    input: Tensor,
    expand: Sequence[Tensor] | None,
    depthwise: Sequence[Tensor],
    squeeze: Sequence[Tensor] | None,
    project: Sequence[Tensor],
    *,
    stride: int = 1,
    padding: str = "same",
    activation: str = "swish",
    residual: bool = False,
) -> Tensor:
    """An inverted residual block of EfficientNet (Tan and Le 2019) with folded batch norms.

    expand 1×1 → activation → depthwise k×k → activation → squeeze-excite → project 1×1 (+ input).

    Args:
        input: (N, C_in, H, W).
        expand: (pw_weight, scale, shift) with C_mid outputs, or None when C_mid is C_in.
        depthwise: (dw_weight, scale, shift); dw_weight (C_mid, 1, k, k) or packed, k 3 or 5.
        squeeze: (reduce_weight, reduce_bias, excite_weight, excite_bias) of squeeze-excite, the
            weights (R, C_mid, 1, 1) and (C_mid, R, 1, 1) or packed; None for none.
        project: (pw_weight, scale, shift) with C_out outputs.
        stride: 1 or 2, of the depthwise convolution.
        padding: ``same`` (TensorFlow's) or ``symmetric`` (k//2).
        activation: as for :func:`weighted_fusion`.
        residual: add ``input``; needs stride 1 and C_out = C_in.

    Returns:
        (N, C_out, ⌈H/stride⌉, ⌈W/stride⌉), channels_last.

    Raises:
        ValueError, TypeError: naming the argument, what it must be and what it was.
    """
    input = cast(input)
    _check_maps("input", [input])
    number = _number("activation", activation, ACTIVATIONS)
    _number("padding", padding, POOLS)
    if stride not in (1, 2):
        raise ValueError(f"stride must be 1 or 2, got {stride!r}")
    _check_parts("depthwise", depthwise, "dw_weight, scale, shift")
    _check_parts("project", project, "pw_weight, scale, shift")
    c_in, c_mid = input.shape[1], depthwise[1].shape[0]
    if expand is not None:
        _check_parts("expand", expand, "pw_weight, scale, shift")
        _check_out(expand[1], expand[2], expand[0], c_in, input)
    dw = depthwise[0]
    kernel = dw.shape[-1] if dw.dim() == 4 else {9: 3, 25: 5}.get(dw.shape[0], 0)
    if kernel not in (3, 5):
        raise ValueError(f"dw_weight must be a 3×3 or 5×5 depthwise weight, got {_shape(dw)}")
    expected = c_in if expand is None else expand[1].shape[0]
    shapes = [(expected, 1, kernel, kernel), (kernel * kernel, expected)]
    _check_weight("dw_weight", dw, shapes, input)
    for name, t in (("scale", depthwise[1]), ("shift", depthwise[2])):
        _check_weight(f"depthwise {name}", t, [(c_mid,)], input)
    if squeeze is not None:
        content = "reduce_weight, reduce_bias, excite_weight, excite_bias"
        _check_parts("squeeze", squeeze, content)
        _check_out(squeeze[1], squeeze[1], squeeze[0], c_mid, input)
        _check_out(squeeze[3], squeeze[3], squeeze[2], squeeze[1].shape[0], input)
    _check_out(project[1], project[2], project[0], c_mid, input)
    pads, size = _conv_geometry(input, kernel, stride, padding)
    if residual and (stride != 1 or project[1].shape[0] != c_in):
        raise ValueError(
            f"residual must be False unless stride is 1 and C_out is C_in ({c_in}), "
            f"got stride {stride} and C_out {project[1].shape[0]}"
        )
    tensors = [input, *(expand or ()), *depthwise, *(squeeze or ()), *project]
    if runs_reference("mbconv", tensors):
        return reference.mbconv(
            input,
            expand,
            depthwise,
            squeeze,
            project,
            stride=stride,
            padding=padding,
            activation=activation,
            residual=residual,
        )

    def packed(parts: Sequence[Tensor] | None) -> list[Tensor]:
        tensors = [as_packed_pointwise(t) if t.dim() == 4 else t for t in parts or ()]
        return [t.float() for t in tensors]

    return _run(
        "mbconv",
        input,
        packed(expand),
        [as_packed_depthwise(dw).float(), depthwise[1].float(), depthwise[2].float()],
        packed(squeeze),
        packed(project),
        stride,
        pads,
        size,
        number,
        residual,
    )


def stem(
    image: Tensor,
    weight: Tensor,
    scale: Tensor,
    shift: Tensor,
    *,
    mean: Tensor | None = None,
    std: Tensor | None = None,
    padding: str = "same",
    activation: str = "swish",
    dtype: torch.dtype | None = None,
) -> Tensor:
    """The first layer: normalise, 3×3 stride-2 convolution, folded batch norm, activation.

    Args:
        image: (N, 3, H, W), uint8 or float, of any strides.
        weight: (C_out, 3, 3, 3), or packed by :func:`pack_stem`.
        scale, shift: (C_out,) folded batch norm.
        mean, std: (3,), in the image's own range; pixels become (x − mean)/std before the zero
            padding. None: the image is already normalised.
        padding: ``same`` (TensorFlow's) or ``symmetric`` (1).
        activation: as for :func:`weighted_fusion`.
        dtype: of the result; the image's own dtype when None, float32 for uint8.

    Returns:
        (N, C_out, ⌈H/2⌉, ⌈W/2⌉), channels_last.

    Raises:
        ValueError, TypeError: naming the argument, what it must be and what it was.
    """
    if not isinstance(image, Tensor) or image.dim() != 4 or image.shape[1] != 3:
        got = _shape(image) if isinstance(image, Tensor) else type(image).__name__
        raise ValueError(f"image must be (N, 3, H, W), got {got}")
    if 0 in image.shape[2:]:
        raise ValueError(f"image must have at least one pixel, got {_shape(image)}")
    if image.dtype != torch.uint8 and not image.is_floating_point():
        raise TypeError(f"image must be uint8 or float, got {image.dtype}")
    low = autocast_dtype(image)
    if low is not None:
        image, dtype = cast(image), low
    dtype = dtype or (image.dtype if image.is_floating_point() else torch.float32)
    if image.is_floating_point() and image.dtype != dtype:
        raise TypeError(f"dtype must be the image's ({image.dtype}), got {dtype}")
    number = _number("activation", activation, ACTIVATIONS)
    _number("padding", padding, POOLS)
    if not isinstance(scale, Tensor) or scale.dim() != 1:
        got = _shape(scale) if isinstance(scale, Tensor) else type(scale).__name__
        raise ValueError(f"scale must be (C_out,), got {got}")
    c_out = scale.shape[0]
    _check_weight("scale", scale, [(c_out,)], image)
    _check_weight("shift", shift, [(c_out,)], image)
    _check_weight("weight", weight, [(c_out, 3, 3, 3), (-(-c_out // PANEL), 27, PANEL)], image)
    if (mean is None) != (std is None):
        raise ValueError("mean and std must be given together")
    for name, t in (("mean", mean), ("std", std)):
        if t is not None:
            _check_weight(name, t, [(3,)], image)
    pads, size = _conv_geometry(image, 3, 2, padding)
    like = image if image.is_floating_point() else scale.to(dtype)
    if runs_reference("stem", [like, image, weight, scale, shift, mean, std]):
        return reference.stem(
            image,
            weight,
            scale,
            shift,
            mean=mean,
            std=std,
            padding=padding,
            activation=activation,
            dtype=dtype,
        )
    return _run(
        "stem",
        image,
        (pack_stem(weight) if weight.dim() == 4 else weight).float(),
        scale.float(),
        shift.float(),
        None if mean is None else mean.float(),
        None if std is None else std.float(),
        pads,
        size,
        number,
        dtype,
    )


def nms(
    boxes: Tensor,
    scores: Tensor,
    labels: Tensor,
    *,
    method: str = "hard",
    iou_threshold: float = 0.5,
    sigma: float = 0.5,
    score_threshold: float = 0.0,
    max_detections: int = 100,
) -> tuple[Tensor, Tensor, Tensor]:
    """Per-class non-maximum suppression of a whole batch.

    Repeatedly takes the best remaining box (the first one of equals). ``hard`` drops the boxes of
    its label whose IoU with it is above ``iou_threshold``; ``gaussian`` multiplies their scores by
    exp(−IoU²/sigma) instead (soft-NMS, Bodla et al. 2017, equation 3).

    Args:
        boxes: (B, N, 4) float32 or float64, x1, y1, x2, y2 (or y1, x1, y2, x2), in any unit.
        scores: (B, N) of the boxes' dtype. Boxes with a score ≤ ``score_threshold`` (or NaN) are
            never returned.
        labels: (B, N) int64. Boxes of different labels do not suppress each other.
        method: ``hard`` or ``gaussian``.
        max_detections: K, the most boxes returned for an image.

    Returns:
        indices (B, K) int64 padded with −1, scores (B, K) padded with 0 (decayed for
        ``gaussian``), counts (B,) int64, in the order the boxes were taken.

    Raises:
        ValueError, TypeError: naming the argument, what it must be and what it was.
    """
    number = _number("method", method, NMS_METHODS)
    for name, t in (("boxes", boxes), ("scores", scores), ("labels", labels)):
        if not isinstance(t, Tensor):
            raise TypeError(f"{name} must be a tensor, got {type(t).__name__}")
    if boxes.dim() != 3 or boxes.shape[-1] != 4:
        raise ValueError(f"boxes must be (B, N, 4), got {_shape(boxes)}")
    if boxes.dtype not in (torch.float32, torch.float64):
        raise TypeError(f"boxes must be float32 or float64, got {boxes.dtype}")
    for name, t, dtype in (("scores", scores, boxes.dtype), ("labels", labels, torch.int64)):
        if t.shape != boxes.shape[:2]:
            raise ValueError(f"{name} must be {tuple(boxes.shape[:2])}, got {_shape(t)}")
        if t.dtype != dtype:
            raise TypeError(f"{name} must be {dtype}, got {t.dtype}")
        if t.device != boxes.device:
            raise ValueError(f"{name} must be on {boxes.device} like boxes, got {t.device}")
    _check_nms(iou_threshold, sigma, score_threshold, max_detections=max_detections)
    _refuse_gradients("nms", boxes=[boxes], scores=[scores])
    if runs_reference("nms", [boxes, scores]):
        return reference.nms(
            boxes,
            scores,
            labels,
            method=method,
            iou_threshold=iou_threshold,
            sigma=sigma,
            score_threshold=score_threshold,
            max_detections=max_detections,
        )
    return _run(
        "nms", boxes, scores, labels, number, iou_threshold, sigma, score_threshold, max_detections
    )


def detect(
    class_outputs: Sequence[Tensor],
    box_outputs: Sequence[Tensor],
    anchors: Tensor,
    *,
    limits: Tensor | None = None,
    method: str = "hard",
    iou_threshold: float = 0.5,
    sigma: float = 0.5,
    score_threshold: float = 0.0,
    max_detections: int = 100,
    max_candidates: int = 5000,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The published post-processing of a batch: top candidates → decode → clip → suppress.

    The ``max_candidates`` largest logits over anchors × classes (the first of equal ones; NaN never
    counts) get a sigmoid and a box, centre = t·size + centre and size = exp(t)·size of the anchor,
    in float32, and go through :func:`nms`.

    Args:
        class_outputs: logits (B, A·classes, H, W) for each level.
        box_outputs: regressions ty, tx, th, tw (B, A·4, H, W) for each level.
        anchors: (N, 4) float32 y1, x1, y2, x2, in the order level, y, x, anchor of the cell.
        limits: (B, 2) float32, the largest x and y that boxes are clipped to; None: not clipped.
        method, iou_threshold, sigma, score_threshold, max_detections: as for :func:`nms`.
        max_candidates: that enter suppression.

    Returns:
        boxes (B, K, 4) float32 x1, y1, x2, y2 padded with 0, scores (B, K) padded with 0, labels
        (B, K) int64 from 0, padded with −1, counts (B,) int64.

    Raises:
        ValueError, TypeError: naming the argument, what it must be and what it was.
    """
    number = _number("method", method, NMS_METHODS)
    _check_maps("class_outputs", class_outputs)
    _check_maps("box_outputs", box_outputs)
    regressions = box_outputs[0].shape[1]
    cell_anchors = regressions // 4
    if regressions % 4 or class_outputs[0].shape[1] % cell_anchors:
        raise ValueError(
            "class_outputs and box_outputs must have A·classes and A·4 channels, got "
            f"{class_outputs[0].shape[1]} and {regressions}"
        )
    sizes = [tuple(x.shape[-2:]) for x in class_outputs]
    if sizes != [tuple(x.shape[-2:]) for x in box_outputs] or (
        class_outputs[0].shape[0] != box_outputs[0].shape[0]
        or class_outputs[0].dtype != box_outputs[0].dtype
    ):
        raise ValueError(
            "box_outputs must have the levels, batch and dtype of class_outputs, got "
            f"{[_shape(x) for x in box_outputs]} for {[_shape(x) for x in class_outputs]}"
        )
    x = class_outputs[0]
    count = sum(h * w for h, w in sizes) * cell_anchors
    _check_weight("anchors", anchors, [(count, 4)], x)
    if limits is not None:
        _check_weight("limits", limits, [(x.shape[0], 2)], x)
    _check_nms(
        iou_threshold,
        sigma,
        score_threshold,
        max_detections=max_detections,
        max_candidates=max_candidates,
    )
    _refuse_gradients(
        "detect", class_outputs=class_outputs, box_outputs=box_outputs, anchors=[anchors, limits]
    )
    if runs_reference("detect", [*class_outputs, *box_outputs, anchors, limits]):
        return reference.detect(
            class_outputs,
            box_outputs,
            anchors,
            limits=limits,
            method=method,
            iou_threshold=iou_threshold,
            sigma=sigma,
            score_threshold=score_threshold,
            max_detections=max_detections,
            max_candidates=max_candidates,
        )
    return _run(
        "detect",
        list(class_outputs),
        list(box_outputs),
        anchors.float(),
        None if limits is None else limits.float(),
        number,
        iou_threshold,
        sigma,
        score_threshold,
        max_detections,
        max_candidates,
    )
