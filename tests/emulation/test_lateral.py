"""lateral by its CUDA kernels, executed on the host."""

import pytest
import torch
from op_utils import DTYPES, assert_identical, sample

pytestmark = pytest.mark.usefixtures("emulated")
dtypes = pytest.mark.parametrize("dtype", DTYPES, ids=str)


@dtypes
@pytest.mark.parametrize("channels", [1, 7, 16, 88, 112, 320, 640])
def test_channels(channels, dtype):
    sample("lateral", dtype, channels=channels).check(dtype)


@dtypes
@pytest.mark.parametrize("pooled", [0, 1, 3])
@pytest.mark.parametrize("pool", ["same", "symmetric"])
@pytest.mark.parametrize(
    "outs", [(16,), (24, 24, 24), (7, 64, 112), (160, 384), (8,) * 16], ids=str
)
def test_projections(outs, pool, pooled, dtype):
    call = sample("lateral", dtype, channels=40, out_channels=outs, pooled=pooled, pool=pool)
    call.check(dtype)


@dtypes
@pytest.mark.parametrize("batch", [0, 1, 3])
def test_batch(batch, dtype):
    sample("lateral", dtype, batch=batch).check(dtype)


@dtypes
@pytest.mark.parametrize("value", [torch.nan, torch.inf], ids=str)
def test_non_finite_inputs(value, dtype):
    call = sample("lateral", dtype)
    call.maps[0, 1, 4, 2] = value
    call.check(dtype)


@dtypes
def test_many_rows_and_little_shared_memory(emulated, dtype):
    sample("lateral", dtype, size=(20, 19)).check(dtype)
    emulated.set_device(2, 64 * 1024)
    sample("lateral", dtype, channels=320, out_channels=(288, 24)).check(dtype)


@dtypes
def test_results_do_not_depend_on_the_order_of_threads(emulated, dtype):
    call = sample("lateral", dtype)
    expected = call()
    for seed in (1, 2):
        emulated.set_seed(seed)
        assert_identical(call(), expected)


def test_one_launch_and_one_for_each_pooled_map(emulated):
    emulated.count_launches(True)
    sample("lateral", pooled=2)()
    emulated.count_launches(False)
    assert len(emulated.launches()) == 3
