"""What CUDA alone has of fusion nodes, separable convolutions and the ops that are sequences of
their launches, on the host; ``test_kernels.py`` has the rest."""

import pytest
import torch

from edet_kernels.testing.numeric import assert_identical
from edet_kernels.testing.samples import DTYPES, FUSION_KINDS, sample

pytestmark = pytest.mark.usefixtures("emulated")
dtypes = pytest.mark.parametrize("dtype", DTYPES, ids=str)
OPS = ("fusion_node", "separable_conv", "bifpn", "head")
ops = pytest.mark.parametrize("op", OPS)


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
@pytest.mark.parametrize(("fusion", "per_channel"), FUSION_KINDS)
def test_fusion_methods(fusion, per_channel, pool, dtype):
    # several chunks of channels, each with factors of its own
    options = {"fusion": fusion, "per_channel": per_channel, "pool": pool}
    sample("fusion_node", dtype, channels=72, **options).check(dtype)


@pytest.mark.parametrize("weights", [(0.0, 1.0, 2.0), (-1.0, 0.0, -2.0), (60.0, -60.0, 0.0)])
@pytest.mark.parametrize("fusion", ["fast", "softmax", "unbounded"])
def test_edge_weight_values(weights, fusion):
    call = sample("fusion_node", fusion=fusion, edge_weights=torch.tensor(weights))
    call.check(torch.float32)


@pytest.mark.parametrize("size", [(15, 16), (33, 50)], ids=str)
def test_maps_of_many_tiles(size):
    # more tiles than blocks, of 32 and of 64 pixels
    call = sample("fusion_node", torch.float16, channels=40, sizes=[size, (17, 25)], size=size)
    call.check(torch.float16)


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
