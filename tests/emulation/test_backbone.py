"""stem and mbconv by their CUDA kernels, executed on the host."""

import pytest
import torch
from op_utils import DTYPES, assert_identical, sample, tensors

from edet_kernels.ops import ACTIVATIONS

pytestmark = pytest.mark.usefixtures("emulated")
dtypes = pytest.mark.parametrize("dtype", DTYPES, ids=str)
ops = pytest.mark.parametrize("op", ["stem", "mbconv"])


@dtypes
@pytest.mark.parametrize("channels", [1, 7, 16, 40, 88])
@ops
def test_channels(op, channels, dtype):
    width = "out_channels" if op == "stem" else "channels"
    sample(op, dtype, **{width: channels}).check(dtype)


@dtypes
@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize("kernel", [3, 5])
@pytest.mark.parametrize("size", [(1, 1), (2, 3), (9, 7), (13, 20)], ids=str)
def test_mbconv(size, kernel, stride, dtype):
    options = {"size": size, "kernel": kernel, "stride": stride}
    sample("mbconv", dtype, channels=8, residual=stride == 1, **options).check(dtype)


@dtypes
@pytest.mark.parametrize("expansion", [1, 6])
@pytest.mark.parametrize("squeeze", [False, True])
@pytest.mark.parametrize("residual", [False, True])
def test_mbconv_parts(expansion, squeeze, residual, dtype):
    options = {"expansion": expansion, "squeeze": squeeze, "residual": residual}
    sample("mbconv", dtype, channels=20, **options).check(dtype)


@pytest.mark.parametrize("padding", ["same", "symmetric"])
def test_padding(padding):
    for kernel in (3, 5):
        sample("mbconv", kernel=kernel, stride=2, padding=padding).check(torch.float32)
    sample("stem", padding=padding).check(torch.float32)


@pytest.mark.parametrize("activation", ACTIVATIONS)
@ops
def test_activations(op, activation):
    sample(op, activation=activation).check(torch.float32)


@dtypes
@pytest.mark.parametrize("size", [(1, 1), (2, 3), (16, 16), (33, 57)], ids=str)
@pytest.mark.parametrize("uint8", [False, True])
@pytest.mark.parametrize("normalise", [False, True])
def test_stem(size, uint8, normalise, dtype):
    sample("stem", dtype, size=size, uint8=uint8, normalise=normalise).check(dtype)


@dtypes
@pytest.mark.parametrize("batch", [0, 1, 3])
@ops
def test_batch(op, batch, dtype):
    sample(op, dtype, batch=batch).check(dtype)


@dtypes
@ops
def test_non_finite_inputs(op, dtype):
    call = sample(op, dtype)
    for x in tensors(call.maps):
        x[0, 1, x.shape[2] // 2, x.shape[3] // 3] = torch.nan
        x[1, 2, 0, -1] = torch.inf
    call.check(dtype)


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
        assert len(emulated.launches()) == count
