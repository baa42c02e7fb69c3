"""The definition of every op in plain PyTorch: readable, differentiable, any float dtype.

A kernel is right when it agrees with the function of the same name here. Arguments are assumed to
have been checked by :mod:`edet_kernels.ops`; weights may be convolution weights or packed ones.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext

import torch
from torch import Tensor
from torch.nn import functional as F

from .packing import unpack_depthwise, unpack_pointwise, unpack_stem

#: ε of fast normalised fusion (paper section 3.3).
FAST_EPSILON = 1e-4


def activate(x: Tensor, activation: str) -> Tensor:
    """Applies ``activation``: none, swish (x·σ(x)), relu, relu6 or hard_swish (x·relu6(x+3)/6)."""
    if activation == "swish":
        return F.silu(x)
    if activation == "relu":
        return F.relu(x)
    if activation == "relu6":
        return F.relu6(x)
    if activation == "hard_swish":
        return F.hardswish(x)
    return x


def fusion_coefficients(edge_weights: Tensor | None, count: int, fusion: str) -> Tensor | None:
    """The factors aᵢ of Σ aᵢ·xᵢ, shaped like ``edge_weights``, (n,) or (n, C); None for a sum.

    Paper section 3.3: ``fast`` is relu(w) / (Σ relu(w) + 1e-4), ``softmax`` is softmax(w),
    ``unbounded`` is w itself. Each is taken over the first dimension, the edges.
    """
    if fusion == "sum" or edge_weights is None:
        return None
    weights = edge_weights[:count]
    if fusion == "fast":
        weights = F.relu(weights)
        return weights / (weights.sum(0) + FAST_EPSILON)
    if fusion == "softmax":
        return weights.softmax(0)
    return weights


def nearest_indices(size: int, in_size: int, device: torch.device) -> Tensor:
    """Source index of each of ``size`` outputs: floor(i·in/out), TensorFlow 1's nearest rule."""
    return torch.arange(size, device=device) * in_size // size


def pool_geometry(in_size: int, size: int, pool: str) -> tuple[int, int, int]:
    """Kernel, stride and leading padding that max-pool ``in_size`` down to ``size`` (one axis)."""
    stride = (in_size - 1) // size + 1
    kernel = stride + 1
    if pool == "symmetric":
        return kernel, stride, stride - 1
    return kernel, stride, max((size - 1) * stride + kernel - in_size, 0) // 2


def resize(x: Tensor, size: tuple[int, int], pool: str = "same") -> Tensor:
    """Resizes (N, C, h, w) to ``size``: nearest to grow, −inf padded max pool to shrink.

    Raises:
        ValueError: one side would grow and the other shrink.
    """
    h, w = x.shape[-2:]
    if (h, w) == tuple(size):
        return x
    if (2 * h, 2 * w) == tuple(size):  # the same pixels, without a gather
        return F.interpolate(x, tuple(size), mode="nearest")
    if h <= size[0] and w <= size[1]:
        rows = nearest_indices(size[0], h, x.device)
        columns = nearest_indices(size[1], w, x.device)
        return x[:, :, rows][:, :, :, columns]
    if h < size[0] or w < size[1]:
        raise ValueError(
            f"inputs must be resized in one direction, got {(h, w)} to be resized to {tuple(size)}"
        )
    padding = []
    geometry = [pool_geometry(n, out, pool) for n, out in zip((w, h), size[::-1], strict=True)]
    for (kernel, stride, before), n, out in zip(geometry, (w, h), size[::-1], strict=True):
        padding += [before, (out - 1) * stride + kernel - n - before]
    padded = F.pad(x, padding, value=float("-inf"))
    return F.max_pool2d(
        padded, (geometry[1][0], geometry[0][0]), stride=(geometry[1][1], geometry[0][1])
    )


def weighted_fusion(
    inputs: Sequence[Tensor],
    edge_weights: Tensor | None = None,
    *,
    size: tuple[int, int] | None = None,
    fusion: str = "fast",
    pool: str = "same",
    activation: str = "none",
) -> Tensor:
    """activation(Σ aᵢ·resize(xᵢ)), paper section 3.3; see :func:`edet_kernels.weighted_fusion`."""
    size = tuple(inputs[0].shape[-2:]) if size is None else size  # type: ignore[assignment]
    coefficients = fusion_coefficients(edge_weights, len(inputs), fusion)
    total: Tensor | None = None
    for i, x in enumerate(inputs):
        term = resize(x, size, pool)  # type: ignore[arg-type]
        if coefficients is not None:
            term = term * coefficients[i].to(x.dtype).view(1, -1, 1, 1)
        total = term if total is None else total + term
    assert total is not None
    fused = activate(total, activation)
    return fused.clone() if fused is inputs[0] else fused


def depthwise(x: Tensor, weight: Tensor) -> Tensor:
    """Depthwise k×k convolution, stride 1, zero padded to the same size."""
    weight = weight if weight.dim() == 4 else unpack_depthwise(weight)
    weight = weight.to(x.dtype)
    return F.conv2d(x, weight, padding=weight.shape[-1] // 2, groups=x.shape[1])


def _affine(x: Tensor, scale: Tensor, shift: Tensor) -> Tensor:
    return x * scale.to(x.dtype).view(1, -1, 1, 1) + shift.to(x.dtype).view(1, -1, 1, 1)


def pointwise(x: Tensor, weight: Tensor, scale: Tensor, shift: Tensor) -> Tensor:
    """1×1 convolution followed by the folded batch norm: scale·(W·x) + shift."""
    weight = weight if weight.dim() == 4 else unpack_pointwise(weight, scale.numel())
    return _affine(F.conv2d(x, weight.to(x.dtype)), scale, shift)


def fusion_node(
    inputs: Sequence[Tensor],
    edge_weights: Tensor | None,
    dw_weight: Tensor,
    pw_weight: Tensor,
    scale: Tensor,
    shift: Tensor,
    *,
    size: tuple[int, int] | None = None,
    fusion: str = "fast",
    pool: str = "same",
    pre_activation: str = "swish",
    post_activation: str = "none",
) -> Tensor:
    """One BiFPN node; see :func:`edet_kernels.fusion_node`."""
    x = weighted_fusion(
        inputs, edge_weights, size=size, fusion=fusion, pool=pool, activation=pre_activation
    )
    return activate(pointwise(depthwise(x, dw_weight), pw_weight, scale, shift), post_activation)


def bifpn(
    inputs: Sequence[Tensor],
    edge_weights: Tensor | None,
    dw_weight: Tensor,
    pw_weight: Tensor,
    scale: Tensor,
    shift: Tensor,
    *,
    nodes: Sequence[Sequence[int]],
    sizes: Sequence[tuple[int, int]],
    outputs: Sequence[int],
    fusion: str = "fast",
    pool: str = "same",
    pre_activation: str = "swish",
    post_activation: str = "none",
) -> list[Tensor]:
    """All nodes of all BiFPN cells; see :func:`edet_kernels.bifpn`."""
    maps = list(inputs)
    for i, (edges, size) in enumerate(zip(nodes, sizes, strict=True)):
        maps.append(
            fusion_node(
                [maps[e] for e in edges],
                None if edge_weights is None else edge_weights[i],
                dw_weight[i],
                pw_weight[i],
                scale[i],
                shift[i],
                size=size,
                fusion=fusion,
                pool=pool,
                pre_activation=pre_activation,
                post_activation=post_activation,
            )
        )
    return [maps[o] for o in outputs]


def separable_conv(
    inputs: Sequence[Tensor],
    dw_weight: Tensor,
    pw_weight: Tensor,
    scale: Tensor,
    shift: Tensor,
    *,
    activation: str = "swish",
) -> list[Tensor]:
    """One head layer over all pyramid levels; see :func:`edet_kernels.separable_conv`."""
    levels = len(inputs)
    scales = scale.expand(levels, -1) if scale.dim() == 1 else scale
    shifts = shift.expand(levels, -1) if shift.dim() == 1 else shift
    return [
        activate(pointwise(depthwise(x, dw_weight), pw_weight, scales[i], shifts[i]), activation)
        for i, x in enumerate(inputs)
    ]


def lateral(
    input: Tensor,
    pw_weights: Sequence[Tensor],
    scales: Sequence[Tensor],
    shifts: Sequence[Tensor],
    *,
    pooled: int = 0,
    pool: str = "same",
) -> list[Tensor]:
    """1×1 + BN projections of one backbone map; see :func:`edet_kernels.lateral`."""
    maps = [pointwise(input, w, s, b) for w, s, b in zip(pw_weights, scales, shifts, strict=True)]
    if pooled:
        x = maps.pop()
        for _ in range(pooled):
            x = resize(x, ((x.shape[-2] + 1) // 2, (x.shape[-1] + 1) // 2), pool)
            maps.append(x)
    return maps


def head(
    inputs: Sequence[Tensor],
    dw_weights: Sequence[Tensor],
    pw_weights: Sequence[Tensor],
    scales: Sequence[Tensor],
    shifts: Sequence[Tensor],
    *,
    activation: str = "swish",
) -> list[Tensor]:
    """All layers of a prediction head; see :func:`edet_kernels.head`."""
    maps = list(inputs)
    layers = list(zip(dw_weights, pw_weights, scales, shifts, strict=True))
    for i, layer in enumerate(layers):
        last = i == len(layers) - 1
        maps = separable_conv(maps, *layer, activation="none" if last else activation)
    return maps


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
    sizes: Sequence[tuple[int, int]],
    fusion: str = "sum",
    pool: str = "same",
    activation: str = "swish",
    statistics: bool = True,
) -> tuple[list[Tensor], Tensor, Tensor]:
    """Nodes in front of their batch norm; see :func:`edet_kernels.training_node`."""
    if scales is not None and offsets is not None:
        inputs = [_affine(x, s, o) for x, s, o in zip(inputs, scales, offsets, strict=True)]
    maps, means, deviations = [], [], []
    first = 0
    for count, size in zip(edge_counts, sizes, strict=True):
        x = fusion_node(
            inputs[first : first + count],
            edge_weights,
            dw_weight,
            pw_weight,
            torch.ones_like(shift),
            shift,
            size=size,
            fusion=fusion,
            pool=pool,
            pre_activation=activation,
        )
        first += count
        maps.append(x)
        x = x.to(torch.promote_types(x.dtype, torch.float32))
        # of no pixel at all 0, not 0/0
        means.append(x.sum((0, 2, 3)) / max(x.numel() // x.shape[1], 1))
        deviations.append((x - means[-1].view(1, -1, 1, 1)).square().sum((0, 2, 3)))
    rows = len(maps) if statistics else 0
    return maps, torch.stack(means)[:rows], torch.stack(deviations)[:rows]


def _statistics(x: Tensor, wanted: bool) -> tuple[Tensor, Tensor]:
    """Mean of each channel and the sum of its squared deviations; (0,) where not wanted."""
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    if not wanted:
        return wide.new_empty(0), wide.new_empty(0)
    mean = wide.sum((0, 2, 3)) / max(x.numel() // x.shape[1], 1)  # of no pixel at all 0, not 0/0
    return mean, (wide - mean.view(1, -1, 1, 1)).square().sum((0, 2, 3))


def training_moments(input: Tensor, *, products: bool = True) -> tuple[Tensor, Tensor]:
    """Means of a map and products of deviations; see :func:`edet_kernels.training_moments`."""
    mean, squares = _statistics(input, True)
    if not products:
        return mean, squares
    deviations = input.to(mean.dtype) - mean.view(1, -1, 1, 1)
    rows = deviations.permute(1, 0, 2, 3).flatten(1)
    device = input.device.type  # meta has no autocast
    known = torch.amp.is_autocast_available(device)
    with torch.autocast(device, enabled=False) if known else nullcontext():
        return mean, rows @ rows.t()


def training_depthwise(
    input: Tensor,
    expand_weight: Tensor | None,
    scale: Tensor | None,
    offset: Tensor | None,
    dw_weight: Tensor,
    *,
    stride: int = 1,
    padding: str = "same",
    activation: str = "swish",
    statistics: bool = True,
) -> tuple[Tensor, Tensor, Tensor]:
    """A block up to its depthwise convolution; see :func:`edet_kernels.training_depthwise`."""
    x = input if expand_weight is None else F.conv2d(input, expand_weight.to(input.dtype))
    if scale is not None and offset is not None:
        x = _affine(x, scale, offset)
    x = convolve(activate(x, activation), dw_weight, stride, padding, groups=x.shape[1])
    return (x, *_statistics(x, statistics))


def training_project(
    input: Tensor,
    scale: Tensor,
    offset: Tensor,
    squeeze: Sequence[Tensor] | None,
    project_weight: Tensor,
    *,
    activation: str = "swish",
    statistics: bool = True,
) -> tuple[Tensor, Tensor, Tensor]:
    """A block from there to its projection; see :func:`edet_kernels.training_project`."""
    x = activate(_affine(input, scale, offset), activation)
    if squeeze is not None:
        reduce, reduce_bias, excite, excite_bias = (t.to(x.dtype) for t in squeeze)
        gate = F.conv2d(x.mean((2, 3), keepdim=True), reduce, reduce_bias)
        x = x * F.conv2d(activate(gate, activation), excite, excite_bias).sigmoid()
    x = F.conv2d(x, project_weight.to(x.dtype))
    return (x, *_statistics(x, statistics))


def conv_geometry(in_size: int, kernel: int, stride: int, padding: str) -> tuple[int, int]:
    """Leading padding and output size of a convolution along one axis.

    ``same`` is TensorFlow's rule: ⌈in/stride⌉ outputs, the odd pixel of padding at the end;
    ``symmetric`` pads kernel//2 on both sides.
    """
    if padding == "same":
        size = -(-in_size // stride)
        return max((size - 1) * stride + kernel - in_size, 0) // 2, size
    before = kernel // 2
    return before, (in_size + 2 * before - kernel) // stride + 1


def convolve(x: Tensor, weight: Tensor, stride: int, padding: str, groups: int = 1) -> Tensor:
    """2-D convolution with the padding of :func:`conv_geometry`."""
    kernel = weight.shape[-1]
    pads = []
    for n in (x.shape[-1], x.shape[-2]):
        before, size = conv_geometry(n, kernel, stride, padding)
        pads += [before, max((size - 1) * stride + kernel - n - before, 0)]
    return F.conv2d(F.pad(x, pads), weight.to(x.dtype), stride=stride, groups=groups)


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
    """An inverted residual block; see :func:`edet_kernels.mbconv`."""
    x = input if expand is None else activate(pointwise(input, *expand), activation)
    dw_weight, scale, shift = depthwise
    dw_weight = dw_weight if dw_weight.dim() == 4 else unpack_depthwise(dw_weight)
    x = convolve(x, dw_weight, stride, padding, groups=x.shape[1])
    x = activate(_affine(x, scale, shift), activation)
    if squeeze is not None:
        reduce, reduce_bias, excite, excite_bias = squeeze
        gate = x.mean((2, 3), keepdim=True)
        gate = pointwise(gate, reduce, torch.ones_like(reduce_bias), reduce_bias)
        gate = pointwise(
            activate(gate, activation), excite, torch.ones_like(excite_bias), excite_bias
        )
        x = x * gate.sigmoid()
    x = pointwise(x, *project)
    return x + input if residual else x


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
    """The first layer of the backbone; see :func:`edet_kernels.stem`."""
    x = image.to(dtype or (image.dtype if image.is_floating_point() else torch.float32))
    if mean is not None and std is not None:
        x = (x - mean.to(x.dtype).view(1, 3, 1, 1)) / std.to(x.dtype).view(1, 3, 1, 1)
    weight = weight if weight.dim() == 4 else unpack_stem(weight, scale.numel())
    return activate(_affine(convolve(x, weight, 2, padding), scale, shift), activation)


def box_iou(box: Tensor, boxes: Tensor) -> Tensor:
    """Intersection over union of one (4,) xyxy box with (N, 4) boxes; 0 where the union is 0."""
    top_left = torch.maximum(box[:2], boxes[:, :2])
    bottom_right = torch.minimum(box[2:], boxes[:, 2:])
    intersection = (bottom_right - top_left).clamp(min=0).prod(-1)
    area = (box[2:] - box[:2]).prod(-1)
    areas = (boxes[:, 2:] - boxes[:, :2]).prod(-1)
    union = area + areas - intersection
    return torch.where(union > 0, intersection / union, torch.zeros_like(union))


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
    class_agnostic: bool = False,
) -> tuple[Tensor, Tensor, Tensor]:
    """Non-maximum suppression of a batch; see :func:`edet_kernels.nms`."""
    batch = boxes.shape[0]
    keep = boxes.new_full((batch, max_detections), -1, dtype=torch.int64)
    kept_scores = scores.new_zeros((batch, max_detections))
    counts = boxes.new_zeros((batch,), dtype=torch.int64)
    for b in range(batch):
        left = scores[b].clone()
        alive = left > score_threshold
        count = 0
        while count < max_detections and bool(alive.any()):
            # argmax returns any of several maxima; the first index is the rule
            best_score = left[alive].max()
            i = int((alive & (left == best_score)).nonzero()[0])
            keep[b, count], kept_scores[b, count] = i, left[i]
            count += 1
            alive[i] = False
            iou = box_iou(boxes[b, i], boxes[b])
            rivals = (labels[b] == labels[b, i]) | class_agnostic
            if method == "hard":
                alive &= ~(rivals & (iou > iou_threshold))
            else:
                decay = torch.exp(-(iou**2) / sigma)
                left = torch.where(rivals & alive, left * decay, left)
                alive &= left > score_threshold
        counts[b] = count
    return keep, kept_scores, counts


def _first_best(values: Tensor, count: int) -> Tensor:
    """Indices (B, count) of the largest of ``values`` (B, N), the first of equal ones first.

    That is the beginning of a stable sort, which takes four times as long; topk alone would take
    any of equal ones.
    """
    if count == 0:
        return values.new_empty((len(values), 0), dtype=torch.int64)
    last = values.topk(count).values[:, -1:]
    above, equal = values > last, values == last
    chosen = above | (equal & (equal.cumsum(1) <= count - above.sum(1, keepdim=True)))
    position = torch.arange(values.shape[1], device=values.device)
    beyond = torch.where(chosen, position, values.shape[1])
    index = beyond.topk(count, largest=False, sorted=True).values
    order = values.gather(1, index).sort(descending=True, stable=True).indices
    return index.gather(1, order)


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
    class_agnostic: bool = False,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Head outputs to detections; see :func:`edet_kernels.detect`."""
    cell_anchors = box_outputs[0].shape[1] // 4
    classes = class_outputs[0].shape[1] // cell_anchors

    def flat(maps: Sequence[Tensor], values: int) -> Tensor:
        rows = [x.permute(0, 2, 3, 1).unflatten(-1, (-1, values)).flatten(1, 3) for x in maps]
        return torch.cat(rows, 1)

    logits, regressions = flat(class_outputs, classes), flat(box_outputs, 4)
    dtype = torch.promote_types(logits.dtype, torch.float32)
    logits = torch.where(logits.isnan(), float("-inf"), logits).flatten(1)
    numbers = (~torch.cat([x.isnan().flatten(1) for x in class_outputs], 1)).sum(1, keepdim=True)
    order = _first_best(logits, min(max_candidates, logits.shape[1]))
    anchor, labels = order // classes, order % classes
    scores = logits.gather(1, order).to(dtype).sigmoid()
    rank = torch.arange(order.shape[1], device=order.device)
    scores = torch.where(rank < numbers, scores, float("nan"))  # what was NaN was sorted last

    t = regressions.gather(1, anchor[..., None].expand(-1, -1, 4)).to(dtype)
    low, high = anchors.to(dtype)[anchor].split(2, -1)
    size = high - low
    centre = t[..., :2] * size + (low + high) / 2
    half = t[..., 2:].exp() * size / 2
    boxes = torch.cat([centre - half, centre + half], -1)[..., [1, 0, 3, 2]]
    if limits is not None:
        ends = limits.to(dtype).repeat(1, 2)[:, None]
        boxes = torch.minimum(boxes.clamp(min=0), ends)
    keep, scores, counts = nms(
        boxes,
        scores,
        labels,
        method=method,
        iou_threshold=iou_threshold,
        sigma=sigma,
        score_threshold=score_threshold,
        max_detections=max_detections,
        class_agnostic=class_agnostic,
    )
    real, index = keep >= 0, keep.clamp(min=0)
    if order.shape[1] == 0:
        return boxes.new_zeros((*keep.shape, 4)), scores, keep, counts
    boxes = boxes.gather(1, index[..., None].expand(-1, -1, 4))
    return (
        torch.where(real[..., None], boxes, 0),
        scores,
        torch.where(real, labels.gather(1, index), -1),
        counts,
    )
