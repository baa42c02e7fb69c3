"""Global memory that the fused kernels move, counted by the emulation, against the least possible.

The least is: of each input the pixels that a tile and its halo need, once for every tile; the
output once; the weights once for every block where they stay in shared memory, else once for every
tile (a wave of tiles, one for each multiprocessor). A block asks for each 32-byte sector once, as
its first-level cache holds a tile. The maps are parts of P3 of D0, D3 and D6: all tiles are alike.
"""

import pytest
import torch

from edet_kernels.testing.samples import Maker, fusion_node, separable_conv

MOST = 1.35
TILE = 8
#: Channels, rows and columns of the part, and whether the weights stay in 227 KiB.
MODELS = {"D0": (64, 24, True), "D3": (160, 16, True), "D6": (384, 16, False)}


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
    emulated.count_launches(True)
    call()
    emulated.count_launches(False)
    (launch,) = emulated.launches()
    return launch


def check(launch, inputs, output, channels, stays):
    tiles = (output // TILE) ** 2
    read = 2 * channels * sum(patch_pixels(size, output) for size in inputs)
    written = 2 * channels * output**2
    weights = weight_bytes(channels) * (launch["blocks"] if stays else tiles)
    assert launch["bytes_written"] == written
    moved = 32 * (launch["sectors_read"] + launch["sectors_written"])
    # a block that streams its weights for several tiles asks a first-level cache that has not them
    moved += 0 if stays else weight_bytes(channels) * (tiles - launch["blocks"])
    assert moved <= MOST * (read + written + weights)
    # the halo: 10 × 10 pixels for 8 × 8
    assert patch_pixels(output, output) <= (10 / 8) ** 2 * output**2


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("resized", ["enlarged", "pooled"])
def test_fusion_node(emulated, model, resized):
    channels, output, stays = MODELS[model]
    emulated.set_device(2, 227 * 1024)
    inputs = [output, output // 2] if resized == "enlarged" else [output, output, 2 * output]
    call = fusion_node(
        Maker(torch.float16, 1), channels, channels, sizes=[(size, size) for size in inputs]
    )
    check(measure(emulated, call), inputs, output, channels, stays)


@pytest.mark.parametrize("model", MODELS)
def test_separable_conv(emulated, model):
    channels, output, stays = MODELS[model]
    emulated.set_device(2, 227 * 1024)
    call = separable_conv(Maker(torch.bfloat16, 1), channels, channels, sizes=[(output, output)])
    check(measure(emulated, call), [output], output, channels, stays)


def test_no_bank_conflicts_that_padding_could_avoid(emulated):
    emulated.set_device(2, 227 * 1024)
    call = separable_conv(Maker(torch.float16, 1), 64, 64, sizes=[(24, 24)], per_level=False)
    launch = measure(emulated, call)
    # the depthwise weights and the factors are stored once, two groups of banks at a time
    assert launch["bank_conflicts"] <= 20 * launch["blocks"]
