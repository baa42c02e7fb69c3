"""Fake kernels: the shapes and dtypes of the compiled ops' results, for torch.compile and export."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from . import library


def _map(like: Tensor, channels: int, height: int, width: int) -> Tensor:
    shape = (like.shape[0], channels, height, width)
    return torch.empty(
        shape, dtype=like.dtype, device=like.device, memory_format=torch.channels_last
    )


def _weighted_fusion(inputs, edge_weights, size, fusion, pool, activation):
    return _map(inputs[0], inputs[0].shape[1], *size)


def _fusion_node(
    inputs, edge_weights, dw_weight, pw_weight, scale, shift, size, fusion, pool, pre, post
):
    return _map(inputs[0], scale.shape[0], *size)


def _bifpn(
    inputs: Sequence[Tensor],
    edge_weights,
    dw_weight,
    pw_weight,
    scale,
    shift,
    edges,
    edge_counts,
    sizes,
    outputs,
    fusion,
    pool,
    pre,
    post,
):
    first = len(inputs)
    return [
        _map(inputs[0], scale.shape[1], sizes[2 * (o - first)], sizes[2 * (o - first) + 1])
        for o in outputs
    ]


def _separable_conv(inputs, dw_weight, pw_weight, scale, shift, activation):
    return [_map(x, scale.shape[1], *x.shape[-2:]) for x in inputs]


def _lateral(input, pw_weights, scales, shifts, pooled, pool):
    h, w = input.shape[-2:]
    maps = [_map(input, s.shape[0], h, w) for s in scales]
    if pooled:
        channels = maps.pop().shape[1]
        for _ in range(pooled):
            h, w = (h + 1) // 2, (w + 1) // 2
            maps.append(_map(input, channels, h, w))
    return maps


def _head(inputs, dw_weights, pw_weights, scales, shifts, activation):
    return [_map(x, scales[-1].shape[-1], *x.shape[-2:]) for x in inputs]


def _mbconv(
    input, expand, depthwise, squeeze, project, stride, padding, size, activation, residual
):
    return _map(input, project[1].shape[0], *size)


def _stem(image, weight, scale, shift, mean, std, padding, size, activation, dtype):
    shape = (image.shape[0], scale.shape[0], *size)
    return torch.empty(
        shape, dtype=dtype, device=image.device, memory_format=torch.channels_last
    )


def _nms(boxes, scores, labels, method, iou_threshold, sigma, score_threshold, max_detections):
    batch = boxes.shape[0]
    return (
        boxes.new_empty((batch, max_detections), dtype=torch.int64),
        scores.new_empty((batch, max_detections)),
        boxes.new_empty((batch,), dtype=torch.int64),
    )


def _detect(
    class_outputs,
    box_outputs,
    anchors,
    limits,
    method,
    iou_threshold,
    sigma,
    score_threshold,
    max_detections,
    max_candidates,
):
    shape = (class_outputs[0].shape[0], max_detections)
    return (
        anchors.new_empty((*shape, 4)),
        anchors.new_empty(shape),
        anchors.new_empty(shape, dtype=torch.int64),
        anchors.new_empty(shape[:1], dtype=torch.int64),
    )


_FAKES = {
    "weighted_fusion": _weighted_fusion,
    "fusion_node": _fusion_node,
    "bifpn": _bifpn,
    "separable_conv": _separable_conv,
    "lateral": _lateral,
    "head": _head,
    "mbconv": _mbconv,
    "stem": _stem,
    "nms": _nms,
    "detect": _detect,
}


def register() -> None:
    """Registers the fake kernels when the compiled library, which holds the schemas, is there."""
    if library.load():
        for op, function in _FAKES.items():
            torch.library.register_fake(f"edet_kernels::{op}", function)
