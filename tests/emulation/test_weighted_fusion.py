"""What CUDA alone has of weighted_fusion, on the host; ``test_kernels.py`` has the rest."""

import pytest
import torch

from edet_kernels.testing.numeric import assert_identical
from edet_kernels.testing.samples import DTYPES, sample

pytestmark = pytest.mark.usefixtures("emulated")
dtypes = pytest.mark.parametrize("dtype", DTYPES, ids=str)


@dtypes
@pytest.mark.parametrize("channels", [1, 7, 16, 88, 112, 600])
def test_channels(channels, dtype):
    sample("weighted_fusion", dtype, channels=channels).check(dtype)


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
