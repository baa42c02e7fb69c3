"""Fake kernels: shapes and dtypes of the compiled ops' results, for torch.compile and export."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor


def _map(like: Tensor, channels: int, height: int, width: int) -> Tensor:
    shape = (like.shape[0], channels, height, width)
    return torch.empty(
        shape, dtype=like.dtype, device=like.device, memory_format=torch.channels_last
    )


def _weighted_fusion(
    inputs: Sequence[Tensor],
    edge_weights: Tensor | None,
    size: Sequence[int],
    fusion: int,
    pool: int,
    activation: int,
) -> Tensor:
    return _map(inputs[0], inputs[0].shape[1], *size)


def _fusion_node(
    inputs: Sequence[Tensor],
    edge_weights: Tensor | None,
    dw_weight: Tensor,
    pw_weight: Tensor,
    scale: Tensor,
    shift: Tensor,
    size: Sequence[int],
    fusion: int,
    pool: int,
    pre: int,
    post: int,
) -> Tensor:
    return _map(inputs[0], scale.shape[0], *size)


def _bifpn(
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
    pre: int,
    post: int,
) -> list[Tensor]:
    first = len(inputs)
    return [
        _map(inputs[0], scale.shape[1], sizes[2 * (o - first)], sizes[2 * (o - first) + 1])
        for o in outputs
    ]


def _separable_conv(
    inputs: Sequence[Tensor],
    dw_weight: Tensor,
    pw_weight: Tensor,
    scale: Tensor,
    shift: Tensor,
    activation: int,
) -> list[Tensor]:
    return [_map(x, scale.shape[1], *x.shape[-2:]) for x in inputs]


def _lateral(
    input: Tensor,
    pw_weights: Sequence[Tensor],
    scales: Sequence[Tensor],
    shifts: Sequence[Tensor],
    pooled: int,
    pool: int,
) -> list[Tensor]:
    h, w = input.shape[-2:]
    maps = [_map(input, s.shape[0], h, w) for s in scales]
    if pooled:
        channels = maps.pop().shape[1]
        for _ in range(pooled):
            h, w = (h + 1) // 2, (w + 1) // 2
            maps.append(_map(input, channels, h, w))
    return maps


def _head(
    inputs: Sequence[Tensor],
    dw_weights: Sequence[Tensor],
    pw_weights: Sequence[Tensor],
    scales: Sequence[Tensor],
    shifts: Sequence[Tensor],
    activation: int,
) -> list[Tensor]:
    return [_map(x, scales[-1].shape[-1], *x.shape[-2:]) for x in inputs]


def _mbconv(
    input: Tensor,
    expand: Sequence[Tensor],
    depthwise: Sequence[Tensor],
    squeeze: Sequence[Tensor],
    project: Sequence[Tensor],
    stride: int,
    padding: Sequence[int],
    size: Sequence[int],
    activation: int,
    residual: bool,
) -> Tensor:
    return _map(input, project[1].shape[0], *size)


def _stem(
    image: Tensor,
    weight: Tensor,
    scale: Tensor,
    shift: Tensor,
    mean: Tensor | None,
    std: Tensor | None,
    padding: Sequence[int],
    size: Sequence[int],
    activation: int,
    dtype: torch.dtype,
) -> Tensor:
    shape = (image.shape[0], scale.shape[0], *size)
    return torch.empty(shape, dtype=dtype, device=image.device, memory_format=torch.channels_last)


def _training_node(
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
    channels = shift.shape[0]
    maps = [_map(inputs[0], channels, h, w) for h, w in zip(sizes[::2], sizes[1::2], strict=True)]
    rows = len(edge_counts) if statistics else 0
    return [*maps, *(shift.new_empty((rows, channels)) for _ in range(2))]


def _gradients(grad: Tensor | Sequence[Tensor], *arguments: Any) -> list[Tensor]:
    """A map like each map, a float32 tensor like each weight and an empty one for None.

    The arguments are those of the forward, numbers among them; lists of tensors count one by one.
    """
    flat = [t for a in arguments for t in (a if isinstance(a, (list, tuple)) else [a])]
    found = []
    for t in flat:
        if t is None:
            like = grad if isinstance(grad, Tensor) else grad[0]
            found.append(like.new_empty(0, dtype=torch.float32))
        elif isinstance(t, Tensor):
            found.append(
                _map(t, *t.shape[1:]) if t.dim() == 4 else t.new_empty(t.shape, dtype=torch.float32)
            )
    return found


def _training_node_backward(
    grads: Sequence[Tensor],
    grad_mean: Tensor,
    grad_m2: Tensor,
    outputs: Sequence[Tensor],
    mean: Tensor | None,
    *arguments: Any,
) -> list[Tensor]:
    return _gradients(grads, *arguments)


def _nms(
    boxes: Tensor,
    scores: Tensor,
    labels: Tensor,
    method: int,
    iou_threshold: float,
    sigma: float,
    score_threshold: float,
    max_detections: int,
) -> tuple[Tensor, Tensor, Tensor]:
    batch = boxes.shape[0]
    return (
        boxes.new_empty((batch, max_detections), dtype=torch.int64),
        scores.new_empty((batch, max_detections)),
        boxes.new_empty((batch,), dtype=torch.int64),
    )


def _detect(
    class_outputs: Sequence[Tensor],
    box_outputs: Sequence[Tensor],
    anchors: Tensor,
    limits: Tensor | None,
    method: int,
    iou_threshold: float,
    sigma: float,
    score_threshold: float,
    max_detections: int,
    max_candidates: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    shape = (class_outputs[0].shape[0], max_detections)
    return (
        anchors.new_empty((*shape, 4)),
        anchors.new_empty(shape),
        anchors.new_empty(shape, dtype=torch.int64),
        anchors.new_empty(shape[:1], dtype=torch.int64),
    )


#: For each op its fake kernel, of the signature in its schema.
FAKES: dict[str, Callable[..., Any]] = {
    "weighted_fusion": _weighted_fusion,
    "fusion_node": _fusion_node,
    "bifpn": _bifpn,
    "separable_conv": _separable_conv,
    "lateral": _lateral,
    "head": _head,
    "mbconv": _mbconv,
    "stem": _stem,
    "training_node": _training_node,
    "weighted_fusion_backward": _gradients,
    "fusion_node_backward": _gradients,
    "separable_conv_backward": _gradients,
    "lateral_backward": _gradients,
    "training_node_backward": _training_node_backward,
    "nms": _nms,
    "detect": _detect,
}


def register(namespace: str = "edet_kernels") -> None:
    """Registers the fake kernels of the operators that ``torch.ops`` has under ``namespace``."""
    for op, function in FAKES.items():
        if torch._C._dispatch_has_kernel(f"{namespace}::{op}"):
            torch.library.register_fake(f"{namespace}::{op}", function)
