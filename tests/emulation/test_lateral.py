"""What CUDA alone has of lateral, on the host; ``test_kernels.py`` has the rest."""

import pytest

from edet_kernels.testing.numeric import assert_identical
from edet_kernels.testing.samples import DTYPES, sample

pytestmark = pytest.mark.usefixtures("emulated")
dtypes = pytest.mark.parametrize("dtype", DTYPES, ids=str)


@dtypes
@pytest.mark.parametrize("channels", [320, 640])
def test_channels(channels, dtype):
    sample("lateral", dtype, channels=channels).check(dtype)


@dtypes
@pytest.mark.parametrize("outs", [(7, 64, 112), (160, 384), (8,) * 16], ids=str)
def test_projections(outs, dtype):
    # slices of several widths, more than one of a projection
    sample("lateral", dtype, channels=40, out_channels=outs).check(dtype)


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
