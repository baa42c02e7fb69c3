"""What CUDA alone has of stem and mbconv, on the host; ``test_kernels.py`` has the rest."""

import pytest
import torch

from edet_kernels.testing.numeric import assert_identical
from edet_kernels.testing.samples import DTYPES, sample

pytestmark = pytest.mark.usefixtures("emulated")
dtypes = pytest.mark.parametrize("dtype", DTYPES, ids=str)
ops = pytest.mark.parametrize("op", ["stem", "mbconv"])


@dtypes
@ops
def test_results_do_not_depend_on_the_order_of_threads(emulated, op, dtype):
    call = sample(op, dtype)
    expected = call()
    for seed in (1, 2):
        emulated.set_seed(seed)
        assert_identical(call(), expected)


def test_images_of_any_layout():
    call = sample("stem", uint8=True)
    assert_identical(call(call.maps.contiguous(memory_format=torch.channels_last)), call())
    assert_identical(call(call.maps.flip(1).contiguous().flip(1)), call())


def test_launches(emulated):
    for op, count in (("stem", 1), ("mbconv", 2)):
        emulated.count_launches(True)
        sample(op)()
        emulated.count_launches(False)
        launches = emulated.launches()
        assert len(launches) == count
        # mbconv's projection begins while the block's first kernel ends
        assert [launch["pdl"] for launch in launches] == [False, True][:count]
