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


def _stem(args: Sequence[Any], result: Any, kernels: Sequence[str]) -> list[Work]:
    return [Work(_size(args[0], args[1], result))]


def _mbconv(args: Sequence[Any], result: Any, kernels: Sequence[str]) -> list[Work]:
    """Expand with the depthwise convolution, or one after the other; gates; the projection."""
    image, expand, depthwise, squeeze, project = args[:5]
    n, c_out, h, w = result.shape
    middle, element = depthwise[0].shape[-1], image.element_size()
    pixels = n * image.shape[2] * image.shape[3]
    middle_bytes = n * h * w * middle * element
    residual = _size(image) if args[9] else 0
    operations = 2 * pixels * image.shape[1] * middle if expand else 0
    groups = sum("convolve_depthwise" in name for name in kernels)
    # groups of images, each expanded and then convolved
    if groups and kernels[0].startswith("multiply"):
        own, expanded = _size(image) // groups, pixels * middle * element // groups
        first = [
            Work(own + _size(*expand) + expanded, operations // groups),
            Work(expanded + _size(*depthwise, *squeeze[:1]) + middle_bytes // groups),
        ] * groups
    else:
        read = _size(image, *expand, *depthwise, *squeeze[:1])
        first = [Work(read + middle_bytes, operations)]
    return [
        *first,
        *([Work(_size(*squeeze[1:]) + 4 * n * middle)] if squeeze else []),
        Work(middle_bytes + _size(result, *project) + residual, 2 * n * h * w * middle * c_out),
    ]


def _lateral(args: Sequence[Any], result: Any, kernels: Sequence[str]) -> list[Work]:
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


def _node(read: int, pixels: int, c: int, c_out: int, element: int, two: bool) -> list[Work]:
    """One launch, or two: up to the depthwise convolution, and the product."""
    other, operations = _separable(c, c_out, pixels, element)
    if not two:
        return [Work(read + other, operations)]
    between = pixels * c * element
    return [Work(read + between + 4 * 9 * c), Work(between + other - 4 * 9 * c, operations)]


def _bifpn(args: Sequence[Any], result: Any, kernels: Sequence[str]) -> list[Work]:
    """One launch for each node, or two."""
    maps, sizes, edges, counts = args[0], args[8], args[6], args[7]
    n, c, element = maps[0].shape[0], maps[0].shape[1], maps[0].element_size()
    known = [_size(m) for m in maps]
    works: list[Work] = []
    at = 0
    for i, count in enumerate(counts):
        pixels = n * sizes[2 * i] * sizes[2 * i + 1]
        read = sum(known[e] for e in edges[at : at + count])
        works += _node(read, pixels, c, c, element, _is_two(kernels, len(works)))
        known.append(pixels * c * element)
        at += count
    return works


def _is_two(kernels: Sequence[str], at: int) -> bool:
    return at < len(kernels) and "depthwise" in kernels[at]


def _head(args: Sequence[Any], result: Any, kernels: Sequence[str]) -> list[Work]:
    """One launch for each layer on all levels, or two."""
    maps, scales = args[0], args[3]
    element = maps[0].element_size()
    pixels = sum(m.shape[0] * m.shape[2] * m.shape[3] for m in maps)
    works: list[Work] = []
    c = maps[0].shape[1]
    for scale in scales:
        read, c_out = pixels * c * element, scale.shape[-1]
        works += _node(read, pixels, c, c_out, element, _is_two(kernels, len(works)))
        c = c_out
    return works


def _single(args: Sequence[Any], result: Any, kernels: Sequence[str]) -> list[Work]:
    """A node, or a separable convolution on all levels."""
    maps = args[0]
    outs = result if isinstance(result, (list, tuple)) else [result]
    c, c_out, element = maps[0].shape[1], outs[0].shape[1], maps[0].element_size()
    pixels = sum(out.shape[0] * out.shape[2] * out.shape[3] for out in outs)
    return _node(_size(*maps), pixels, c, c_out, element, _is_two(kernels, 0))


def _detect(args: Sequence[Any], result: Any, kernels: Sequence[str]) -> list[Work]:
    """Two passes over the logits, of which the last lists keys; then the candidates alone."""
    logits, candidates = _size(*args[0]), result[0].shape[0] * args[9]
    return [Work(logits), Work(logits), *[Work(candidates * (8 + 4 + 32))] * (len(kernels) - 2)]


_OPS: dict[str, Callable[[Sequence[Any], Any, Sequence[str]], list[Work]]] = {
    "stem": _stem,
    "mbconv": _mbconv,
    "lateral": _lateral,
    "bifpn": _bifpn,
    "head": _head,
    "fusion_node": _single,
    "separable_conv": _single,
    "detect": _detect,
}

#: The kernel that makes 16-bit weights of packed ones: which is no work that must be done.
PACKS = "narrow<"


def works_of(op: str, args: Sequence[Any], result: Any, kernels: Sequence[str]) -> list[Work]:
    """What each launch of a call must do, when it is launched node by node.

    Args:
        op: of ``torch.ops.edet_kernels``.
        args: its arguments, as its schema has them.
        result: what it returned.
        kernels: that it launched.
    """
    others = [name for name in kernels if not name.startswith(PACKS)]
    works = iter(_OPS[op](args, result, others))
    return [Work() if name.startswith(PACKS) else next(works) for name in kernels]


def total(works: Sequence[Work]) -> Work:
    """All of it."""
    return Work(sum(w.bytes for w in works), sum(w.operations for w in works))
