"""What each launch of an op must at least do: bytes of maps and weights once, operations."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor


@dataclass(frozen=True)
class Work:
    """Bytes that must move, and floating-point operations of the products on tensor cores."""

    bytes: int = 0
    operations: int = 0


def _size(*tensors: Tensor) -> int:
    return sum(t.numel() * t.element_size() for t in tensors)


def _stem(args: Sequence[Any], result: Any) -> list[Work]:
    return [Work(_size(args[0], args[1], result))]


def _mbconv(args: Sequence[Any], result: Any) -> list[Work]:
    """Expand with the depthwise convolution, which writes the middle; gates; the projection."""
    image, expand, depthwise, squeeze, project = args[:5]
    n, c_out, h, w = result.shape
    middle = depthwise[0].shape[-1]
    pixels = n * image.shape[2] * image.shape[3]
    middle_bytes = n * h * w * middle * image.element_size()
    residual = _size(image) if args[9] else 0
    return [
        Work(_size(image, *expand, *depthwise, *squeeze[:1]) + middle_bytes,
             2 * pixels * image.shape[1] * middle if expand else 0),
        *([Work(_size(*squeeze[1:]) + 4 * n * middle)] if squeeze else []),
        Work(middle_bytes + _size(result, *project) + residual, 2 * n * h * w * middle * c_out),
    ]  # fmt: skip


def _lateral(args: Sequence[Any], result: Any) -> list[Work]:
    """All projections, then one pooling after the other."""
    image, weights, scales, _, pooled = args[:5]
    n, c_in, h, w = image.shape
    outs = [scale.numel() for scale in scales]
    out_bytes = sum(n * c * h * w * image.element_size() for c in outs)
    works = [Work(_size(image, *weights) + out_bytes, 2 * n * h * w * c_in * sum(outs))]
    before = n * outs[-1] * h * w * image.element_size()
    for map_ in result[len(result) - pooled :]:
        works.append(Work(before + _size(map_)))
        before = _size(map_)
    return works


def _separable(c: int, c_out: int, pixels: int, element: int) -> tuple[int, int]:
    """Bytes of weights and output, and operations, of a separable convolution."""
    return 4 * (9 * c + c * c_out) + pixels * c_out * element, 2 * pixels * c * c_out


def _bifpn(args: Sequence[Any], result: Any, launches: int) -> list[Work]:
    """One launch for each node, or two: up to the depthwise convolution, and the projection."""
    maps, sizes, edges, counts = args[0], args[8], args[6], args[7]
    n, c, element = maps[0].shape[0], maps[0].shape[1], maps[0].element_size()
    known = [_size(m) for m in maps]
    works, at = [], 0
    for i, count in enumerate(counts):
        pixels = n * sizes[2 * i] * sizes[2 * i + 1]
        own = pixels * c * element
        other, operations = _separable(c, c, pixels, element)
        read = sum(known[e] for e in edges[at : at + count])
        if launches == 2 * len(counts):
            works.append(Work(read + own + 4 * 9 * c))
            works.append(Work(2 * own + 4 * c * c, operations))
        else:
            works.append(Work(read + other, operations))
        known.append(own)
        at += count
    return works


def _head(args: Sequence[Any], result: Any) -> list[Work]:
    """One launch for each layer on all levels."""
    maps, scales = args[0], args[3]
    element = maps[0].element_size()
    pixels = sum(m.shape[0] * m.shape[2] * m.shape[3] for m in maps)
    works, c = [], maps[0].shape[1]
    for scale in scales:
        other, operations = _separable(c, scale.shape[-1], pixels, element)
        works.append(Work(pixels * c * element + other, operations))
        c = scale.shape[-1]
    return works


def _one_launch(args: Sequence[Any], result: Any) -> list[Work]:
    """A node, or a separable convolution on all levels."""
    maps = args[0]
    outs = result if isinstance(result, (list, tuple)) else [result]
    c, c_out, element = maps[0].shape[1], outs[0].shape[1], maps[0].element_size()
    pixels = sum(out.shape[0] * out.shape[2] * out.shape[3] for out in outs)
    other, operations = _separable(c, c_out, pixels, element)
    return [Work(_size(*maps) + other, operations)]


def _detect(args: Sequence[Any], result: Any, launches: int) -> list[Work]:
    """Passes over the logits, of which the last collects; then the candidates alone."""
    logits, candidates = _size(*args[0]), result[0].shape[0] * args[9]
    return [Work(logits)] * (launches - 2) + [
        Work(candidates * (8 + 4 + 32)),
        Work(candidates * 28),
    ]


_OPS: dict[str, Callable[[Sequence[Any], Any], list[Work]]] = {
    "stem": _stem,
    "mbconv": _mbconv,
    "lateral": _lateral,
    "head": _head,
    "fusion_node": _one_launch,
    "separable_conv": _one_launch,
}


def works_of(op: str, args: Sequence[Any], result: Any, launches: int) -> list[Work]:
    """What each launch of a call must do, when it is launched node by node.

    Args:
        op: of ``torch.ops.edet_kernels``.
        args: its arguments, as its schema has them.
        result: what it returned.
        launches: of kernels.
    """
    if op == "bifpn":
        return _bifpn(args, result, launches)
    if op == "detect":
        return _detect(args, result, launches)
    return _OPS[op](args, result)


def total(works: Sequence[Work]) -> Work:
    """All of it."""
    return Work(sum(w.bytes for w in works), sum(w.operations for w in works))
