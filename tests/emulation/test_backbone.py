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
    for op, count in (("stem", 1), ("mbconv", 3)):
        emulated.count_launches(True)
        sample(op)()
        emulated.count_launches(False)
        launches = emulated.launches()
        assert len(launches) == count
        # the gates and the projection begin while the launch before them ends
        assert [launch["pdl"] for launch in launches] == [False, True, True][:count]


@dtypes
@pytest.mark.parametrize(("channels", "expansion"), [(40, 10), (33, 9)])
def test_a_projection_of_few_blocks_shares_out_its_channels(emulated, dtype, channels, expansion):
    """By the number of multiprocessors; who comes last adds the sums, in the channels' order."""
    call = sample("mbconv", dtype, channels=channels, expansion=expansion, out_channels=24)
    emulated.set_device(132, 227 * 1024)
    emulated.count_launches(True)
    expected = call()
    emulated.count_launches(False)
    assert emulated.launches()[-1]["grid"][2] > 1
    call.check(dtype)
    for seed in (1, 2):
        emulated.set_seed(seed)
        emulated.set_resident(seed * 4)
        assert_identical(call(), expected)
