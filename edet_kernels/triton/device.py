"""What the Triton kernels share on the device: fusion, resizing, activations, tiles and their dots.

A map is (N, H, W, C) in memory. A tile is [pixels, channels], its pixels numbered through the whole
batch, so that small maps of a large batch still fill a tile. Sums are float32.
"""

from __future__ import annotations

import triton
import triton.language as tl

_FAST_EPSILON = tl.constexpr(1e-4)  # paper section 3.3
_PANEL = tl.constexpr(16)  # output channels in a panel of a packed pointwise weight

# Numbers of the op schemas (edet_kernels/names.py).
_FAST, _SOFTMAX, _SUM = tl.constexpr(0), tl.constexpr(1), tl.constexpr(3)
_SWISH, _RELU, _RELU6, _HARD_SWISH = (tl.constexpr(i) for i in range(1, 5))

# What brings an input to the size of its node: the first number of its geometry (host.geometry).
NONE, NEAREST, POOL = (tl.constexpr(i) for i in range(3))


@triton.jit
def relu(x):
    return tl.where(x < 0, 0.0, x)  # a NaN stays


#: Whether kernels run in Triton's interpreter, on the CPU: TRITON_INTERPRET=1 was set at import.
INTERPRETED = not isinstance(relu, triton.JITFunction)

# The interpreter multiplies matrices of bfloat16 wrongly: operands are widened for it.
_WIDEN = tl.constexpr(INTERPRETED)


@triton.jit
def clamp6(x):
    return tl.where(x < 0, 0.0, tl.where(x > 6, 6.0, x))


@triton.jit
def activate(x, ACTIVATION: tl.constexpr):
    if ACTIVATION == _SWISH:
        x = x / (1.0 + tl.exp(-x))
    elif ACTIVATION == _RELU:
        x = relu(x)
    elif ACTIVATION == _RELU6:
        x = clamp6(x)
    elif ACTIVATION == _HARD_SWISH:
        x = x * (clamp6(x + 3.0) * (1.0 / 6.0))
    return x


@triton.jit
def activation_gradient(x, grad, ACTIVATION: tl.constexpr):
    """``grad`` times the derivative at ``x``, by PyTorch's rules at the kinks."""
    if ACTIVATION == _SWISH:
        sigmoid = 1.0 / (1.0 + tl.exp(-x))
        grad = grad * (sigmoid * (1.0 + x * (1.0 - sigmoid)))
    elif ACTIVATION == _RELU:
        grad = tl.where(x <= 0, 0.0, grad)
    elif ACTIVATION == _RELU6:
        grad = tl.where((x <= 0) | (x >= 6), 0.0, grad)
    elif ACTIVATION == _HARD_SWISH:
        slope = tl.where(x < 3, x * (1.0 / 3.0) + 0.5, 1.0)
        grad = grad * tl.where(x <= -3, 0.0, slope)
    return grad


@triton.jit
def split_pixel(pixel, h, w):
    """Image, row and column of pixels numbered through the batch."""
    row = pixel // w
    return row // h, row % h, pixel % w


@triton.jit
def edge_weight(edge_weights, e, channel, C: tl.constexpr, PER_CHANNEL: tl.constexpr):
    """The raw weight of edge ``e``: a scalar, or one for each channel."""
    if PER_CHANNEL:
        weight = tl.load(edge_weights + e * C + channel, mask=channel < C, other=0.0)
    else:
        weight = tl.load(edge_weights + e)
    return weight  # once, since the compiler wants all returns of a function to be of one type


@triton.jit
def normaliser(
    edge_weights,
    channel,
    EDGES: tl.constexpr,
    FUSION: tl.constexpr,
    C: tl.constexpr,
    PER_CHANNEL: tl.constexpr,
):
    """What :func:`coefficient` subtracts from a weight and divides by."""
    largest = 0.0
    total = 1.0
    if FUSION == _FAST:
        total = relu(edge_weight(edge_weights, 0, channel, C, PER_CHANNEL))
        for e in tl.static_range(1, EDGES):
            total += relu(edge_weight(edge_weights, e, channel, C, PER_CHANNEL))
        total += _FAST_EPSILON
    elif FUSION == _SOFTMAX:
        largest = edge_weight(edge_weights, 0, channel, C, PER_CHANNEL)
        for e in tl.static_range(1, EDGES):
            w = edge_weight(edge_weights, e, channel, C, PER_CHANNEL)
            largest = tl.maximum(largest, w)
        total = tl.exp(edge_weight(edge_weights, 0, channel, C, PER_CHANNEL) - largest)
        for e in tl.static_range(1, EDGES):
            total += tl.exp(edge_weight(edge_weights, e, channel, C, PER_CHANNEL) - largest)
    return largest, total


@triton.jit
def coefficient(
    edge_weights,
    e,
    largest,
    total,
    channel,
    FUSION: tl.constexpr,
    C: tl.constexpr,
    PER_CHANNEL: tl.constexpr,
):
    """The factor of edge ``e`` in the fusion; never asked for when the fusion is a sum."""
    a = edge_weight(edge_weights, e, channel, C, PER_CHANNEL)
    if FUSION == _FAST:
        a = relu(a) / total
    elif FUSION == _SOFTMAX:
        a = tl.exp(a - largest) / total
    return a


@triton.jit
def tile_offsets(row, channel, C: tl.constexpr):
    """Offsets of a tile whose pixels are ``row`` of a map with C channels."""
    return row.to(tl.int64)[:, None] * C + channel[None, :]


@triton.jit
def load_channels(values, e, channel, C: tl.constexpr):
    """Row ``e`` of ``values`` (edges, C), as [1, channels]."""
    return tl.load(values + e * C + channel, mask=channel < C, other=0.0)[None, :]


@triton.jit
def pool_window(
    map,
    scales,
    image,
    y,
    x,
    inside,
    channel,
    in_h,
    in_w,
    GEOMETRY: tl.constexpr,
    EDGE: tl.constexpr,
    C: tl.constexpr,
):
    """Max-pools [pixels, channels]: the largest value and its tap, row · kernel + column.

    The tap is the first of equal values and the last NaN, as PyTorch's is; it starts at the first
    one of the window, which may lie in the padding. Where the map is to be multiplied by
    ``scales`` (edges, C) and a scale is negative, it is the smallest value.
    """
    sign = 1.0
    if scales is not None:
        sign = tl.where(load_channels(scales, EDGE, channel, C) < 0, -1.0, 1.0)
    top = y * GEOMETRY[EDGE][2] - GEOMETRY[EDGE][3]
    left = x * GEOMETRY[EDGE][5] - GEOMETRY[EDGE][6]
    largest = tl.full([y.shape[0], channel.shape[0]], float("-inf"), tl.float32)
    tap = tl.zeros([y.shape[0], channel.shape[0]], tl.int32)
    corner = (image * in_h + top) * in_w + left
    for r in range(GEOMETRY[EDGE][1]):
        for k in range(GEOMETRY[EDGE][4]):
            valid = inside & (top >= -r) & (top < in_h - r) & (left >= -k) & (left < in_w - k)
            offsets = tile_offsets(corner + (r * in_w + k), channel, C)
            mask = valid[:, None] & (channel < C)[None, :]
            v = tl.load(map + offsets, mask=mask, other=float("-inf")).to(tl.float32)
            if scales is not None:
                v = tl.where(mask, sign * v, float("-inf"))
            wins = (v > largest) | (v != v)
            largest = tl.where(wins, v, largest)
            tap = tl.where(wins, r * GEOMETRY[EDGE][4] + k, tap)
    return sign * largest, tap


@triton.jit
def sample(
    map,
    scales,
    image,
    y,
    x,
    inside,
    channel,
    in_h,
    in_w,
    h,
    w,
    GEOMETRY: tl.constexpr,
    EDGE: tl.constexpr,
    C: tl.constexpr,
):
    """[pixels, channels] of a map brought from in_h × in_w to h × w, in float32."""
    if GEOMETRY[EDGE][0] == POOL:
        value, _ = pool_window(
            map, scales, image, y, x, inside, channel, in_h, in_w, GEOMETRY, EDGE, C
        )
    else:
        if GEOMETRY[EDGE][0] == NEAREST:
            if GEOMETRY[EDGE][1] > 0:  # whole factors, known when compiling
                y, x = y // GEOMETRY[EDGE][1], x // GEOMETRY[EDGE][2]
            else:
                y, x = y * in_h // h, x * in_w // w
        offsets = tile_offsets((image * in_h + y) * in_w + x, channel, C)
        mask = inside[:, None] & (channel < C)[None, :]
        value = tl.load(map + offsets, mask=mask, other=0.0).to(tl.float32)
    return value


@triton.jit
def fuse(
    maps,
    heights,
    widths,
    scales,
    offsets,
    edge_weights,
    largest,
    total,
    image,
    y,
    x,
    inside,
    channel,
    h,
    w,
    GEOMETRY: tl.constexpr,
    FUSION: tl.constexpr,
    C: tl.constexpr,
    PER_CHANNEL: tl.constexpr,
):
    """Σ coefficient · resized map, [pixels, channels] in float32.

    A map is read as scale·map + offset where there are ``scales`` and ``offsets`` (edges, C).
    """
    for e in tl.static_range(len(maps)):
        term = sample(
            maps[e], scales, image, y, x, inside, channel, heights[e], widths[e], h, w,
            GEOMETRY, e, C,
        )  # fmt: skip
        if scales is not None:
            term = term * load_channels(scales, e, channel, C)
            term += load_channels(offsets, e, channel, C)
        if FUSION != _SUM:
            a = coefficient(edge_weights, e, largest, total, channel, FUSION, C, PER_CHANNEL)
            if PER_CHANNEL:
                a = a[None, :]
            term = a * term
        if e == 0:  # 0 + −0 would lose a sign
            fused = term
        else:
            fused += term
    return fused


@triton.jit
def load_pointwise(pw, channel, out_channel, C: tl.constexpr, c_out):
    """A tile [channels, output channels] of a packed pointwise weight."""
    rows = (out_channel // _PANEL) * (C * _PANEL) + out_channel % _PANEL
    mask = (channel < C)[:, None] & (out_channel < c_out)[None, :]
    return tl.load(pw + channel[:, None] * _PANEL + rows[None, :], mask=mask, other=0.0)


@triton.jit
def dot(a, b, acc, dtype: tl.constexpr):
    """acc + a·b with operands rounded to ``dtype``; float32 is multiplied as such, not as TF32."""
    a, b = a.to(dtype), b.to(dtype)
    if _WIDEN:
        a, b = a.to(tl.float32), b.to(tl.float32)
    return tl.dot(a, b, acc, input_precision="ieee")


@triton.jit
def neighbour(pixel, y, x, h, w, dy, dx):
    """The pixels at (y + dy, x + dx), and where they are inside their image."""
    inside = (y + dy >= 0) & (y + dy < h) & (x + dx >= 0) & (x + dx < w)
    return pixel + dy * w + dx, inside


@triton.jit
def load_tap(dw, dy, dx, channel, C: tl.constexpr):
    """The depthwise weights of the neighbour at (dy, dx), each −1 to 1."""
    return tl.load(dw + (dy * 3 + dx + 4) * C + channel, mask=channel < C, other=0.0)


@triton.jit
def depthwise(map, pixel, inside, channel, dw, h, w, C: tl.constexpr):
    """Depthwise 3×3 sums of a zero-padded map, [pixels, channels] in float32."""
    _, y, x = split_pixel(pixel, h, w)
    sums = tl.zeros([pixel.shape[0], channel.shape[0]], tl.float32)
    for dy in range(-1, 2):  # a loop when run, to need fewer registers
        for dx in tl.static_range(-1, 2):
            row, valid = neighbour(pixel, y, x, h, w, dy, dx)
            mask = (inside & valid)[:, None] & (channel < C)[None, :]
            value = tl.load(map + tile_offsets(row, channel, C), mask=mask, other=0.0)
            weight = load_tap(dw, dy, dx, channel, C)
            sums += value.to(tl.float32) * weight[None, :]
    return sums


@triton.jit
def affine(sums, out_channel, scale, shift, c_out):
    """scale · sums + shift: the batch norm after a pointwise product."""
    mask = out_channel < c_out
    a = tl.load(scale + out_channel, mask=mask, other=0.0)
    b = tl.load(shift + out_channel, mask=mask, other=0.0)
    return sums * a[None, :] + b[None, :]


@triton.jit
def find_level(tile, first_tiles):
    """The pyramid level that ``tile`` belongs to."""
    level = 0
    for i in tl.static_range(1, len(first_tiles)):
        level += (tile >= first_tiles[i]).to(tl.int32)
    return level


@triton.jit
def select(level, items):
    """``items[level]``: a pointer or number of the level a program works on."""
    item = items[0]
    for i in tl.static_range(1, len(items)):
        if level == i:
            item = items[i]
    return item
