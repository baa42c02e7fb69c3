"""The ops on bytes: every byte of a kernel's result is the reference's."""

from __future__ import annotations

import pytest
import torch

import edet_kernels
from edet_kernels import int8, int8_reference, library
from edet_kernels.names import ACTIVATIONS, INT8_OPS

needs_kernels = pytest.mark.skipif(not library.load(), reason=library.status())


def random_bytes(*shape: int, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randint(0, 256, shape, generator=generator, dtype=torch.uint8)
    return x.contiguous(memory_format=torch.channels_last) if len(shape) == 4 else x


def random_weight(*shape: int, seed: int = 1, most: int = 127) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    dtype = torch.int8 if most == 127 else torch.int16
    return torch.randint(-most, most + 1, shape, generator=generator).to(dtype)


def rows_for(channels: int, activation: str, sum_of: float, seed: int = 2) -> torch.Tensor:
    """Rows of a requantisation that bring sums of the size ``sum_of`` to all bytes."""
    generator = torch.Generator().manual_seed(seed)
    scale = (0.5 + torch.rand(channels, generator=generator)) / sum_of
    shift = torch.randn(channels, generator=generator)
    if activation in ("swish", "hard_swish"):
        zero = torch.randint(0, 60, (channels,), generator=generator).float()
        return torch.stack([8 * scale, shift, torch.full((channels,), 12.0), zero])
    low = torch.randint(0, 40, (channels,), generator=generator).float()
    high = 255 - torch.randint(0, 40, (channels,), generator=generator).float() / 3
    return torch.stack([100 * scale, 50 * shift + 100, low, high])


def block(
    c_in: int, c_mid: int, c_out: int, kernel: int, activation: str, *, expand: bool, reduced: int
):
    """Arguments of :func:`int8.mbconv` that use the whole range of bytes."""
    pointwise, depthwise = edet_kernels.pack_pointwise_int8, edet_kernels.pack_depthwise_int8
    c_mid = c_mid if expand else c_in
    parts = {
        "expand": (
            pointwise(random_weight(c_mid, c_in, 1, 1)),
            rows_for(c_mid, activation, 9000.0 * c_in**0.5),
        )
        if expand
        else None,
        "depthwise": (
            depthwise(random_weight(c_mid, 1, kernel, kernel, seed=3)),
            rows_for(c_mid, activation, 9000.0 * kernel),
            random_bytes(c_mid, seed=4),
        ),
        "squeeze": None,
        "project": (
            pointwise(random_weight(c_out, c_mid, 1, 1, seed=5)),
            rows_for(c_out, "none", 9000.0 * c_mid**0.5, seed=6)[:2].contiguous(),
        ),
    }
    if reduced:
        generator = torch.Generator().manual_seed(7)
        parts["squeeze"] = (
            random_weight(reduced, c_mid, seed=8, most=32767),
            torch.randn(2, reduced, generator=generator) * torch.tensor([[1e-12], [1.0]]),
            random_weight(c_mid, reduced, seed=9, most=32767),
            torch.randn(2, c_mid, generator=generator) * torch.tensor([[1e-9], [1.0]]),
            random_bytes(c_mid, seed=10).float(),
        )
        weight = torch.randn(c_out, c_mid, 1, 1, generator=generator)
        rows = torch.stack([torch.full((c_out,), 0.3), torch.full((c_out,), 100.0)])
        parts["project"] = edet_kernels.pack_pointwise(weight), rows
    return parts


def both(function, *args, **options):
    """What the kernel and the reference make of it, as lists."""
    with edet_kernels.backend("cpu"):
        found = function(*args, **options)
    with edet_kernels.backend("reference"):
        exact = function(*args, **options)
    return [x if isinstance(x, list) else [x] for x in (found, exact)]


def assert_same(function, *args, varied: bool = True, **options):
    found, exact = both(function, *args, **options)
    for x, y in zip(found, exact, strict=True):
        assert x.dtype == y.dtype
        assert x.shape == y.shape
        assert torch.equal(x, y), f"{int((x != y).sum())} of {x.numel()} differ"
        if varied and y.dtype == torch.uint8 and y.numel() > 2000:
            assert len(y.unique()) > 20  # a test of constants would be none
    return exact


@needs_kernels
@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("kernel", [3, 5])
@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize("reduced", [0, 5])
def test_mbconv(activation, kernel, stride, reduced):
    for c_in, c_mid, c_out, size in (
        (16, 48, 24, (19, 23)),
        (22, 83, 22, (9, 30)),
        (3, 7, 5, (1, 1)),
    ):
        for expand in (True, False):
            parts = block(c_in, c_mid, c_out, kernel, activation, expand=expand, reduced=reduced)
            residual = 0.4 if stride == 1 and c_in == c_out else 0.0
            for padding in ("same", "symmetric"):
                assert_same(
                    int8.mbconv,
                    random_bytes(2, c_in, *size),
                    **parts,
                    stride=stride,
                    padding=padding,
                    activation=activation,
                    residual=residual,
                )


@needs_kernels
@pytest.mark.parametrize("threads", [1, 2, 3])
def test_mbconv_does_not_depend_on_threads(threads):
    parts = block(24, 144, 24, 5, "swish", expand=True, reduced=6)
    x = random_bytes(1, 24, 40, 37)
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        assert_same(int8.mbconv, x, **parts, activation="swish", residual=0.3)
    finally:
        torch.set_num_threads(before)


@needs_kernels
@pytest.mark.parametrize("value", [0, 255])
@pytest.mark.parametrize("weight", [-127, 127])
def test_the_largest_sums_do_not_saturate(value, weight):
    c = 1152
    parts = block(c, c, 40, 5, "none", expand=True, reduced=0)
    parts["expand"] = torch.full_like(parts["expand"][0], weight), parts["expand"][1]
    parts["project"] = torch.full_like(parts["project"][0], weight), parts["project"][1]
    rows = parts["depthwise"][1]
    parts["depthwise"] = (
        torch.full_like(parts["depthwise"][0], weight) * (torch.arange(8) < 5).to(torch.int8),
        rows,
        torch.full((c,), value, dtype=torch.uint8),
    )
    x = torch.full((1, c, 6, 6), value, dtype=torch.uint8)
    assert_same(int8.mbconv, x, **parts, activation="none", varied=False)


@needs_kernels
def test_nan_and_infinite_rows_become_the_lowest_and_highest_byte():
    rows = (
        torch.tensor([[float("nan"), float("inf"), -float("inf"), 0.0]]).expand(2, 4).contiguous()
    )
    rows[1] = torch.tensor([0.0, 1.0, 1.0, float("nan")])
    weight = edet_kernels.pack_pointwise_int8(torch.ones(4, 8, 1, 1, dtype=torch.int8))
    x = torch.ones(1, 8, 3, 3, dtype=torch.uint8)
    (y,) = assert_same(int8.lateral, x, [weight], [rows])
    assert y[0, :, 0, 0].tolist() == [0, 255, 0, 0]


@needs_kernels
def test_a_gate_of_a_channel_that_is_always_zero():
    parts = block(16, 32, 16, 3, "relu6", expand=True, reduced=4)
    parts["project"] = torch.zeros_like(parts["project"][0]), parts["project"][1]
    y = assert_same(int8.mbconv, random_bytes(1, 16, 5, 5), **parts, activation="relu6")[0]
    assert y.unique().tolist() == [100]


@needs_kernels
def test_quantize_and_dequantize():
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(2, 5, 7, 9, generator=generator) * 100
    special = torch.tensor([float("nan"), float("inf"), -float("inf"), 0.5, 1.5, -0.0])
    x.view(-1)[:6] = special
    u = assert_same(int8.quantize, x, 1.0, 0)[0]
    assert u.view(-1)[:6].tolist() == [0, 255, 0, 0, 2, 0]
    assert_same(int8.quantize, x.contiguous(memory_format=torch.channels_last), 0.731, 77)
    assert_same(int8.dequantize, u, 0.0371, 13)


@needs_kernels
@pytest.mark.parametrize("activation", ["swish", "relu6"])
@pytest.mark.parametrize("size", [(32, 48), (13, 7), (1, 1)])
def test_stem(activation, size):
    """Products of floats: where they end half way between two bytes, either may be right."""
    generator = torch.Generator().manual_seed(0)
    weight = edet_kernels.pack_stem(torch.randn(20, 3, 3, 3, generator=generator) / 5)
    scale, shift = torch.rand(20, generator=generator), torch.randn(20, generator=generator)
    options = {"activation": activation, "inverse": 40.0, "zero": 12}
    images = (random_bytes(2, 3, *size), torch.randn(2, 3, *size, generator=generator))
    for image in images:
        if image.dtype == torch.uint8:
            options |= {"mean": torch.full((3,), 120.0), "std": torch.full((3,), 60.0)}
        else:
            options |= {"mean": None, "std": None}
        for padding in ("same", "symmetric"):
            (found,), (exact,) = both(
                int8.stem, image, weight, scale, shift, padding=padding, **options
            )
            difference = (found.int() - exact.int()).abs()
            assert difference.max() <= 1
            assert (difference > 0).float().mean() < 0.01
    assert int8.stem(images[0][:0], weight, scale, shift, **options).shape[0] == 0


@needs_kernels
@pytest.mark.parametrize("size", [(8, 8), (7, 5), (1, 1)])
def test_lateral(size):
    weights = [
        edet_kernels.pack_pointwise_int8(random_weight(c, 43, 1, 1, seed=c)) for c in (64, 9, 24)
    ]
    rows = [rows_for(c, "none", 60000.0)[:2].contiguous() for c in (64, 9, 24)]
    for pool in ("same", "symmetric"):
        assert_same(int8.lateral, random_bytes(2, 43, *size), weights, rows, pooled=2, pool=pool)
    assert_same(int8.lateral, random_bytes(2, 43, *size), weights, rows)


def node_layer(
    nodes: int, edges: int, c: int, c_out: int, activation: str, *, out: int, shared: bool
):
    """The tensors of one layer of :func:`int8.nodes`; without edges its inputs are not fused."""
    generator = torch.Generator().manual_seed(edges + c)
    zero = random_bytes(nodes, c, seed=1).float() / 4
    fuse = zero.round()[:, None]
    if edges:
        factors = torch.randn(nodes, edges, c, generator=generator) / 40
        if activation == "none":
            factors = factors * 8
        shift = torch.randn(nodes, 1, c, generator=generator)
        inverse = torch.full((nodes, 1, c), 9.0)
        fuse = torch.cat([factors, shift, inverse, fuse], 1)
    weights = 1 if shared else nodes
    dw = [
        edet_kernels.pack_depthwise_int8(random_weight(c, 1, 3, 3, seed=i)) for i in range(weights)
    ]
    pw = [
        edet_kernels.pack_pointwise_int8(random_weight(c_out, c, 1, 1, seed=i))
        for i in range(weights)
    ]
    mid = torch.stack([rows_for(c, "none", 27000.0, seed=i)[:2] for i in range(nodes)])
    rows = [
        rows_for(c_out, "swish" if out == 4 else "none", 7e4, seed=i)[:out] for i in range(nodes)
    ]
    return fuse, torch.stack(dw), mid.contiguous(), torch.stack(pw), torch.stack(rows).contiguous()


@needs_kernels
@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("c", [64, 23, 3])
@pytest.mark.parametrize("pool", ["same", "symmetric"])
def test_fused_nodes(activation, c, pool):
    two = node_layer(3, 2, c, c, activation, out=4, shared=False)
    three = node_layer(2, 3, c, c, activation, out=4, shared=False)
    maps = [random_bytes(2, c, h, w, seed=h) for h, w in ((13, 18), (7, 9), (4, 5))]
    assert_same(
        int8.nodes,
        maps,
        *map(list, zip(two, three, strict=True)),
        layers=[0, 0, 1, 0, 1],
        edges=[(1, 2), (0, 3), (1, 3, 4), (2, 5), (6, 4, 3)],
        sizes=[(7, 9), (13, 18), (7, 9), (4, 5), (4, 5)],
        outputs=[4, 5, 7],
        pool=pool,
        pre_activation=activation,
        post_activation="swish",
    )


@needs_kernels
@pytest.mark.parametrize("c_out", [36, 810, 5])
def test_heads(c_out):
    c, levels = 40, 2
    hidden = node_layer(levels, 0, c, c, "none", out=4, shared=True)
    last = node_layer(levels, 0, c, c_out, "none", out=2, shared=True)
    maps = [random_bytes(3, c, h, w, seed=h) for h, w in ((11, 10), (1, 3))]
    found = assert_same(
        int8.nodes,
        maps,
        *map(list, zip(hidden, last, strict=True)),
        layers=[0, 1, 0, 1],
        edges=[(0,), (2,), (1,), (4,)],
        sizes=[(11, 10), (11, 10), (1, 3), (1, 3)],
        outputs=[3, 5],
        post_activation="swish",
    )
    assert [x.dtype for x in found] == [torch.float32] * 2


@needs_kernels
def test_batch_of_none():
    parts = block(16, 48, 24, 3, "swish", expand=True, reduced=4)
    assert_same(int8.mbconv, random_bytes(0, 16, 9, 9), **parts, stride=2)
    assert_same(int8.quantize, torch.zeros(0, 4, 3, 3), 1.0, 0)
    weight = edet_kernels.pack_pointwise_int8(random_weight(8, 16, 1, 1))
    assert_same(int8.lateral, random_bytes(0, 16, 5, 5), [weight], [torch.ones(2, 8)], pooled=1)
    layer = node_layer(1, 0, 16, 16, "none", out=2, shared=True)
    options = {"layers": [0], "edges": [(0,)], "sizes": [(4, 4)], "outputs": [1]}
    assert_same(int8.nodes, [random_bytes(0, 16, 4, 4)], *([t] for t in layer), **options)


def test_packed_weights_come_back():
    weight = random_weight(21, 7, 1, 1)
    packed = edet_kernels.pack_pointwise_int8(weight)
    assert packed.shape == (2, 2, 16, 4)
    assert torch.equal(edet_kernels.unpack_pointwise_int8(packed, 21, 7), weight)
    for k in (3, 5):
        weight = random_weight(6, 1, k, k)
        packed = edet_kernels.pack_depthwise_int8(weight)
        assert torch.equal(edet_kernels.unpack_depthwise_int8(packed), weight)
    with pytest.raises(ValueError, match=r"dw_weight must be \(C, 1, 3 or 5, same\), got"):
        edet_kernels.pack_depthwise_int8(random_weight(6, 1, 7, 7))
    with pytest.raises(ValueError, match="pw_weight must be"):
        edet_kernels.pack_pointwise_int8(random_weight(6, 1, 3, 3))


def test_swish_is_near_swish():
    x = torch.linspace(-12, 12, 20001, dtype=torch.float64)
    found = int8_reference.swish4((2 * x).float()).double() / 4
    error = (found - torch.nn.functional.silu(x)).abs()
    assert error.max() < 4.3e-3
    assert error[x.abs() < 7].max() < 2.1e-4
    assert int8_reference.swish4(torch.zeros(1)).item() == 0


def test_sigmoid_is_near_sigmoid():
    x = torch.linspace(-80, 80, 20001)
    error = (int8_reference.sigmoid(x).double() - x.double().sigmoid()).abs()
    assert error.max() < 3e-7


def test_bad_arguments_are_named():
    parts = block(16, 48, 24, 3, "swish", expand=True, reduced=0)
    x = random_bytes(1, 16, 8, 8)
    with pytest.raises(TypeError, match=r"input must be torch\.uint8, got torch\.float32"):
        int8.mbconv(x.float(), **parts)
    with pytest.raises(ValueError, match="residual must be 0 for a result of another shape, got 1"):
        int8.mbconv(x, **parts, residual=1.0)
    with pytest.raises(ValueError, match="stride must be 1 or 2, got 3"):
        int8.mbconv(x, **parts, stride=3)
    with pytest.raises(ValueError, match=r"expand rows must be \(4, 48\), got \(3, 48\)"):
        int8.mbconv(x, **{**parts, "expand": (parts["expand"][0], parts["expand"][1][:3])})
    with pytest.raises(ValueError, match="zero must be an integer of 0 to 255, got 256"):
        int8.quantize(x.float(), 1.0, 256)
    with pytest.raises(ValueError, match="pooled must be an integer of 0 to 16, got -1"):
        int8.lateral(x, [parts["expand"][0]], [torch.ones(2, 48)], pooled=-1)
    layer = node_layer(1, 0, 16, 16, "none", out=2, shared=True)
    with pytest.raises(ValueError, match="layers, edges and sizes must name the same nodes"):
        two = {"edges": [(0,)] * 2, "sizes": [(8, 8)] * 2}
        int8.nodes([x], *([t] for t in layer), layers=[0], **two, outputs=[1])
    with (
        edet_kernels.backend("cuda"),
        pytest.raises(edet_kernels.BackendError, match="int8 kernels are compiled for CPUs"),
    ):
        int8.quantize(x.float(), 1.0, 0)


@needs_kernels
def test_bad_graphs_are_refused():
    x = random_bytes(1, 16, 8, 8)
    layer = [[t] for t in node_layer(1, 2, 16, 16, "none", out=4, shared=True)]
    options = {"layers": [0], "sizes": [(8, 8)], "outputs": [1]}
    with edet_kernels.backend("cpu"):
        for edges, message in (([(0, 7)], "earlier nodes"), ([(0,)], "must be 2 ids, got 1")):
            with pytest.raises(ValueError, match=message):
                int8.nodes([x], *layer, edges=edges, **options)


@needs_kernels
def test_operators_agree_with_their_fakes():
    x = random_bytes(1, 16, 8, 8)
    parts = block(16, 48, 24, 3, "swish", expand=True, reduced=4)
    ops, picture = torch.ops.edet_kernels, torch.randn(1, 3, 8, 8)
    mbconv = [list(parts[k]) for k in ("expand", "depthwise", "squeeze", "project")]
    weight = edet_kernels.pack_pointwise_int8(random_weight(8, 16, 1, 1))
    layer = [[t] for t in node_layer(1, 0, 16, 16, "none", out=2, shared=True)]
    calls = {
        "int8_quantize": (x.float(), 1.0, 0),
        "int8_dequantize": (x, 1.0, 0),
        "int8_stem": (
            *(picture, torch.randn(1, 27, 16), torch.ones(16), torch.ones(16)),
            *(None, None, [0, 0], [4, 4], 1, 1.0, 0),
        ),
        "int8_mbconv": (x, *mbconv, 2, [0, 0], [4, 4], 1, 0.0),
        "int8_lateral": (x, [weight], [torch.ones(2, 8)], 1, 0),
        "int8_nodes": ([x], *layer, [0], [0], [1], [8, 8], [1], 0, 0, 0),
    }
    assert set(calls) == set(INT8_OPS)
    for name, args in calls.items():
        torch.library.opcheck(
            getattr(ops, name).default, args, test_utils=("test_schema", "test_faketensor")
        )
