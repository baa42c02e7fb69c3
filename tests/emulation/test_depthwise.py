"""The depthwise kernel of blocks that expand nothing, on the host; test_kernels.py has the rest."""

import pytest
import torch

from edet_kernels.testing.numeric import assert_identical
from edet_kernels.testing.samples import DTYPES, sample

pytestmark = pytest.mark.usefixtures("emulated")
dtypes = pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)


def block(dtype, channels, **options):
    return sample("mbconv", dtype, channels=channels, expansion=1, **options)


def first_launch(emulated, call):
    """Of a call, what the emulation counted: but for weights that are packed for a product."""
    emulated.count_launches(True)
    call()
    emulated.count_launches(False)
    return next(launch for launch in emulated.launches() if launch["kernel"] != "Packing")


def is_depthwise(launch):
    """Whether it is of this kernel: the one that may expand has blocks of 256 threads."""
    return launch["block"][0] <= 128


@dtypes
@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize("kernel", [3, 5])
@pytest.mark.parametrize(
    ("channels", "size"),
    [(2, (1, 1)), (8, (9, 16)), (30, (13, 7)), (32, (70, 21)), (144, (8, 12)), (672, (5, 8)),
     (1152, (3, 4))],
)  # fmt: skip
def test_any_channels_and_sizes(dtype, channels, size, kernel, stride):
    # strips of four columns fit some of the widths, and those of all rows are cut off in others
    block(dtype, channels, size=size, kernel=kernel, stride=stride).check(dtype)


@dtypes
@pytest.mark.parametrize("multiprocessors", [1, 4, 132])
def test_strips_of_any_length(emulated, dtype, multiprocessors):
    """They are the shorter, the more multiprocessors there are, and pooled in as many parts."""
    emulated.set_device(multiprocessors, 227 * 1024)
    call = block(dtype, 48, size=(67, 12), kernel=5)
    call.check(dtype)
    expected = call()
    for seed in (1, 2):
        emulated.set_seed(seed)
        assert_identical(call(), expected)


def test_fewer_blocks_where_they_have_enough_to_do(emulated):
    blocks = []
    for multiprocessors in (1, 132):
        emulated.set_device(multiprocessors, 227 * 1024)
        launch = first_launch(emulated, block(torch.float16, 48, size=(67, 12)))
        blocks.append(launch["blocks"])
    assert blocks[0] < blocks[1]


@dtypes
@pytest.mark.parametrize("activation", ["none", "swish", "relu", "relu6", "hard_swish"])
@pytest.mark.parametrize("padding", ["same", "symmetric"])
def test_activations_and_paddings(dtype, activation, padding):
    for size in ((8, 8), (7, 9)):
        call = block(dtype, 16, size=size, stride=2, activation=activation, padding=padding)
        call.check(dtype)


@dtypes
@pytest.mark.parametrize("squeeze", [False, True])
def test_a_map_of_one_row_or_column(dtype, squeeze):
    for size in ((1, 40), (40, 1)):
        block(dtype, 24, size=size, kernel=5, squeeze=squeeze).check(dtype)


def test_the_maps_that_it_takes(emulated):
    """Floats, and what is made floats, are left to the kernel that may expand."""
    for dtype, channels, taken in [
        (torch.float16, 6, True),
        (torch.bfloat16, 6, True),
        (torch.float16, 7, False),
        (torch.float16, 1, False),
        (torch.float32, 6, False),
    ]:
        call = block(dtype, channels)
        call.check(dtype)
        assert is_depthwise(first_launch(emulated, call)) == taken


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("expansion", [1, 4])
@pytest.mark.parametrize("multiprocessors", [1, 132])
def test_a_map_that_begins_at_any_element(emulated, dtype, expansion, multiprocessors):
    """The same as of one that is aligned, which products read 16 bytes of at once."""
    emulated.set_device(multiprocessors, 227 * 1024)
    options = {"expansion": expansion, "size": (16, 24), "residual": True}
    call = sample("mbconv", dtype, channels=16, **options)
    n, c, h, w = call.maps.shape
    memory = torch.empty(call.maps.numel() + 1, dtype=dtype)
    moved = memory[1:].view(n, h, w, c).permute(0, 3, 1, 2)
    moved.copy_(call.maps)
    assert_identical(call(moved), call())


@dtypes
@pytest.mark.parametrize("expansion", [1, 3])
def test_odd_numbers_of_channels(dtype, expansion):
    """They are computed as floats, and a result of the map's type is what comes back."""
    call = sample("mbconv", dtype, channels=7, expansion=expansion, residual=True)
    call.check(dtype)
    result = call()
    assert result.dtype == dtype
    assert result.is_contiguous(memory_format=torch.channels_last)
    as_floats = call(call.maps.float())
    assert_identical(result, as_floats.to(dtype))


def test_no_image():
    call = block(torch.float16, 16)
    assert call(call.maps[:0]).shape == call()[:0].shape


@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize(("channels", "kernel"), [(32, 3), (144, 3), (240, 5), (672, 5)])
def test_bytes(emulated, channels, kernel, stride):
    """What blocks ask the second-level cache for, against the map and the result once."""
    emulated.set_device(1, 227 * 1024)
    call = block(torch.float16, channels, size=(32, 32), kernel=kernel, stride=stride, batch=1)
    launch = first_launch(emulated, call)
    read, written = call.maps.numel() * 2, call.maps.numel() * 2 // stride**2
    least = read + written
    sums = 4 * launch["blocks"] * (channels // 4)
    assert launch["bytes_written"] == written + sums
    weights = 4 * channels * (kernel**2 + 2 + channels // 4)
    moved = 32 * (launch["sectors_read"] + launch["sectors_written"])
    assert moved - sums - weights * launch["blocks"] <= 1.35 * least
