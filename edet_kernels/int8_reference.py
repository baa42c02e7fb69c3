"""The definition of the int8 ops in plain PyTorch: every byte of a kernel's result is the one here.

A map is a tensor of uint8 ``u`` that stands for scale·(u − zero). Weights are int8, with a scale
for each output channel. Sums are integers, which no order changes (float64 holds them exactly).
Between a sum and the next bytes a *requantisation* computes in float32, by operations that IEEE 754
rounds in one way only (no fused multiply-add, no exponential):

    y = float(sum)·scale + shift, per channel
    none, relu, relu6: u = round(clamp(y, low, high))
    swish:             u = round(clamp(swish4(y)·inverse + zero, 0, 255)), swish4(2x) ≈ 4·swish(x)
    hard_swish:        u = round(clamp(y·clamp(y + 3, 0, 6)·inverse + zero, 0, 255))

Its rows, (4, C), are scale, shift and low, high or inverse, zero. Rounding is to nearest, ties to
even; a NaN becomes the lowest byte. Rows that the caller makes hold whatever is constant: the scale
of the input, of the weight, of the batch norm and of the output, and the zero points.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from .packing import unpack_depthwise_int8, unpack_pointwise, unpack_pointwise_int8
from .reference import nearest_indices, pool_geometry

#: swish4(t) = t + a + |t|·(b + |t|·c) with the a, b, c of the segment ⌊min(|t|, 15)⌋: interpolation
#: of 4·swish(t/2) at three points of each segment. Off by less than 2e-4 of swish(x) for |x| < 7,
#: by 4.2e-3 at |x| = 7.5, from where on it is relu. The same numbers are in csrc/cpu/int8_lanes.h.
SWISH = torch.tensor(
    [
        [0.0, 0.00409554224, 0.240989864],
        [-0.0600142181, 0.11595498, 0.188274592],
        [-0.362237036, 0.41624397, 0.113300227],
        [-0.935192943, 0.800170839, 0.04883793],
        [-1.57537258, 1.12311959, 0.00805872027],
        [-2.05652428, 1.31776392, -0.0116406642],
        [-2.27779889, 1.39276946, -0.0179988761],
        [-2.257797, 1.38762128, -0.0176715255],
        [-2.07031488, 1.34093428, -0.0147641245],
        [-1.79404557, 1.27954471, -0.0113529293],
        [-1.49007571, 1.2186867, -0.00830618851],
        [-1.19765186, 1.16544032, -0.00588191766],
        [-0.937805235, 1.12206173, -0.00407125847],
        [-0.718861163, 1.08832121, -0.00277120527],
        [-0.541339099, 1.06291831, -0.00186234189],
        [0.0, 1.0, 0.0],
    ]
)

#: 2^f of |f| ≤ 1/2, highest power first; for :func:`sigmoid`.
_EXP2 = (1.53458124e-4, 1.33999309e-3, 9.61848907e-3, 5.55032864e-2, 2.40226462e-1, 6.93147182e-1)


def clamp(x: Tensor, low: Tensor | float, high: Tensor | float) -> Tensor:
    """``x`` between ``low`` and ``high``; NaN becomes ``low``."""
    low, high = (torch.as_tensor(v, dtype=x.dtype, device=x.device) for v in (low, high))
    x = torch.where(x > low, x, low)
    return torch.where(x < high, x, high)


def _channels(row: Tensor) -> Tensor:
    return row.view(1, -1, 1, 1)


def swish4(t: Tensor) -> Tensor:
    """About 4·swish(t/2); see :data:`SWISH`."""
    size = t.abs()
    segment = clamp(size, 0.0, 15.0).int()
    a, b, c = SWISH.to(t.device)[segment].unbind(-1)
    return t + (a + size * (b + size * c))


def sigmoid(x: Tensor) -> Tensor:
    """1/(1 + 2^(−x·log₂e)) by a polynomial of the exponent's fraction."""
    t = clamp(x * -1.44269504, -126.0, 126.0)
    n = t.round()
    f = t - n
    p = torch.full_like(f, _EXP2[0])
    for factor in (*_EXP2[1:], 1.0):
        p = p * f + factor
    power = ((n.int() + 127) << 23).view(torch.float32)
    return 1.0 / (p * power + 1.0)


def activate(y: Tensor, activation: str) -> Tensor:
    """The activation; 4·swish(y/2) for swish and six times hard_swish."""
    if activation == "swish":
        return swish4(y)
    if activation == "hard_swish":
        return y * clamp(y + 3.0, 0.0, 6.0)
    if activation in ("relu", "relu6"):
        return clamp(y, 0.0, 6.0 if activation == "relu6" else float("inf"))
    return y


def to_bytes(y: Tensor, third: Tensor, fourth: Tensor, activation: str) -> Tensor:
    """uint8 of ``y``, by the last two rows of a requantisation."""
    if activation in ("swish", "hard_swish"):
        y = activate(y, activation) * third + fourth
        return clamp(y, 0.0, 255.0).round().to(torch.uint8)
    return clamp(y, third, fourth).round().to(torch.uint8)


def requantise(total: Tensor, rows: Tensor, activation: str) -> Tensor:
    """Integer sums (N, C, H, W) to uint8; see the module's text."""
    scale, shift, third, fourth = map(_channels, rows)
    y = total.to(torch.float32) * scale + shift
    return to_bytes(y, third, fourth, activation)


def quantize(x: Tensor, inverse: float, zero: int) -> Tensor:
    """A float32 map as uint8: round(clamp(x·inverse + zero, 0, 255))."""
    return clamp(x * inverse + float(zero), 0.0, 255.0).round().to(torch.uint8)


def dequantize(u: Tensor, scale: float, zero: int) -> Tensor:
    """A uint8 map as float32: (u − zero)·scale."""
    return (u.to(torch.float32) - float(zero)) * scale


def _depthwise(
    u: Tensor, packed: Tensor, pad: Tensor, stride: int, before: Sequence[int], size: Sequence[int]
) -> Tensor:
    """Sums of a depthwise convolution whose padding is a byte per channel."""
    weight = unpack_depthwise_int8(packed).double()
    kernel = weight.shape[-1]
    x = u.double() - _channels(pad.double())
    pads = []
    for n, first, out in ((u.shape[3], before[1], size[1]), (u.shape[2], before[0], size[0])):
        pads += [first, max((out - 1) * stride + kernel - n - first, 0)]
    total = F.conv2d(F.pad(x, pads), weight, stride=stride, groups=u.shape[1])
    total = total[:, :, : size[0], : size[1]]
    return total + _channels(pad.double() * weight.sum((1, 2, 3)))


def _pointwise(u: Tensor, packed: Tensor, out_channels: int) -> Tensor:
    weight = unpack_pointwise_int8(packed, out_channels, u.shape[1])
    return F.conv2d(u.double(), weight.double())


def _fixed(y: Tensor, activation: str) -> Tensor:
    """Activated values in steps of 2^−16, as int64."""
    unit = {"swish": 16384.0, "hard_swish": 65536.0 / 6}.get(activation, 65536.0)
    y = activate(y, activation).double() * unit
    return clamp(y, -2147483647.0, 2147483647.0).round().long()


def gate(mid: Tensor, squeeze: Sequence[Tensor], activation: str) -> Tensor:
    """The gate (N, C) of squeeze-excite, float32, from the bytes of the map before it.

    Means and the values in the middle are integers in steps of 2^−16, the weights are int16: their
    products and sums are exact.
    """
    reduce, reduce_rows, excite, excite_rows, zeros = squeeze
    n = mid.shape[2] * mid.shape[3]
    total = mid.long().sum((2, 3)) - n * zeros.long()
    mean = (total.double() * 65536.0 / n).round().long()
    scale, shift = reduce_rows.double()
    y = ((mean @ reduce.long().t()).double() * scale + shift).float()
    scale, shift = excite_rows.double()
    reduced = _fixed(y, activation)
    return sigmoid(((reduced @ excite.long().t()).double() * scale + shift).float())


def _gated(weight: Tensor, rows: Tensor, gate: Tensor, zeros: Tensor) -> tuple[Tensor, Tensor]:
    """One image's projection: weights (C_out, C_mid) times the gate, as int8, and its rows."""
    gated = weight * gate
    most = gated.abs().amax(1)
    inverse = torch.where(most > 0, 127.0 / most, 0.0)
    rounded = clamp(gated * inverse[:, None], -127.0, 127.0).round()
    scale = (most / 127.0) * rows[0]
    correction = (rounded.double() @ zeros.double()).float()
    return rounded.double(), torch.stack([scale, rows[1] - scale * correction])


def mbconv(
    input: Tensor,
    expand: Sequence[Tensor] | None,
    depthwise: Sequence[Tensor],
    squeeze: Sequence[Tensor] | None,
    project: Sequence[Tensor],
    *,
    stride: int,
    before: Sequence[int],
    size: Sequence[int],
    activation: str,
    residual: float = 0.0,
) -> Tensor:
    """An inverted residual block on bytes; see :func:`edet_kernels.int8.mbconv`."""
    x = input
    if expand is not None:
        x = requantise(_pointwise(x, expand[0], expand[1].shape[1]), expand[1], activation)
    weight, rows, pad = depthwise
    x = requantise(_depthwise(x, weight, pad, stride, before, size), rows, activation)
    weight, rows = project
    c_out = rows.shape[1]
    if squeeze is None:
        y = _pointwise(x, weight, c_out).float() * _channels(rows[0]) + _channels(rows[1])
    else:
        plain, gates = unpack_pointwise(weight, c_out).flatten(1), gate(x, squeeze, activation)
        images = []
        for image, factors in zip(x, gates, strict=True):
            rounded, (scale, shift) = _gated(plain, rows, factors, squeeze[4])
            total = torch.einsum("oc,chw->ohw", rounded, image.double())
            images.append(total.float() * scale.view(-1, 1, 1) + shift.view(-1, 1, 1))
        y = torch.stack(images) if images else x.new_zeros((0, c_out, *size), dtype=torch.float32)
    if residual:
        y = y + input.float() * residual
    return clamp(y, 0.0, 255.0).round().to(torch.uint8)


def resize(u: Tensor, size: Sequence[int], pool: str) -> Tensor:
    """As :func:`edet_kernels.reference.resize`, of bytes: nearest to grow, max pool to shrink."""
    h, w = u.shape[-2:]
    if (h, w) == tuple(size):
        return u
    if h <= size[0] and w <= size[1]:
        rows, columns = (nearest_indices(n, i, u.device) for n, i in zip(size, (h, w), strict=True))
        return u[:, :, rows][:, :, :, columns]
    geometry = [pool_geometry(n, out, pool) for n, out in zip((h, w), size, strict=True)]
    pads = []
    for (kernel, stride, first), n, out in reversed(list(zip(geometry, (h, w), size, strict=True))):
        pads += [first, max((out - 1) * stride + kernel - n - first, 0)]
    kernels, strides, _ = zip(*geometry, strict=True)
    pooled = F.max_pool2d(F.pad(u.float(), pads), kernels, strides)  # no byte is below the padding
    return pooled[:, :, : size[0], : size[1]].to(torch.uint8)


def lateral(
    input: Tensor,
    pw_weights: Sequence[Tensor],
    rows: Sequence[Tensor],
    *,
    pooled: int = 0,
    pool: str = "same",
) -> list[Tensor]:
    """Projections of one map; see :func:`edet_kernels.int8.lateral`."""
    maps = [
        requantise(_pointwise(input, w, r.shape[1]), _bounded(r), "none")
        for w, r in zip(pw_weights, rows, strict=True)
    ]
    if pooled:
        x = maps.pop()
        for _ in range(pooled):
            x = resize(x, [(n + 1) // 2 for n in x.shape[-2:]], pool)
            maps.append(x)
    return maps


def fuse(
    inputs: Sequence[Tensor], rows: Tensor, size: Sequence[int], pool: str, activation: str
) -> tuple[Tensor, Tensor]:
    """The bytes that a node's depthwise convolution reads, and the byte per channel around them.

    ``rows`` (1, C) is that byte alone, and the one input is taken as it is; (n + 3, C) are the
    factors of the n inputs, the shift, inverse and zero of the fused map. Max-pooled inputs are
    added last.
    """
    if rows.shape[0] == 1:
        return inputs[0], rows[0]
    count = rows.shape[0] - 3
    shrinks = [x.shape[2] > size[0] or x.shape[3] > size[1] for x in inputs]
    total: Tensor | None = None
    for i in sorted(range(len(inputs)), key=lambda i: shrinks[i]):
        term = resize(inputs[i], size, pool).float() * _channels(rows[i])
        total = term if total is None else total + term
    assert total is not None
    shift, third, fourth = map(_channels, rows[count:])
    y = activate(total + shift, activation) * third + fourth
    return clamp(y, 0.0, 255.0).round().to(torch.uint8), rows[-1]


def nodes(
    inputs: Sequence[Tensor],
    fuse_rows: Sequence[Tensor],
    dw_weights: Sequence[Tensor],
    mid_rows: Sequence[Tensor],
    pw_weights: Sequence[Tensor],
    out_rows: Sequence[Tensor],
    *,
    layers: Sequence[int],
    edges: Sequence[Sequence[int]],
    sizes: Sequence[tuple[int, int]],
    outputs: Sequence[int],
    pool: str = "same",
    pre_activation: str = "none",
    post_activation: str = "none",
) -> list[Tensor]:
    """Nodes of feature networks and heads; see :func:`edet_kernels.int8.nodes`."""
    maps = list(inputs)
    row = [0] * len(dw_weights)
    for layer, sources, size in zip(layers, edges, sizes, strict=True):
        i = row[layer]
        row[layer] += 1
        weight = min(i, len(dw_weights[layer]) - 1)  # one for all rows, or one each
        x, pad = fuse([maps[s] for s in sources], fuse_rows[layer][i], size, pool, pre_activation)
        total = _depthwise(x, dw_weights[layer][weight], pad, 1, (1, 1), size)
        x = requantise(total, _bounded(mid_rows[layer][i]), "none")
        rows = out_rows[layer][i]
        total = _pointwise(x, pw_weights[layer][weight], rows.shape[1])
        if rows.shape[0] == 2:
            maps.append(total.float() * _channels(rows[0]) + _channels(rows[1]))
        else:
            maps.append(requantise(total, rows, post_activation))
    return [maps[o] for o in outputs]


def _bounded(rows: Tensor) -> Tensor:
    """Scale and shift with the bounds of a byte below them."""
    bounds = rows.new_tensor([0.0, 255.0])[:, None].expand(2, rows.shape[1])
    return torch.cat([rows, bounds])
