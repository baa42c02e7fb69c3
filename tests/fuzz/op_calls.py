"""Calls of ops to fuzz: a good call, of which the input then spoils a part or two.

Every op is called by the runner's backend of choice, forward and, where it has one, backward.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor

import edet_kernels
from edet_kernels import int8
from edet_kernels.names import ACTIVATIONS, FUSIONS, INT8_OPS, NMS_METHODS, OPS, POOLS
from edet_kernels.testing import samples

T = TypeVar("T")

_SIZES = (0, 1, 2, 3, 5, 8, 16, 17)
_DTYPES = (torch.float32, torch.float64, torch.float16, torch.bfloat16)
_DTYPES += (torch.int64, torch.uint8, torch.int8, torch.bool)
_ODD = (None, -1, 0, 1, 1.5, float("nan"), float("inf"), 2**31, 2**63, "", "hard", True, [], (1,))


class Source:
    """Decisions taken from the bytes of an input, one each, so that the fuzzer can steer them."""

    def __init__(self, data: bytes) -> None:
        self._bytes = iter(data)

    def below(self, count: int) -> int:
        """A number from 0 to ``count`` − 1."""
        return next(self._bytes, 0) % count

    def choice(self, values: Sequence[T]) -> T:
        """One of the values."""
        return values[self.below(len(values))]

    def chance(self, part: float) -> bool:
        """True in about ``part`` of the cases, and not where the bytes have come to an end."""
        return next(self._bytes, 0) > 255 * (1 - part)


def _tensor(source: Source) -> Tensor:
    """A tensor of any shape and dtype."""
    shape = tuple(source.choice(_SIZES) for _ in range(source.below(6)))
    dtype = source.choice(_DTYPES) if source.chance(0.3) else torch.float32
    if source.chance(0.02):
        return torch.empty(shape, dtype=dtype, device="meta")
    values = 4 * torch.rand(shape, generator=torch.Generator().manual_seed(source.below(99)))
    return (values - 1).to(dtype)


def _spoilt_tensor(source: Source, x: Tensor) -> Tensor:
    """``x`` with another dtype, shape, layout, device or content."""
    axis = source.below(max(x.dim(), 1))
    kind = source.below(8)
    if kind == 0:
        return x.to(source.choice(_DTYPES))
    if kind == 1:
        return x.to("meta")
    if x.dim() == 0 or kind == 2:
        return x[None]
    if kind == 3:
        return x.select(axis, 0) if x.shape[axis] else x
    if kind == 4:
        return x.narrow(axis, 0, source.below(x.shape[axis] + 1))
    if kind == 5:
        return torch.cat([x, x], axis)
    if kind == 6:
        return x.transpose(axis, source.below(x.dim()))
    if not x.is_floating_point() or not x.numel():
        return x.flip(axis)
    x = x.clone(memory_format=torch.contiguous_format)
    x.view(-1)[source.below(x.numel())] = source.choice((float("nan"), float("inf"), -1e30))
    return x


def _spoilt(source: Source, value: Any) -> Any:
    """Something else in the place of ``value``."""
    if source.chance(0.2):
        return source.choice(_ODD)
    if source.chance(0.1):
        return _tensor(source)
    if isinstance(value, Tensor):
        return _spoilt_tensor(source, value)
    if isinstance(value, list | tuple) and value:
        i = source.below(len(value))
        kept = (*value[:i], *value[i + source.below(2) :], *value[:1])
        return type(value)(kept)
    if isinstance(value, int | float):
        return value + source.choice((-1, 1, -3, 100, 2**31, 0.5))
    return source.choice(_ODD)


def _places(tree: Any, place: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """The way to every part of lists, tuples and dicts."""
    if isinstance(tree, dict):
        items = list(tree.items())
    elif isinstance(tree, list | tuple):
        items = list(enumerate(tree))
    else:
        items = []
    return [(*place, k) for k, _ in items] + [
        way for k, v in items for way in _places(v, (*place, k))
    ]


def _changed(tree: Any, place: tuple[Any, ...], change: Callable[[Any], Any]) -> Any:
    """``tree`` with ``change`` applied at ``place``."""
    if not place:
        return change(tree)
    items = dict(tree.items()) if isinstance(tree, dict) else dict(enumerate(tree))
    items[place[0]] = _changed(items[place[0]], place[1:], change)
    return items if isinstance(tree, dict) else type(tree)(items.values())


def _sides(source: Source) -> tuple[int, int]:
    return source.choice(_SIZES[1:]), source.choice(_SIZES[1:])


def _sample(op: str, source: Source) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """The arguments of a good call of a float op."""
    made: dict[str, Any] = {}
    channels = source.choice((1, 3, 8, 17))
    if op in ("weighted_fusion", "fusion_node", "training_node"):
        fusion = source.choice(FUSIONS)
        made = {"fusion": fusion, "pool": source.choice(POOLS)}
        if op != "training_node" and source.chance(0.5):
            made["per_channel"] = fusion != "sum"
        if source.chance(0.5):
            made["sizes"] = [_sides(source) for _ in range(1 + source.below(3))]
    elif op in ("separable_conv", "head"):
        made = {"activation": source.choice(ACTIVATIONS)}
        made["sizes"] = [_sides(source) for _ in range(1 + source.below(3))]
    elif op == "bifpn":
        made = {"fusion": source.choice(FUSIONS), "pool": source.choice(POOLS)}
    elif op == "lateral":
        made = {"pooled": source.below(4), "pool": source.choice(POOLS), "size": _sides(source)}
    elif op in ("stem", "mbconv", "training_depthwise"):
        made = {"activation": source.choice(ACTIVATIONS), "padding": source.choice(POOLS)}
        made["size"] = _sides(source)
        if op == "stem":
            made |= {"uint8": source.chance(0.5), "normalise": source.chance(0.5)}
        else:
            made |= {"expansion": 1 + source.below(2), "kernel": source.choice((3, 5))}
            made["stride"] = 1 + source.below(2)
    elif op == "training_project":
        made = {"squeeze": source.chance(0.5), "size": _sides(source)}
    elif op == "nms":
        made = {"count": channels, "method": source.choice(NMS_METHODS)}
        made["class_agnostic"] = source.chance(0.5)
    elif op == "detect":
        made = {"classes": channels, "limits": source.chance(0.5)}
    sized = {} if op in ("nms", "detect") else {"channels": channels}
    if op == "stem":
        sized = {"out_channels": channels}
    dtype = source.choice(samples.DTYPES) if source.chance(0.3) else torch.float32
    call = samples.sample(op, dtype, source.below(3), **sized, **made)
    return (call.maps, *call.weights), dict(call.options)


def _bytes(*shape: int) -> Tensor:
    return torch.randint(0, 256, shape, dtype=torch.uint8)


def _rows(*shape: int) -> Tensor:
    return torch.randn(shape) / 100


def _pointwise(c_out: int, c_in: int) -> Tensor:
    weight = torch.randint(-127, 128, (c_out, c_in, 1, 1)).to(torch.int8)
    return edet_kernels.pack_pointwise_int8(weight)


def _depthwise(c: int, kernel: int = 3) -> Tensor:
    weight = torch.randint(-127, 128, (c, 1, kernel, kernel)).to(torch.int8)
    return edet_kernels.pack_depthwise_int8(weight)


def _int8_block(source: Source, c: int) -> tuple[tuple[Any, ...], dict[str, Any]]:
    middle, kernel, r = 2 * c, source.choice((3, 5)), 1 + c // 4
    expand = (_pointwise(middle, c), _rows(4, middle))
    if source.chance(0.5):
        expand, middle = None, c
    project: tuple[Tensor, Tensor] = (_pointwise(c, middle), _rows(2, c))
    squeeze = None
    if source.chance(0.5):
        weights = [torch.randint(-99, 99, s).to(torch.int16) for s in ((r, middle), (middle, r))]
        squeeze = (weights[0], _rows(2, r), weights[1], _rows(2, middle), _rows(middle))
        project = (edet_kernels.pack_pointwise(torch.randn(c, middle, 1, 1)), _rows(2, c))
    depthwise = (_depthwise(middle, kernel), _rows(4, middle), _bytes(middle))
    stride = 1 + source.below(2)
    options = {"stride": stride, "residual": 0.5 if stride == 1 else 0.0}
    options["activation"] = source.choice(ACTIVATIONS)
    return (
        _bytes(source.below(3), c, *_sides(source)),
        expand,
        depthwise,
        squeeze,
        project,
    ), options


def _int8_nodes(source: Source, c: int) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Two fused nodes on two maps, and a head on both."""
    batch, c_out = source.below(3), source.choice((1, 5, 17))
    maps = [_bytes(batch, c, 6, 5), _bytes(batch, c, 3, 3)]
    layers = [(2, 5, 2, c, 4), (2, 1, 1, c, 4), (2, 1, 1, c_out, 2)]
    parts: list[list[Tensor]] = [
        [_rows(nodes, rows, c) for nodes, rows, *_ in layers],
        [torch.stack([_depthwise(c)] * shared) for _, _, shared, *_ in layers],
        [_rows(nodes, 2, c) for nodes, *_ in layers],
        [torch.stack([_pointwise(out, c)] * shared) for _, _, shared, out, _ in layers],
        [_rows(nodes, rows, out) for nodes, *_, out, rows in layers],
    ]
    options = {
        "layers": [0, 0, 1, 1, 2, 2],
        "edges": [(0, 1), (1, 2), (2,), (3,), (4,), (5,)],
        "sizes": [(6, 5), (3, 3)] * 3,
        "outputs": [6, 7],
        "pool": source.choice(POOLS),
        "pre_activation": source.choice(ACTIVATIONS),
        "post_activation": source.choice(ACTIVATIONS),
    }
    return (maps, *parts), options


def _int8(op: str, source: Source) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """The arguments of a good call of an op on bytes."""
    c, batch = source.choice((1, 3, 8, 17)), source.below(3)
    if op == "quantize":
        return (torch.randn(batch, c, *_sides(source)), 20.0, 7), {}
    if op == "dequantize":
        return (_bytes(batch, c, *_sides(source)), 0.1, 7), {}
    if op == "lateral":
        weights = [_pointwise(n, c) for n in (c, 5)]
        options = {"pooled": source.below(4), "pool": source.choice(POOLS)}
        return (_bytes(batch, c, *_sides(source)), weights, [_rows(2, n) for n in (c, 5)]), options
    if op == "stem":
        image = _bytes(batch, 3, *_sides(source))
        weight = edet_kernels.pack_stem(torch.randn(c, 3, 3, 3))
        options = {"padding": source.choice(POOLS), "inverse": 20.0, "zero": 7}
        if source.chance(0.5):
            options |= {"mean": torch.full((3,), 124.0), "std": torch.full((3,), 58.0)}
        return (image, weight, torch.randn(c), torch.randn(c)), options
    return (_int8_block if op == "mbconv" else _int8_nodes)(source, c)


def _require(tree: Any) -> Any:
    return samples.map_tree(
        lambda t: t.detach().requires_grad_() if t.is_floating_point() else t, tree
    )


def run(op: str, data: bytes) -> None:
    """An op with odd arguments: a result, or a ValueError or TypeError that says what it must be.

    Args:
        op: a name of :mod:`edet_kernels`, or ``int8_…`` of one of :mod:`edet_kernels.int8`.
        data: of which the decisions are made.
    """
    source = Source(data)
    torch.manual_seed(source.below(4))
    backend = "reference" if source.chance(0.25) else "auto"
    backward = source.chance(0.25)
    short = op.removeprefix("int8_")
    function = getattr(int8 if op != short else edet_kernels, short)
    arguments, options = (_int8 if op != short else _sample)(short, source)
    defaults = inspect.signature(function).parameters.values()
    options = {p.name: p.default for p in defaults if p.kind is p.KEYWORD_ONLY} | options
    tree = {"arguments": arguments, "options": options}
    for _ in range(source.below(4)):
        place = source.choice([p for p in _places(tree) if len(p) > 1])
        tree = _changed(tree, place, lambda value: _spoilt(source, value))
    if backward and op == short:
        tree = _require(tree)
    with edet_kernels.backend(backend):
        try:
            found = function(*tree["arguments"], **tree["options"])
        except (ValueError, TypeError) as error:
            assert " must " in str(error), f"says not what was to be given: {error!r}"
            return
        results = [x for x in samples.tensors(found) if x.requires_grad and x.device.type != "meta"]
        if results:
            sum(x.double().sum() for x in results).backward()


#: All that is fuzzed.
CALLED = (*OPS, *INT8_OPS)
