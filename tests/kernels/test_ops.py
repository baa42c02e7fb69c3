"""Every op's CPU kernel against the fp64 reference, with eager PyTorch's error as the yardstick.

``test_instruction_sets.py`` runs this file once more for each instruction set of this CPU.
"""

import threading

import pytest
import torch
from op_utils import (
    CHANNELS,
    DTYPES,
    FUSIONS,
    MAP_OPS,
    SAMPLES,
    assert_identical,
    bifpn_graph,
    cast,
    map_tree,
    sample,
    tensors,
)
from torch import Tensor

import edet_kernels
from edet_kernels.ops import ACTIVATIONS

FUSION_OPS = ("weighted_fusion", "fusion_node", "bifpn")

pytestmark = pytest.mark.usefixtures("kernels_only")
dtypes = pytest.mark.parametrize("dtype", DTYPES, ids=str)
map_ops = pytest.mark.parametrize("op", MAP_OPS)
all_ops = pytest.mark.parametrize("op", SAMPLES)
fusion_ops = pytest.mark.parametrize("op", FUSION_OPS)


# What is computed.


@dtypes
@pytest.mark.parametrize("channels", CHANNELS)
@map_ops
def test_channels(op, channels, dtype):
    width = "out_channels" if op == "stem" else "channels"
    sample(op, dtype, **{width: channels}).check(dtype)


@pytest.mark.parametrize("op", ["fusion_node", "separable_conv", "mbconv"])
@pytest.mark.parametrize("out_channels", [1, 15, 36, 48, 81, 96, 810])
def test_output_channels(op, out_channels):
    # 810 = 9 anchors × 90 classes; the others end every way a group of 16-channel panels can
    sample(op, channels=24, out_channels=out_channels).check(torch.float32)


@dtypes
@pytest.mark.parametrize("op", ["separable_conv", "fusion_node", "lateral"])
def test_wide_maps_of_few_pixels(op, dtype):
    # the coarsest levels of D7x: eager PyTorch multiplies them with another, more exact, routine
    sizes = {"size": (5, 3)} if op == "lateral" else {"sizes": [(5, 3), (3, 2)]}
    sample(op, dtype, channels=384, **sizes).check(dtype)


@dtypes
@pytest.mark.parametrize("pool", ["same", "symmetric"])
@pytest.mark.parametrize(("fusion", "per_channel"), FUSIONS)
@fusion_ops
def test_fusion_methods(op, fusion, per_channel, pool, dtype):
    sample(op, dtype, fusion=fusion, per_channel=per_channel, pool=pool).check(dtype)


@dtypes
@pytest.mark.parametrize("fusion", ["fast", "softmax", "unbounded"])
@pytest.mark.parametrize(
    "weights",
    [
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
    ids=str,
)
def test_edge_weight_values(weights, fusion, dtype):
    # 2^-14 is near the ε of fast fusion, and subnormal in no dtype
    call = sample("weighted_fusion", dtype, fusion=fusion, edge_weights=torch.tensor(weights))
    call.check(dtype)


@dtypes
@pytest.mark.parametrize("count", [1, 2, 3, 4, 16])
@pytest.mark.parametrize("resized", ["none", "nearest", "pooled", "all"])
@pytest.mark.parametrize("op", ["weighted_fusion", "fusion_node"])
def test_edge_counts(op, resized, count, dtype):
    sizes = {
        "none": [(9, 6)],
        "nearest": [(5, 3)],
        "pooled": [(17, 12)],
        "all": [(17, 12), (5, 3), (9, 6)],
    }[resized]
    sizes = [sizes[i % len(sizes)] for i in range(count)]
    sample(op, dtype, sizes=sizes, size=(9, 6)).check(dtype)


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


@dtypes
@pytest.mark.parametrize("pool", ["same", "symmetric"])
@pytest.mark.parametrize(("source", "size"), RESIZES, ids=str)
@pytest.mark.parametrize("op", ["weighted_fusion", "fusion_node"])
def test_resize(op, source, size, pool, dtype):
    sample(op, dtype, channels=20, sizes=[source, size], size=size, pool=pool).check(dtype)


@dtypes
@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize(
    ("op", "name"),
    [
        ("weighted_fusion", "activation"),
        ("fusion_node", "pre_activation"),
        ("fusion_node", "post_activation"),
        ("bifpn", "pre_activation"),
        ("bifpn", "post_activation"),
        ("separable_conv", "activation"),
        ("head", "activation"),
        ("mbconv", "activation"),
        ("stem", "activation"),
    ],
)
def test_activations(op, name, activation, dtype):
    call = sample(op, dtype, **{name: activation})
    # wide enough to reach both ends of relu6 and of the exponential in swish
    map_tree(lambda x: x.mul_(4), call.maps)
    call.check(dtype)


@dtypes
@pytest.mark.parametrize("sign", [-1, 1])
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_activation_values(activation, sign, dtype):
    # the negative side alone: its small values are not excused by the large ones of the other
    magnitudes = torch.cat([torch.logspace(-8, 4.5, 1000), torch.linspace(0, 110, 1000)])
    call = sample("weighted_fusion", dtype, fusion="sum", sizes=[(1, 1)], activation=activation)
    call.maps[0] = (sign * magnitudes).to(dtype).view(1, 16, 5, 25)
    call.check(dtype)


@dtypes
@pytest.mark.parametrize("pooled", [0, 1, 3])
@pytest.mark.parametrize("pool", ["same", "symmetric"])
@pytest.mark.parametrize("out_channels", [(16,), (24, 24, 24), (7, 64, 112), (24,) * 16], ids=str)
def test_lateral(out_channels, pool, pooled, dtype):
    call = sample(
        "lateral", dtype, channels=40, out_channels=out_channels, pooled=pooled, pool=pool
    )
    call.check(dtype)


@dtypes
@pytest.mark.parametrize("padding", ["same", "symmetric"])
@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize("kernel", [3, 5])
@pytest.mark.parametrize(
    "size", [(1, 1), (2, 3), (8, 8), (9, 7), (13, 40)], ids=lambda s: f"{s[0]}x{s[1]}"
)
def test_mbconv(size, kernel, stride, padding, dtype):
    options = {"size": size, "kernel": kernel, "stride": stride, "padding": padding}
    sample("mbconv", dtype, channels=8, residual=stride == 1, **options).check(dtype)


@dtypes
@pytest.mark.parametrize("expansion", [1, 2, 6])
@pytest.mark.parametrize("squeeze", [False, True])
@pytest.mark.parametrize("residual", [False, True])
def test_mbconv_parts(expansion, squeeze, residual, dtype):
    options = {"expansion": expansion, "squeeze": squeeze, "residual": residual}
    sample("mbconv", dtype, channels=20, **options).check(dtype)


@dtypes
@pytest.mark.parametrize("padding", ["same", "symmetric"])
@pytest.mark.parametrize("size", [(1, 1), (2, 3), (16, 16), (33, 57)], ids=str)
@pytest.mark.parametrize("uint8", [False, True])
@pytest.mark.parametrize("normalise", [False, True])
def test_stem(size, uint8, normalise, padding, dtype):
    call = sample("stem", dtype, size=size, uint8=uint8, normalise=normalise, padding=padding)
    call.check(dtype)


@dtypes
@pytest.mark.parametrize("per_level", [False, True])
def test_batch_norm_of_levels(per_level, dtype):
    sample("separable_conv", dtype, per_level=per_level).check(dtype)


@dtypes
@pytest.mark.parametrize("batch", [0, 1, 3])
@map_ops
def test_batch(op, batch, dtype):
    sample(op, dtype, batch=batch).check(dtype)


@pytest.mark.parametrize("size", [(40, 131), (131, 40), (64, 64)], ids=str)
@pytest.mark.parametrize("op", ["fusion_node", "separable_conv", "weighted_fusion", "bifpn"])
def test_maps_of_many_strips(op, size):
    # several bands of rows per thread, rows longer than a strip of pixels
    h, w = size
    if op == "bifpn":
        graph = {"graph": bifpn_graph(size, levels=4, cells=2)}
    else:
        graph = {"sizes": [size, (-(-h // 2), -(-w // 2)), (2 * h - 1, 2 * w)]}
    sample(op, channels=17, **graph).check(torch.float32)


@dtypes
@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf], ids=str)
@map_ops
def test_non_finite_inputs(op, value, dtype):
    call = sample(op, dtype)
    for x in tensors(call.maps):
        x[0, 1, x.shape[2] // 2, x.shape[3] // 3] = value
        x[1, 2, 0, -1] = value
    call.check(dtype)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_every_half_number_passes_through_unchanged(dtype):
    bits = torch.arange(2**16).to(torch.int16)
    # 17 channels: whole registers and a tail in every instruction set
    x = torch.cat([bits, bits[: -(2**16) % 17]]).view(dtype).view(1, -1, 1, 17).transpose(1, 3)
    out = edet_kernels.weighted_fusion([x], fusion="sum")
    nan = x.isnan()
    assert torch.equal(out.isnan(), nan)
    assert torch.equal(out[~nan].view(torch.int16), x[~nan].view(torch.int16))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_half_sums_are_rounded_once(dtype):
    # random bits: all exponents, subnormal results and overflows among them
    a, b = torch.randint(-(2**15), 2**15, (2, 1, 17, 64, 64), dtype=torch.int16).view(dtype)
    b[..., ::2, :] = a[..., ::2, :].nextafter(torch.zeros((), dtype=dtype)).neg()
    out = edet_kernels.weighted_fusion([a, b], fusion="sum")
    assert_identical(out, (a.float() + b.float()).to(dtype).contiguous())


# How it is called.


def channels_last(x):
    return x.contiguous(memory_format=torch.channels_last)


def sliced_channels(x):
    wide = torch.full((x.shape[0], x.shape[1] + 3, *x.shape[2:]), torch.nan).to(x.dtype)
    wide = channels_last(wide)
    wide[:, 2:-1] = x
    return wide[:, 2:-1]


def every_second_pixel(x):
    n, c, h, w = x.shape
    wide = torch.full((n, c, 2 * h, 2 * w), torch.nan).to(x.dtype)
    wide[:, :, ::2, ::2] = x
    return wide[:, :, ::2, ::2]


def transposed(x):
    return x.transpose(2, 3).contiguous().transpose(2, 3)


def interior(x):
    n, c, h, w = x.shape
    wide = channels_last(torch.full((n, c, h + 2, w + 2), torch.nan).to(x.dtype))
    wide[:, :, 1:-1, 1:-1] = x
    return wide[:, :, 1:-1, 1:-1]


LAYOUTS = {
    "NCHW": torch.Tensor.contiguous,
    "sliced channels": sliced_channels,
    "every second pixel": every_second_pixel,
    "transposed": transposed,
    "interior": interior,
}


@dtypes
@pytest.mark.parametrize("layout", LAYOUTS)
@map_ops
def test_layouts_give_identical_results(op, layout, dtype):
    call = sample(op, dtype)
    assert_identical(call(map_tree(LAYOUTS[layout], call.maps)), call())


def maps(results):
    """The maps among an op's results."""
    return [t for t in tensors(results) if t.dim() == 4]


@map_ops
def test_expanded_maps(op):
    call = sample(op, batch=1)
    batch_of_3 = map_tree(lambda x: x.expand(3, -1, -1, -1), call.maps)
    for out, one in zip(maps(call(batch_of_3)), maps(call()), strict=True):
        assert_identical(out.contiguous(), one.expand(3, -1, -1, -1).contiguous())


@dtypes
@map_ops
def test_results_are_new_channels_last_maps(op, dtype):
    call = sample(op, dtype)
    outs = maps(call())
    assert all(out.dtype == dtype for out in outs)
    assert all(out.is_contiguous(memory_format=torch.channels_last) for out in outs)
    addresses = {t.untyped_storage().data_ptr() for t in [*outs, *tensors(call.maps)]}
    assert len(addresses) == len(outs) + len(tensors(call.maps))


@map_ops
def test_weights_of_any_dtype_layout_and_packing(op):
    call = sample(op, torch.float16)

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


@all_ops
def test_arguments_are_unchanged(op):
    call = sample(op)
    arguments = (call.maps, call.weights, call.options)
    before = map_tree(Tensor.clone, arguments)
    call()
    assert_identical(tensors(arguments), tensors(before))


@dtypes
@all_ops
def test_results_do_not_depend_on_threads_or_runs(op, dtype, threads):
    options = {
        "weighted_fusion": {"sizes": [(37, 50), (19, 25)]},
        "fusion_node": {"sizes": [(37, 50), (19, 25)]},
        "bifpn": {"graph": bifpn_graph((37, 50), levels=4, cells=2)},
        "separable_conv": {"sizes": [(37, 50), (19, 25)]},
        "lateral": {"size": (37, 50)},
        "mbconv": {"size": (37, 50)},
        "stem": {"size": (74, 99)},
    }
    call = sample(op, dtype, **options.get(op, {}))
    expected = call()
    for count in (1, 2, 3, 2):
        threads(count)
        assert_identical(call(), expected)


def test_ops_run_at_once_in_python_threads():
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
