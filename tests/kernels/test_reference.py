"""The references against PyTorch's own layers, against plain loops, and by finite differences."""

import math

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from edet_kernels import reference
from edet_kernels.names import MAP_OPS
from edet_kernels.testing.samples import cast, map_tree, sample, tensors

torch_activations = {
    "none": nn.Identity(),
    "swish": nn.SiLU(),
    "relu": nn.ReLU(),
    "relu6": nn.ReLU6(),
    "hard_swish": nn.Hardswish(),
}


def normal(*shape):
    return torch.randn(shape, dtype=torch.float64)


def assert_close(a, b):
    torch.testing.assert_close(a, b, rtol=1e-11, atol=1e-12)


def random_norm(channels):
    """A batch norm in eval mode with statistics of its own, and its folded scale and shift."""
    norm = nn.BatchNorm2d(channels, eps=1e-3).double().eval()
    with torch.no_grad():
        for t in (norm.weight, norm.bias, norm.running_mean):
            t.normal_()
        norm.running_var.uniform_(0.5, 2)
        scale = norm.weight / (norm.running_var + norm.eps).sqrt()
        shift = norm.bias - norm.running_mean * scale
    return norm, scale, shift


def conv(c_in, c_out, kernel, **options):
    return nn.Conv2d(c_in, c_out, kernel, dtype=torch.float64, bias=False, **options)


# Resizing.


@pytest.mark.parametrize("factor", [1, 2, 3, 8])
def test_nearest_of_exact_multiples_is_interpolate(factor):
    x = normal(2, 3, 5, 4)
    expected = F.interpolate(x, scale_factor=factor, mode="nearest")
    assert torch.equal(reference.resize(x, (5 * factor, 4 * factor)), expected)


@pytest.mark.parametrize(
    ("source", "size"), [((3, 3), (5, 5)), ((1, 1), (4, 3)), ((17, 29), (33, 57)), ((3, 2), (7, 9))]
)
def test_nearest_takes_the_floor(source, size):
    x = normal(1, 2, *source)
    out = reference.resize(x, size)
    for y in range(size[0]):
        for i in range(size[1]):
            from_y = math.floor(y * source[0] / size[0])
            from_x = math.floor(i * source[1] / size[1])
            assert torch.equal(out[:, :, y, i], x[:, :, from_y, from_x])


@pytest.mark.parametrize("size", [(1, 1), (2, 3), (5, 5), (8, 6), (33, 57)])
def test_symmetric_stride_2_pool_is_max_pool(size):
    x = normal(2, 3, *size)
    expected = nn.MaxPool2d(3, 2, 1)(x)
    assert torch.equal(reference.resize(x, expected.shape[-2:], "symmetric"), expected)


def same_pool(x, size):
    """TensorFlow's SAME max pool by its definition: only pixels inside the map count."""
    out = x.new_empty(*x.shape[:2], *size)
    windows = []
    for n, m in zip(x.shape[-2:], size, strict=True):
        stride = (n - 1) // m + 1
        kernel = stride + 1
        before = max((m - 1) * stride + kernel - n, 0) // 2
        starts = [i * stride - before for i in range(m)]
        windows.append([slice(max(s, 0), min(s + kernel, n)) for s in starts])
    for y, rows in enumerate(windows[0]):
        for i, columns in enumerate(windows[1]):
            out[:, :, y, i] = x[:, :, rows, columns].amax((2, 3))
    return out


@pytest.mark.parametrize(
    ("source", "size"),
    [
        ((4, 4), (2, 2)),  # even: one row of padding, at the bottom
        ((5, 5), (3, 3)),  # odd: one on either side
        ((33, 57), (17, 29)),
        ((9, 10), (3, 4)),
        ((16, 13), (4, 4)),
        ((1, 9), (1, 5)),
        ((3, 2), (1, 1)),
    ],
)
def test_same_pool(source, size):
    x = normal(2, 3, *source)
    assert torch.equal(reference.resize(x, size), same_pool(x, size))


def test_same_pool_pads_the_odd_pixel_at_the_end():
    x = torch.arange(16.0).view(1, 1, 4, 4)
    assert reference.resize(x, (2, 2))[0, 0].tolist() == [[10, 11], [14, 15]]
    assert reference.resize(x, (2, 2), "symmetric")[0, 0].tolist() == [[5, 7], [13, 15]]


def test_pool_of_negative_values_is_not_padded_with_zeros():
    assert reference.resize(-torch.ones(1, 1, 5, 5), (3, 3)).unique().tolist() == [-1]


# Fusion.


@pytest.mark.parametrize("per_channel", [False, True])
def test_fusion_formulas(per_channel):
    xs = [normal(2, 3, 4, 5) for _ in range(3)]
    w = torch.tensor([0.5, -1.0, 2.0], dtype=torch.float64)
    w = torch.stack([w, w + 1, -w], 1) if per_channel else w
    per_map = w.view(3, -1, 1, 1)

    def fuse(fusion):
        return reference.weighted_fusion(xs, w, fusion=fusion)

    positive = per_map.clamp(min=0)
    fast = sum(a * x for a, x in zip(positive / (positive.sum(0) + 1e-4), xs, strict=True))
    assert_close(fuse("fast"), fast)
    exponentials = per_map.exp()
    softmax = sum(a * x for a, x in zip(exponentials / exponentials.sum(0), xs, strict=True))
    assert_close(fuse("softmax"), softmax)
    assert_close(fuse("unbounded"), sum(a * x for a, x in zip(per_map, xs, strict=True)))
    assert_close(reference.weighted_fusion(xs, fusion="sum"), xs[0] + xs[1] + xs[2])


def test_weights_that_are_all_negative_fuse_to_zero():
    xs = [normal(1, 2, 3, 3)] * 2
    assert not reference.weighted_fusion(xs, -torch.ones(2, dtype=torch.float64)).any()


@pytest.mark.parametrize("activation", torch_activations)
def test_activations(activation):
    x = torch.linspace(-12, 12, 200, dtype=torch.float64)
    assert_close(reference.activate(x, activation), torch_activations[activation](x))


# Convolutions.


@pytest.mark.parametrize("post", [False, True])
def test_fusion_node_is_pytorch_layers(post):
    c, c_out = 6, 9
    xs = [normal(2, c, 8, 6), normal(2, c, 4, 3), normal(2, c, 16, 12)]
    w = torch.tensor([0.7, 0.2, 1.5], dtype=torch.float64)
    depthwise, pointwise = conv(c, c, 3, padding=1, groups=c), nn.Conv2d(c, c_out, 1).double()
    norm, scale, shift = random_norm(c_out)
    up = nn.Upsample(scale_factor=2)
    fused = (w[0] * xs[0] + w[1] * up(xs[1]) + w[2] * nn.MaxPool2d(3, 2, 1)(xs[2])) / (
        w.sum() + 1e-4
    )
    activations = ("none", "swish") if post else ("swish", "none")
    expected = norm(pointwise(depthwise(torch_activations[activations[0]](fused))))
    out = reference.fusion_node(
        xs,
        w,
        depthwise.weight,
        pointwise.weight,
        scale,
        shift + pointwise.bias * scale,  # a bias before batch norm is folded, not dropped
        pool="symmetric",
        pre_activation=activations[0],
        post_activation=activations[1],
    )
    assert_close(out, torch_activations[activations[1]](expected))


@pytest.mark.parametrize("activation", torch_activations)
def test_separable_conv_and_head_are_pytorch_layers(activation):
    c, levels = 5, [(8, 6), (4, 3), (1, 1)]
    xs = [normal(2, c, *size) for size in levels]
    layers, expected = [], list(xs)
    for layer in range(3):
        depthwise, pointwise = conv(c, c, 3, padding=1, groups=c), conv(c, c, 1)
        norms = [random_norm(c) for _ in levels]  # a batch norm for each level
        act = torch_activations[activation] if layer < 2 else nn.Identity()
        expected = [
            act(norm(pointwise(depthwise(x))))
            for x, (norm, _, _) in zip(expected, norms, strict=True)
        ]
        scale, shift = (torch.stack([n[i] for n in norms]) for i in (1, 2))
        layers.append((depthwise.weight, pointwise.weight, scale, shift))
        if layer == 0:
            for a, b in zip(
                reference.separable_conv(xs, *layers[0], activation=activation),
                expected,
                strict=True,
            ):
                assert_close(a, b)
    out = reference.head(xs, *zip(*layers, strict=True), activation=activation)
    for a, b in zip(out, expected, strict=True):
        assert_close(a, b)


def test_lateral_is_pytorch_layers():
    x = normal(2, 7, 9, 6)
    projections = [(conv(7, c, 1), *random_norm(c)) for c in (4, 5)]
    first, last = (norm(layer(x)) for layer, norm, _, _ in projections)
    pool = nn.MaxPool2d(3, 2, 1)
    out = reference.lateral(
        x,
        [layer.weight for layer, *_ in projections],
        [scale for _, _, scale, _ in projections],
        [shift for *_, shift in projections],
        pooled=2,
        pool="symmetric",
    )
    for a, b in zip(out, (first, pool(last), pool(pool(last))), strict=True):
        assert_close(a, b)


def tensorflow_padding(x, kernel, stride):
    """Zero padding of TensorFlow's SAME, the odd pixel at the bottom and right."""
    pads = []
    for n in (x.shape[-1], x.shape[-2]):
        total = max((math.ceil(n / stride) - 1) * stride + kernel - n, 0)
        pads += [total // 2, total - total // 2]
    return F.pad(x, pads)


@pytest.mark.parametrize("padding", ["same", "symmetric"])
@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize("kernel", [3, 5])
@pytest.mark.parametrize("size", [(8, 6), (9, 7), (1, 1)])
def test_mbconv_is_pytorch_layers(size, kernel, stride, padding):
    x = normal(2, 4, *size)
    expand, project = conv(4, 12, 1), conv(12, 4, 1)
    depthwise = conv(
        12, 12, kernel, stride=stride, groups=12, padding=kernel // 2 * (padding == "symmetric")
    )
    reduce, excite = nn.Conv2d(12, 3, 1).double(), nn.Conv2d(3, 12, 1).double()
    norms = [random_norm(c) for c in (12, 12, 4)]
    y = F.silu(norms[0][0](expand(x)))
    padded = tensorflow_padding(y, kernel, stride) if padding == "same" else y
    y = F.silu(norms[1][0](depthwise(padded)))
    y = y * excite(F.silu(reduce(F.adaptive_avg_pool2d(y, 1)))).sigmoid()
    y = norms[2][0](project(y))
    out = reference.mbconv(
        x,
        (expand.weight, *norms[0][1:]),
        (depthwise.weight, *norms[1][1:]),
        (reduce.weight, reduce.bias, excite.weight, excite.bias),
        (project.weight, *norms[2][1:]),
        stride=stride,
        padding=padding,
        residual=stride == 1,
    )
    assert_close(out, y + x if stride == 1 else y)


@pytest.mark.parametrize("size", [(8, 6), (9, 7), (1, 1)])
def test_stem_is_pytorch_layers(size):
    image = torch.randint(256, (2, 3, *size), dtype=torch.uint8)
    mean, std = normal(3) + 120, normal(3).abs() + 50
    layer = conv(3, 8, 3, stride=2)
    norm, scale, shift = random_norm(8)
    x = (image.double() - mean.view(3, 1, 1)) / std.view(3, 1, 1)
    expected = F.silu(norm(layer(tensorflow_padding(x, 3, 2))))
    options = {"mean": mean, "std": std, "dtype": torch.float64}
    assert_close(reference.stem(image, layer.weight, scale, shift, **options), expected)
    symmetric = F.silu(norm(F.conv2d(x, layer.weight, stride=2, padding=1)))
    out = reference.stem(x, layer.weight, scale, shift, padding="symmetric")
    assert_close(out, symmetric)


# Of every reference.


def small(op):
    """A call with few channels, for finite differences."""
    width = {"stem": "out_channels"}.get(op, "channels")
    sizes = {
        "weighted_fusion": {"sizes": [(3, 2), (1, 2), (5, 4)]},
        "fusion_node": {"sizes": [(3, 2), (1, 2), (5, 4)]},
        "training_node": {"sizes": [(9, 6), (1, 2)]},
        "separable_conv": {"sizes": [(3, 2), (1, 1)]},
        "lateral": {"size": (3, 2), "out_channels": (2, 3)},
        "mbconv": {"size": (3, 2), "residual": True},
        "stem": {"size": (3, 2)},
    }
    return sample(op, batch=1, **{width: 2}, **sizes.get(op, {}))


@pytest.mark.parametrize("op", MAP_OPS)
def test_gradients(op):
    call = small(op)
    arguments = (call.maps, call.weights, call.options)
    leaves = [t.double().requires_grad_() for t in tensors(arguments)]

    def function(*leaves):
        rest = iter(leaves)
        maps, weights, options = map_tree(lambda _: next(rest), arguments)
        return tuple(tensors(getattr(reference, op)(maps, *weights, **options)))

    assert torch.autograd.gradcheck(function, leaves, fast_mode=True)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("op", [op for op in MAP_OPS if op != "training_moments"])  # makes no map
def test_float_dtypes(op, dtype):
    call = small(op)
    results = [out for out in tensors(call.reference(dtype)) if out.dim() == 4]
    assert {out.dtype for out in results} == {dtype}
    # weights stay in float32, as in a model that is half precision but for its batch norms
    out = getattr(reference, op)(cast(call.maps, dtype), *call.weights, **call.options)
    assert {t.dtype for t in tensors(out) if t.dim() == 4} == {dtype}
