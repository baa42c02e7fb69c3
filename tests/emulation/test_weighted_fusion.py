"""weighted_fusion's CUDA kernel, executed on the host."""

import pytest
import torch
from op_utils import DTYPES, FUSIONS, assert_identical, sample, tensors

from edet_kernels.ops import ACTIVATIONS

pytestmark = pytest.mark.usefixtures("emulated")
dtypes = pytest.mark.parametrize("dtype", DTYPES, ids=str)


@dtypes
@pytest.mark.parametrize("channels", [1, 7, 16, 88, 112, 600])
def test_channels(channels, dtype):
    sample("weighted_fusion", dtype, channels=channels).check(dtype)


@dtypes
@pytest.mark.parametrize("pool", ["same", "symmetric"])
@pytest.mark.parametrize(("fusion", "per_channel"), FUSIONS)
def test_fusion_methods(fusion, per_channel, pool, dtype):
    sample("weighted_fusion", dtype, fusion=fusion, per_channel=per_channel, pool=pool).check(dtype)


@pytest.mark.parametrize("count", [1, 2, 4, 16])
def test_edge_counts(count):
    sizes = [[(17, 12), (5, 3), (9, 6)][i % 3] for i in range(count)]
    sample("weighted_fusion", sizes=sizes, size=(9, 6)).check(torch.float32)


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_activations(activation):
    sample("weighted_fusion", activation=activation).check(torch.float32)


@dtypes
@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf], ids=str)
def test_non_finite_inputs(value, dtype):
    call = sample("weighted_fusion", dtype)
    for x in tensors(call.maps):
        x[0, 1, x.shape[2] // 2, x.shape[3] // 3] = value
    call.check(dtype)


@dtypes
@pytest.mark.parametrize("batch", [0, 1, 3])
def test_batch(batch, dtype):
    sample("weighted_fusion", dtype, batch=batch).check(dtype)


def test_results_do_not_depend_on_the_order_of_threads(emulated):
    call = sample("weighted_fusion", torch.bfloat16)
    expected = call()
    for seed in range(1, 4):
        emulated.set_seed(seed)
        assert_identical(call(), expected)


def test_each_input_is_read_once_and_the_output_written_once(emulated):
    call = sample("weighted_fusion", torch.float16, channels=64, sizes=[(16, 16), (16, 16)])
    emulated.count_launches(True)
    call()
    emulated.count_launches(False)
    (launch,) = emulated.launches()
    size = call.maps[0].numel() * 2
    assert launch["bytes_written"] == size
    assert 2 * size <= 32 * launch["sectors_read"] <= 2.1 * size  # and edge weights
