"""Every op on every backend against the fp64 reference, eager PyTorch's error as the yardstick.

The backends are the CPU's kernels, the reference itself, the Triton kernels (interpreted where
there is no GPU) and the CUDA kernels in their emulation; ``backends.py`` says which cases each of
them runs. ``test_instruction_sets.py`` runs the CPU's once more for each instruction set.
"""

import math
import os
import threading
from dataclasses import replace

import pytest
import torch
from torch import Tensor

import edet_kernels
from backends import cases
from edet_kernels import library
from edet_kernels.names import ACTIVATIONS, MAP_OPS, POOLS
from edet_kernels.testing.numeric import assert_identical
from edet_kernels.testing.samples import (
    CHANNELS,
    DTYPES,
    FUSION_KINDS,
    SAMPLES,
    bifpn_graph,
    cast,
    map_tree,
    sample,
    tensors,
)

FUSION_OPS = ("weighted_fusion", "fusion_node", "bifpn")
KERNELS = ("cpu", "triton", "emulated")  # the backends that are not plain PyTorch

# NaN and infinity are meant, and lanes outside a map hold anything
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning:triton")


# What is computed.


@cases(op=MAP_OPS, channels=CHANNELS, dtype=DTYPES)
def test_channels(backend, op, channels, dtype):
    width = "out_channels" if op == "stem" else "channels"
    backend.sample(op, dtype, **{width: channels}).check(dtype)


# 810 = 9 anchors × 90 classes; the others end every way a group of 16-channel panels can
@cases(op=["fusion_node", "separable_conv", "mbconv"], out_channels=[1, 15, 36, 48, 81, 96, 810])
def test_output_channels(backend, op, out_channels):
    backend.sample(op, channels=24, out_channels=out_channels).check(torch.float32)


@cases(op=["separable_conv", "fusion_node", "lateral"], dtype=DTYPES)
def test_wide_maps_of_few_pixels(backend, op, dtype):
    # the coarsest levels of D7x: eager PyTorch multiplies them with another, more exact, routine
    sizes = {"size": (5, 3)} if op == "lateral" else {"sizes": [(5, 3), (3, 2)]}
    backend.sample(op, dtype, channels=384, **sizes).check(dtype)


@cases(op=FUSION_OPS, method=FUSION_KINDS, pool=POOLS, dtype=DTYPES)
def test_fusion_methods(backend, op, method, pool, dtype):
    fusion, per_channel = method
    backend.sample(op, dtype, fusion=fusion, per_channel=per_channel, pool=pool).check(dtype)


@cases(
    op=["weighted_fusion"],
    weights=[
        (0.0, 1.0, 2.0),
        (-1.0, 0.5, 2.0),
        (-1.0, 0.0, -2.0),
        (0.0, 0.0, 0.0),
        (-3.0, -2.0, -1.0),
        (60.0, -60.0, 0.0),
        (2**-14, 0.0, 2**-13),
        (torch.nan, 1.0, 1.0),
        (torch.inf, 1.0, 1.0),
    ],
    fusion=["fast", "softmax", "unbounded"],
    dtype=DTYPES,
)
def test_edge_weight_values(backend, op, weights, fusion, dtype):
    # 2^-14 is near the ε of fast fusion, and subnormal in no dtype
    backend.sample(op, dtype, fusion=fusion, edge_weights=torch.tensor(weights)).check(dtype)


@cases(
    op=["weighted_fusion", "fusion_node"],
    count=[1, 2, 3, 4, 16],
    resized=["none", "nearest", "pooled", "all"],
    dtype=DTYPES,
    spread=True,
)
def test_edge_counts(backend, op, count, resized, dtype):
    same, smaller, larger = backend.fusion_sizes
    sizes = {
        "none": [same],
        "nearest": [smaller],
        "pooled": [larger],
        "all": [larger, smaller, same],
    }[resized]
    sizes = [sizes[i % len(sizes)] for i in range(count)]
    backend.sample(op, dtype, sizes=sizes, size=same).check(dtype)


RESIZES = [
    ((5, 5), (3, 3)),
    ((3, 3), (5, 5)),
    ((4, 4), (2, 2)),
    ((1, 1), (1, 1)),
    ((1, 1), (4, 7)),
    ((4, 7), (1, 1)),
    ((2, 1), (1, 1)),
    ((33, 57), (17, 29)),
    ((17, 29), (33, 57)),
    ((8, 5), (8, 10)),
    ((1, 9), (1, 5)),
    ((9, 9), (3, 3)),  # stride 3
    ((7, 10), (3, 4)),  # stride 3, not a multiple
    ((16, 12), (4, 3)),  # stride 4
    ((13, 9), (4, 3)),  # stride 4 and 3
    ((64, 5), (2, 1)),  # stride 32 and 5
    ((3, 2), (7, 9)),  # neither a multiple nor next to one
]


@cases(op=["weighted_fusion", "fusion_node"], resize=RESIZES, pool=POOLS, dtype=DTYPES, spread=True)
def test_resize(backend, op, resize, pool, dtype):
    source, size = resize
    options = {"channels": 20, "sizes": [source, size], "size": size, "pool": pool}
    backend.sample(op, dtype, **options).check(dtype)


ACTIVATION_NAMES = {
    "weighted_fusion": ["activation"],
    "fusion_node": ["pre_activation", "post_activation"],
    "bifpn": ["pre_activation", "post_activation"],
    "separable_conv": ["activation"],
    "head": ["activation"],
    "mbconv": ["activation"],
    "stem": ["activation"],
    "training_node": ["activation"],
    "training_depthwise": ["activation"],
    "training_project": ["activation"],
}


@cases(op=ACTIVATION_NAMES, activation=ACTIVATIONS, dtype=DTYPES, spread=True)
def test_activations(backend, op, activation, dtype):
    for name in ACTIVATION_NAMES[op]:
        call = backend.sample(op, dtype, **{name: activation})
        # wide enough to reach both ends of relu6 and of the exponential in swish
        map_tree(lambda x: x.mul_(4), call.maps)
        call.check(dtype)


@cases(op=["weighted_fusion"], activation=ACTIVATIONS, sign=[-1, 1], dtype=DTYPES)
def test_activation_values(backend, op, activation, sign, dtype):
    # the negative side alone: its small values are not excused by the large ones of the other
    magnitudes = torch.cat([torch.logspace(-8, 4.5, 1000), torch.linspace(0, 110, 1000)])
    call = backend.sample(op, dtype, fusion="sum", sizes=[(1, 1)], activation=activation)
    call.maps[0] = (sign * magnitudes).to(dtype).view(1, 16, 5, 25)
    call.check(dtype)


@cases(
    op=["lateral"],
    out_channels=[(16,), (24, 24, 24), (7, 64, 112), (24,) * 16],
    pooled=[0, 1, 3],
    pool=POOLS,
    dtype=DTYPES,
)
def test_lateral(backend, op, out_channels, pooled, pool, dtype):
    options = {"channels": 40, "out_channels": out_channels, "pooled": pooled, "pool": pool}
    backend.sample(op, dtype, **options).check(dtype)


@cases(
    op=["mbconv"],
    size=[(1, 1), (2, 3), (8, 8), (9, 7), (13, 40)],
    kernel=[3, 5],
    stride=[1, 2],
    padding=POOLS,
    dtype=DTYPES,
)
def test_mbconv(backend, op, size, kernel, stride, padding, dtype):
    options = {"size": size, "kernel": kernel, "stride": stride, "padding": padding}
    backend.sample(op, dtype, channels=8, residual=stride == 1, **options).check(dtype)


@cases(
    op=["mbconv"],
    expansion=[1, 2, 6],
    squeeze=[False, True],
    residual=[False, True],
    dtype=DTYPES,
)
def test_mbconv_parts(backend, op, expansion, squeeze, residual, dtype):
    options = {"expansion": expansion, "squeeze": squeeze, "residual": residual}
    backend.sample(op, dtype, channels=20, **options).check(dtype)


# the rows of a window may share registers with a row that is not in it
@cases(op=["mbconv"], kernel=[3, 5], stride=[1, 2], row=[4, 5], expansion=[1, 2], dtype=DTYPES)
def test_infinity_stays_in_its_windows(backend, op, kernel, stride, row, expansion, dtype):
    options = {"kernel": kernel, "stride": stride, "expansion": expansion, "squeeze": False}
    call = backend.sample(op, dtype, size=(12, 6), activation="none", **options)
    call.maps[0, 1, row, 2] = torch.inf
    out = call()
    outside = out[..., 0, :], out[..., -1, :]
    assert all(row.isfinite().all() for row in outside)
    assert not out.isfinite().all()
    call.check(dtype)


@cases(
    op=["stem"],
    size=[(1, 1), (2, 3), (16, 16), (33, 57)],
    uint8=[False, True],
    normalise=[False, True],
    padding=POOLS,
    dtype=DTYPES,
)
def test_stem(backend, op, size, uint8, normalise, padding, dtype):
    options = {"size": size, "uint8": uint8, "normalise": normalise, "padding": padding}
    backend.sample(op, dtype, **options).check(dtype)


@cases(op=["separable_conv"], per_level=[False, True], dtype=DTYPES)
def test_batch_norm_of_levels(backend, op, per_level, dtype):
    backend.sample(op, dtype, per_level=per_level).check(dtype)


@cases(
    op=["training_node"],
    options=[{"nodes": 3}, {"normalised": False}, {"statistics": False}],
    dtype=DTYPES,
)
def test_statistics(backend, op, options, dtype):
    maps, mean, m2 = backend.sample(op, dtype, **options)()
    if not options.get("statistics", True):
        assert mean.shape == m2.shape == (0, 27)
        return
    near = max(1e-5, torch.finfo(dtype).eps)  # they may be those of the map before it is rounded
    for i, x in enumerate(maps):
        values = x.double().transpose(0, 1).flatten(1)
        torch.testing.assert_close(mean[i].double(), values.mean(1), rtol=near, atol=near)
        deviations = (values - values.mean(1, keepdim=True)).square().sum(1)
        torch.testing.assert_close(m2[i].double(), deviations, rtol=2 * near, atol=0)


@cases(op=MAP_OPS, batch=[0, 1, 3], dtype=DTYPES)
def test_batch(backend, op, batch, dtype):
    # of a few pixels, how far eager's squares are off is a matter of luck; see test_autograd.py
    options = {"statistics": False} if op == "training_depthwise" else {}
    backend.sample(op, dtype, batch=batch, **options).check(dtype)


@cases(
    op=["fusion_node", "separable_conv", "weighted_fusion", "bifpn"],
    size=[(40, 131), (131, 40), (64, 64)],
    backends=["cpu"],  # the others' tests have large maps of their own
)
def test_maps_of_many_strips(backend, op, size):
    # several bands of rows per thread, rows longer than a strip of pixels
    h, w = size
    if op == "bifpn":
        graph = {"graph": bifpn_graph(size, levels=4, cells=2)}
    else:
        graph = {"sizes": [size, (-(-h // 2), -(-w // 2)), (2 * h - 1, 2 * w)]}
    backend.sample(op, channels=17, **graph).check(torch.float32)


@cases(op=MAP_OPS, value=[torch.nan, torch.inf, -torch.inf], dtype=DTYPES)
def test_non_finite_inputs(backend, op, value, dtype):
    call = backend.sample(op, dtype, batch=2)
    for x in tensors(call.maps):
        x[0, 1, x.shape[2] // 2, x.shape[3] // 3] = value
        x[1, 2, 0, -1] = value
    call.check(dtype)


@cases(op=["weighted_fusion"], backends=["cpu"])
def test_swish_at_every_step_of_its_exponent(backend, op):
    """Beside all x at which e^−x is a power of 2^(1/16), where a table's entry gives way."""
    steps = torch.arange(-2048, 2049, dtype=torch.float64) * (math.log(2) / 16)
    near = 1 + torch.linspace(-4, 4, 9, dtype=torch.float64) * 2**-24
    ends = torch.tensor([0.0, -0.0, 1e-40, 1e-8, 88.7, 88.8, 1e30, torch.inf, torch.nan])
    x = torch.cat([(steps[:, None] * near).flatten().float(), ends, -ends])
    x = torch.cat([x, x[: -len(x) % 17]]).view(1, -1, 1, 17).transpose(1, 3)
    out = getattr(edet_kernels, op)([x], fusion="sum", activation="swish")
    exact = torch.nn.functional.silu(x.double())
    # the exponent x·log2(e) is rounded; past −88.7 e^−x overflows and the result is −0
    bound = 2**-24 * (6 + 2 * x.double().abs()) * exact.abs() + 4e-37
    known = x.abs() < torch.inf
    assert ((out - exact).abs() <= bound)[known].all()
    assert_identical(out[~known], exact[~known].float())


@cases(op=["weighted_fusion"], dtype=[torch.float16, torch.bfloat16], rounded=True)
def test_every_half_number_passes_through_unchanged(backend, op, dtype):
    bits = torch.arange(2**16).to(torch.int16)
    # 17 channels: whole registers and a tail in every instruction set
    x = torch.cat([bits, bits[: -(2**16) % 17]]).view(dtype).view(1, -1, 1, 17).transpose(1, 3)
    out = getattr(edet_kernels, op)([x], fusion="sum")
    nan = x.isnan()
    assert torch.equal(out.isnan(), nan)
    assert torch.equal(out[~nan].view(torch.int16), x[~nan].view(torch.int16))


@cases(op=["weighted_fusion"], dtype=[torch.float16, torch.bfloat16], rounded=True)
def test_half_sums_are_rounded_once(backend, op, dtype):
    # random bits: all exponents, subnormal results and overflows among them
    a, b = torch.randint(-(2**15), 2**15, (2, 1, 17, 64, 64), dtype=torch.int16).view(dtype)
    b[..., ::2, :] = a[..., ::2, :].nextafter(torch.zeros((), dtype=dtype)).neg()
    out = getattr(edet_kernels, op)([a, b], fusion="sum")
    assert_identical(out, (a.float() + b.float()).to(dtype).contiguous())


def cpu_products() -> str:
    """How the CPU's kernels multiply bfloat16: as "floats", in "pairs" or in "tiles"."""
    if told := os.environ.get("EDET_BF16_PRODUCTS"):  # of test_sanitizers.py
        return told
    info = library.build_info()
    built = info.cpu if info else ()
    best = ""
    if "avx512_bf16" in built and torch.cpu._is_avx512_bf16_supported():
        best = "avx512_bf16"
        if "amx" in built and torch.cpu._is_amx_tile_supported():
            best = "amx"
    chosen = os.environ.get("EDET_CPU_ISA", best)
    return {"avx512_bf16": "pairs", "amx": "tiles"}.get(chosen, "floats")


def flushed(x):
    """Subnormal numbers as zeros of their sign."""
    return torch.where(x.abs() < torch.finfo(torch.float32).smallest_normal, 0 * x, x)


def tile_product(x, w):
    """x (pixels, C) times w (C_out, C) in float32, as AMX sums; docs/kernels.md, under bf16."""
    x, w = (torch.nn.functional.pad(flushed(t.float()), (0, t.shape[1] % 2)) for t in (x, w))
    pairs = x.shape[1] // 2
    step = max(n for n in range(1, 17) if pairs % n == 0)
    total = torch.zeros(len(x), len(w))
    for a, b in zip(x.split(2 * step, 1), w.split(2 * step, 1), strict=True):
        low, high = torch.zeros_like(total), torch.zeros_like(total)
        for k in range(0, 2 * step, 2):
            low = flushed(low + torch.outer(a[:, k], b[:, k]))
            high = flushed(high + torch.outer(a[:, k + 1], b[:, k + 1]))
        total = flushed(total + flushed(low + high))
    return total


def product(x, w, flush):
    """x (pixels, C) times w (C_out, C) in float32, as docs/kernels.md says under bf16."""
    total = torch.zeros(len(x), len(w))
    for a, b in zip(flush(x.float()).split(64, 1), flush(w).split(64, 1), strict=True):
        block = torch.zeros_like(total)
        for pair in range(0, a.shape[1], 2):
            for k in reversed(range(pair, min(pair + 2, a.shape[1]))):
                block = flush(block + torch.outer(a[:, k], b[:, k]))
        total += block
    return total


# an odd channel is half a pair; more than 64 are several sums
@cases(op=["lateral"], backends=["cpu", "emulated"], channels=[6, 7, 97])
def test_subnormal_products(backend, op, channels):
    # multiples of 2^-133 small enough that every sum is exact, whatever its order
    x = torch.randint(-300, 301, (64, channels)).float() * 2**-133
    w = torch.randint(-2, 3, (24, channels)).float()
    x[:, ::3] = torch.randint(-300, 301, x[:, ::3].shape)
    w[:, ::3] *= 2**-133
    x, w = x.bfloat16(), w.bfloat16().float()
    image = x.view(1, 8, 8, channels).permute(0, 3, 1, 2)
    weight = w.view(24, channels, 1, 1)
    (out,) = edet_kernels.lateral(image, [weight], [torch.ones(24)], [torch.zeros(24)])
    products = cpu_products() if backend.name == "cpu" else "floats"
    if products == "tiles":
        expected = tile_product(x, w)
    else:
        expected = product(x, w, flushed if products == "pairs" else lambda numbers: numbers)
    assert_identical(out.permute(0, 2, 3, 1).reshape(64, 24), expected.bfloat16())


# How it is called.


def channels_last(x):
    return x.contiguous(memory_format=torch.channels_last)


def sliced_channels(x):
    wide = torch.full((x.shape[0], x.shape[1] + 3, *x.shape[2:]), torch.nan).to(x)
    wide = channels_last(wide)
    wide[:, 2:-1] = x
    return wide[:, 2:-1]


def every_second_pixel(x):
    n, c, h, w = x.shape
    wide = torch.full((n, c, 2 * h, 2 * w), torch.nan).to(x)
    wide[:, :, ::2, ::2] = x
    return wide[:, :, ::2, ::2]


def transposed(x):
    return x.transpose(2, 3).contiguous().transpose(2, 3)


def interior(x):
    n, c, h, w = x.shape
    wide = channels_last(torch.full((n, c, h + 2, w + 2), torch.nan).to(x))
    wide[:, :, 1:-1, 1:-1] = x
    return wide[:, :, 1:-1, 1:-1]


LAYOUTS = {
    "NCHW": torch.Tensor.contiguous,
    "sliced channels": sliced_channels,
    "every second pixel": every_second_pixel,
    "transposed": transposed,
    "interior": interior,
}


@cases(op=MAP_OPS, layout=list(LAYOUTS), dtype=DTYPES, backends=KERNELS, spread=True)
def test_layouts_give_identical_results(backend, op, layout, dtype):
    call = backend.sample(op, dtype)
    assert_identical(call(map_tree(LAYOUTS[layout], call.maps)), call())


def maps(results):
    """The maps among an op's results."""
    return [t for t in tensors(results) if t.dim() == 4]


@cases(op=MAP_OPS, backends=KERNELS)
def test_expanded_maps(backend, op):
    call = backend.sample(op, batch=1)
    batch_of_3 = map_tree(lambda x: x.expand(3, -1, -1, -1), call.maps)
    # Triton's interpreter multiplies by NumPy, whose sums depend on where in a tile a row stands;
    # where few blocks would run, CUDA's mbconv shares out the sums of a projection
    interpreted = backend.name == "triton" and not torch.cuda.is_available()
    if interpreted or (op == "mbconv" and backend.name in ("cuda", "emulated")):
        replace(call, maps=batch_of_3).check(torch.float32)
        return
    for out, one in zip(maps(call(batch_of_3)), maps(call()), strict=True):
        assert_identical(out.contiguous(), one.expand(3, -1, -1, -1).contiguous())


@cases(op=MAP_OPS, dtype=DTYPES, backends=KERNELS)
def test_results_are_new_channels_last_maps(backend, op, dtype):
    call = backend.sample(op, dtype)
    outs = maps(call())
    assert all(out.dtype == dtype for out in outs)
    assert all(out.is_contiguous(memory_format=torch.channels_last) for out in outs)
    addresses = {t.untyped_storage().data_ptr() for t in [*outs, *tensors(call.maps)]}
    assert len(addresses) == len(outs) + len(tensors(call.maps))


@cases(op=MAP_OPS, backends=KERNELS)
def test_weights_of_any_dtype_layout_and_packing(backend, op):
    call = backend.sample(op, torch.float16)

    def strided(w: Tensor) -> Tensor:
        return torch.stack([w, w], -1)[..., 0]

    expected = call()
    for weights in (cast(call.weights, torch.float16), map_tree(strided, call.weights)):
        assert_identical(getattr(edet_kernels, op)(call.maps, *weights, **call.options), expected)
    if op in ("fusion_node", "separable_conv", "lateral", "stem"):
        packed = map_tree(packed_weight, call.weights)
        assert_identical(getattr(edet_kernels, op)(call.maps, *packed, **call.options), expected)


def packed_weight(w: Tensor) -> Tensor:
    if w.dim() != 4:
        return w
    if w.shape[2:] == (1, 1):
        return edet_kernels.pack_pointwise(w)
    if w.shape[1] == 1:
        return edet_kernels.pack_depthwise(w)
    return edet_kernels.pack_stem(w)


@cases(op=SAMPLES)
def test_arguments_are_unchanged(backend, op):
    call = backend.sample(op)
    arguments = (call.maps, call.weights, call.options)
    before = map_tree(Tensor.clone, arguments)
    call()
    assert_identical(tensors(arguments), tensors(before))


@cases(op=SAMPLES, dtype=DTYPES, backends=["cpu"])
def test_results_do_not_depend_on_threads_or_runs(backend, op, dtype, threads):
    options = {
        "weighted_fusion": {"sizes": [(37, 50), (19, 25)]},
        "fusion_node": {"sizes": [(37, 50), (19, 25)]},
        "bifpn": {"graph": bifpn_graph((37, 50), levels=4, cells=2)},
        "separable_conv": {"sizes": [(37, 50), (19, 25)]},
        "lateral": {"size": (37, 50)},
        "mbconv": {"size": (37, 50)},
        "stem": {"size": (74, 99)},
        "training_moments": {"size": (37, 50)},
        "training_depthwise": {"size": (37, 50)},
        "training_project": {"size": (37, 50)},
    }
    call = backend.sample(op, dtype, **options.get(op, {}))
    expected = call()
    for count in (1, 2, 3, 2):
        threads(count)
        assert_identical(call(), expected)


@pytest.mark.parametrize("op", ["mbconv", "lateral"])
def test_every_pixel_is_projected_once_for_any_number_of_threads(op, threads, monkeypatch):
    """Projections are cut into blocks of pixels, of about the same size for all threads."""
    monkeypatch.setenv("EDET_POISON", "1")  # a pixel that is left out is NaN
    weights = torch.rand(8, 8, 1, 1), torch.rand(8), torch.rand(8)
    depthwise = torch.rand(8, 1, 3, 3), *weights[1:]
    for n in (1, 2, 3):
        for width in (1, 11, 12, 13, 95, 96, 97, 100, 108, 193, 400):
            x = torch.rand(n, 8, 1, width)
            found = []
            for count in (1, 2, 3, 5, 8):
                threads(count)
                if op == "mbconv":
                    found.append(edet_kernels.mbconv(x, None, depthwise, None, weights))
                else:
                    found += edet_kernels.lateral(x, *([w] for w in weights))
            assert not found[0].isnan().any()
            assert all(torch.equal(found[0], other) for other in found)


@pytest.mark.usefixtures("kernels_only")
def test_cpu_ops_run_at_once_in_python_threads():
    calls = [sample(op, dtype) for op in MAP_OPS for dtype in DTYPES]
    expected = [call() for call in calls]
    failures = []
    start = threading.Barrier(2)

    def run(order):
        start.wait()
        try:
            for _ in range(5):
                for i in order:
                    assert_identical(calls[i](), expected[i])
        except AssertionError as failure:
            failures.append(failure)

    orders = (range(len(calls)), range(len(calls) - 1, -1, -1))
    runners = [threading.Thread(target=run, args=(order,)) for order in orders]
    for runner in runners:
        runner.start()
    for runner in runners:
        runner.join()
    assert not failures
