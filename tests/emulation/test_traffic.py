"""Global memory that the fused kernels move, counted by the emulation, against the least possible.

The least is: of each input the pixels that a tile and its halo need, once for every tile; the
output once; the weights once for every block where they stay in shared memory. A node of more than
128 channels is two launches, between which a map is written and read. A block asks for each 32-byte
sector once, as its first-level cache holds a tile. The maps are parts of P3 of D0, D3 and D6: all
tiles are alike.
"""

import pytest
import torch

from edet_kernels.testing.samples import Maker, fusion_node, separable_conv

MOST = 1.35
TILE = 8
#: Channels, rows and columns of the part.
MODELS = {"D0": (64, 24), "D3": (160, 16), "D6": (384, 16)}


def sources(first, size, out):
    """Rows of an input of ``size`` that rows [first − 1, first + 9) of ``out`` need."""
    rows = range(max(first - 1, 0), min(first + TILE + 1, out))
    if size <= out:
        return {i * size // out for i in rows}
    stride = (size - 1) // out + 1
    before = max((out - 1) * stride + stride + 1 - size, 0) // 2
    taps = {i * stride - before + k for i in rows for k in range(stride + 1)}
    return {row for row in taps if 0 <= row < size}


def patch_pixels(size, out):
    """Pixels of a square input that all tiles of a square output need."""
    return sum(len(sources(first, size, out)) for first in range(0, out, TILE)) ** 2


def weight_bytes(channels):
    return 4 * channels * (9 + channels + 2)


def measure(emulated, call):
    """The launches of a call, but for the one that packs weights for a product."""
    emulated.count_launches(True)
    call()
    emulated.count_launches(False)
    return [launch for launch in emulated.launches() if launch["kernel"] != "Packing"]


def moved(launch):
    return 32 * (launch["sectors_read"] + launch["sectors_written"])


def check(launches, inputs, output, channels):
    read = 2 * channels * sum(patch_pixels(size, output) for size in inputs)
    written = 2 * channels * output**2
    assert [launch["bytes_written"] for launch in launches] == [written] * len(launches)
    # the halo: 10 × 10 pixels for 8 × 8
    assert patch_pixels(output, output) <= (10 / 8) ** 2 * output**2
    if channels <= 128:
        (launch,) = launches
        assert moved(launch) <= MOST * (read + written + weight_bytes(channels) * launch["blocks"])
        return
    fused, product = launches
    assert moved(fused) <= MOST * (read + written + 4 * 64 * 9 * fused["blocks"])
    # blocks of 128 rows and a slice of the columns, which reads all rows and its 16-bit weights
    tiles = output**2 // 128
    slices = product["blocks"] // tiles
    least = written * slices + written + 2 * channels * channels * tiles
    assert moved(product) <= MOST * least


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("resized", ["enlarged", "pooled"])
def test_fusion_node(emulated, model, resized):
    channels, output = MODELS[model]
    emulated.set_device(2, 227 * 1024)
    inputs = [output, output // 2] if resized == "enlarged" else [output, output, 2 * output]
    call = fusion_node(
        Maker(torch.float16, 1), channels, channels, sizes=[(size, size) for size in inputs]
    )
    check(measure(emulated, call), inputs, output, channels)


@pytest.mark.parametrize("model", MODELS)
def test_separable_conv(emulated, model):
    channels, output = MODELS[model]
    emulated.set_device(2, 227 * 1024)
    call = separable_conv(Maker(torch.bfloat16, 1), channels, channels, sizes=[(output, output)])
    check(measure(emulated, call), [output], output, channels)


def test_no_bank_conflicts_that_padding_could_avoid(emulated):
    emulated.set_device(2, 227 * 1024)
    call = separable_conv(Maker(torch.float16, 1), 64, 64, sizes=[(24, 24)], per_level=False)
    (launch,) = measure(emulated, call)
    # the depthwise weights and the factors are stored once, two groups of banks at a time
    assert launch["bank_conflicts"] <= 20 * launch["blocks"]
