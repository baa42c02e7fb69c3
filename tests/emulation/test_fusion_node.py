"""Fusion nodes and separable convolutions by their CUDA kernel, executed on the host; and the ops
that are sequences of its launches."""

import pytest
import torch
from op_utils import DTYPES, FUSIONS, assert_identical, sample, tensors

from edet_kernels.ops import ACTIVATIONS

pytestmark = pytest.mark.usefixtures("emulated")
dtypes = pytest.mark.parametrize("dtype", DTYPES, ids=str)
OPS = ("fusion_node", "separable_conv", "bifpn", "head")
ops = pytest.mark.parametrize("op", OPS)


@dtypes
@pytest.mark.parametrize("channels", [1, 7, 16, 48, 64, 88, 112])
@ops
def test_channels(op, channels, dtype):
    sample(op, dtype, channels=channels).check(dtype)


@dtypes
@pytest.mark.parametrize("channels", [160, 288, 384, 640])
def test_wide_maps(channels, dtype):
    # more columns than one tile of any size has, weights that stream and weights that stay
    sample("separable_conv", dtype, channels=channels, sizes=[(9, 6), (3, 2)]).check(dtype)


@dtypes
@pytest.mark.parametrize("out_channels", [1, 15, 36, 81, 129, 810])
def test_output_channels(out_channels, dtype):
    sample("fusion_node", dtype, out_channels=out_channels).check(dtype)


@dtypes
@pytest.mark.parametrize("pool", ["same", "symmetric"])
@pytest.mark.parametrize(("fusion", "per_channel"), FUSIONS)
def test_fusion_methods(fusion, per_channel, pool, dtype):
    call = sample("fusion_node", dtype, 72, fusion=fusion, per_channel=per_channel, pool=pool)
    call.check(dtype)


@pytest.mark.parametrize("weights", [(0.0, 1.0, 2.0), (-1.0, 0.0, -2.0), (60.0, -60.0, 0.0)])
@pytest.mark.parametrize("fusion", ["fast", "softmax", "unbounded"])
def test_edge_weight_values(weights, fusion):
    call = sample("fusion_node", fusion=fusion, edge_weights=torch.tensor(weights))
    call.check(torch.float32)


@dtypes
@pytest.mark.parametrize("count", [1, 2, 4, 16])
def test_edge_counts(count, dtype):
    sizes = [[(17, 12), (5, 3), (9, 6)][i % 3] for i in range(count)]
    sample("fusion_node", dtype, sizes=sizes, size=(9, 6)).check(dtype)


@pytest.mark.parametrize("pool", ["same", "symmetric"])
@pytest.mark.parametrize(
    ("source", "size"),
    [((5, 5), (3, 3)), ((3, 3), (5, 5)), ((1, 1), (4, 7)), ((4, 7), (1, 1)), ((2, 1), (1, 1)),
     ((33, 57), (17, 29)), ((17, 29), (33, 57)), ((7, 10), (3, 4)), ((64, 5), (2, 1))],
    ids=str,
)  # fmt: skip
def test_resize(source, size, pool):
    call = sample("fusion_node", channels=20, sizes=[source, size], size=size, pool=pool)
    call.check(torch.float32)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("name", ["pre_activation", "post_activation"])
def test_activations(name, activation, dtype):
    sample("fusion_node", dtype, **{name: activation}).check(dtype)


@dtypes
@pytest.mark.parametrize("batch", [0, 1, 3])
@ops
def test_batch(op, batch, dtype):
    sample(op, dtype, batch=batch).check(dtype)


@dtypes
@pytest.mark.parametrize("value", [torch.nan, torch.inf], ids=str)
@pytest.mark.parametrize("op", ["fusion_node", "separable_conv"])
def test_non_finite_inputs(op, value, dtype):
    call = sample(op, dtype)
    for x in tensors(call.maps):
        x[0, 1, x.shape[2] // 2, x.shape[3] // 3] = value
    call.check(dtype)


@pytest.mark.parametrize("size", [(17, 26), (33, 50)], ids=str)
def test_maps_of_many_tiles(size):
    # more tiles than blocks, and tiles of both heights
    sample("fusion_node", torch.float16, 40, sizes=[size, (17, 25)]).check(torch.float16)


@dtypes
def test_small_shared_memory(emulated, dtype):
    emulated.set_device(4, 64 * 1024)  # Turing's
    sample("fusion_node", dtype, channels=384).check(dtype)
    sample("separable_conv", dtype, channels=160).check(dtype)


def test_per_level_and_shared_batch_norm():
    sample("separable_conv", per_level=False).check(torch.float32)


@dtypes
@ops
def test_results_do_not_depend_on_the_order_of_threads(emulated, op, dtype):
    call = sample(op, dtype)
    expected = call()
    for seed in (1, 2):
        emulated.set_seed(seed)
        assert_identical(call(), expected)


def test_strided_maps_and_weights():
    call = sample("fusion_node")
    expected = call()
    assert_identical(call([x.contiguous() for x in call.maps]), expected)
    wide = [torch.cat([x, x], 1)[:, : x.shape[1]] for x in call.maps]
    assert_identical(call(wide), expected)


def test_each_op_is_this_many_launches(emulated):
    def launches(op, **options):
        call = sample(op, **options)
        emulated.count_launches(True)
        call()
        emulated.count_launches(False)
        return len(emulated.launches()), call

    assert launches("fusion_node")[0] == 1
    assert launches("separable_conv")[0] == 1
    assert launches("head")[0] == 3
    count, call = launches("bifpn")
    assert count == len(call.options["nodes"])
