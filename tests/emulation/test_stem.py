"""The first layer of 16-bit maps by tensor cores, on the host; test_kernels.py has the rest."""

import pytest
import torch

from edet_kernels.testing.numeric import assert_identical
from edet_kernels.testing.samples import sample

pytestmark = pytest.mark.usefixtures("emulated")
dtypes = pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)


@dtypes
@pytest.mark.parametrize("channels", [1, 5, 8, 33, 40, 64, 72])
def test_any_number_of_channels(dtype, channels):
    # groups of 32 channels, of which some are not there; 16 bytes at once where that is possible
    sample("stem", dtype, out_channels=channels, size=(11, 22)).check(dtype)


@dtypes
@pytest.mark.parametrize("uint8", [False, True])
def test_blocks_take_tiles_in_turns(emulated, dtype, uint8):
    emulated.set_device(1, 227 * 1024)
    call = sample("stem", dtype, size=(70, 150), uint8=uint8, normalise=True)
    call.check(dtype)
    expected = call()
    emulated.count_launches(True)
    call()
    emulated.count_launches(False)
    (launch,) = emulated.launches()
    assert launch["blocks"] < expected.shape[0] * (35 // 4) * (75 // 32)
    for seed in (1, 2):
        emulated.set_seed(seed)
        assert_identical(call(), expected)


@dtypes
def test_an_older_gpu(turing, dtype):
    sample("stem", dtype, size=(18, 70), normalise=True).check(dtype)


@dtypes
@pytest.mark.parametrize("value", [torch.inf, torch.nan])
@pytest.mark.parametrize("column", range(4, 8))
def test_what_is_not_finite_stays_in_its_windows(dtype, value, column):
    """A tap row is multiplied as ten numbers, of which the last is the next pixel's."""
    call = sample("stem", dtype, size=(12, 40), activation="none")
    call.maps[0, :, 5, column] = value
    for weight in call.weights[:1]:
        weight.abs_().add_(0.1)  # all of them count
    found, expected = call(), call.reference(torch.float64)
    assert torch.equal(found.isfinite(), expected.isfinite())
    assert not found.isfinite().all()


@dtypes
@pytest.mark.parametrize("activation", ["none", "swish", "relu", "relu6", "hard_swish"])
def test_activations(dtype, activation):
    sample("stem", dtype, size=(9, 10), activation=activation).check(dtype)
