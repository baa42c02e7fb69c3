"""The product of many rows: that of wide nodes, of heads and of mbconv on large maps."""

import pytest
import torch

from edet_kernels.testing.numeric import assert_identical
from edet_kernels.testing.samples import bifpn_graph, sample

dtypes = pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)

#: Rows for more than one block of a product.
GRAPH = bifpn_graph((15, 13), levels=2, cells=1)


def kernels(emulated, call):
    """What the kernels that a call launches are told, and its result."""
    emulated.count_launches(True)
    try:
        result = call()
        return [launch["kernel"] for launch in emulated.launches()], result
    finally:
        emulated.count_launches(False)


@pytest.fixture
def one_processor(emulated):
    """A GPU of one multiprocessor, for which two tiles of 128 rows are much."""
    emulated.set_device(1, 227 * 1024, 90)
    return emulated


@dtypes
@pytest.mark.parametrize("channels", [136, 160, 264])
def test_a_wide_node(one_processor, monkeypatch, channels, dtype):
    call = sample("bifpn", dtype, batch=2, channels=channels, graph=GRAPH)
    monkeypatch.setenv("EDET_CUDA_LAUNCH", "nodes")
    names, result = kernels(one_processor, call)
    assert sum("LargeProduct" in name for name in names) >= 1
    assert sum("Packing" in name for name in names) == 1
    call.check(dtype)
    one_processor.set_device(100, 227 * 1024, 90)  # for which it is little
    names, other = kernels(one_processor, call)
    assert not any("LargeProduct" in name for name in names)
    assert_identical(result, other)


@dtypes
@pytest.mark.parametrize(
    ("multiprocessors", "blocks"),
    # four tiles of rows: slices of 96 columns where all blocks run in as many turns as others,
    # of 64 where those of 96 take a turn more or leave multiprocessors idle, of 32 likewise
    [(1, 8), (3, 12), (4, 8), (12, 12), (20, 20)],
)
def test_columns_of_a_block(one_processor, monkeypatch, multiprocessors, blocks, dtype):
    call = sample("separable_conv", dtype, channels=160, out_channels=160, sizes=[(15, 13)])
    expected = call()
    one_processor.set_device(multiprocessors, 227 * 1024, 90)
    monkeypatch.setenv("EDET_CUDA_LAUNCH", "nodes")
    one_processor.count_launches(True)
    result = call()
    one_processor.count_launches(False)
    (product,) = [one for one in one_processor.launches() if one["kernel"] == "LargeProduct"]
    assert product["blocks"] == blocks
    assert_identical(result, expected)
    call.check(dtype)


@dtypes
@pytest.mark.parametrize("seed", range(4))
def test_copies_arrive_early_or_late(one_processor, dtype, seed):
    one_processor.set_seed(seed)
    # five chunks of channels, the last of 8: more than the stages
    sample("bifpn", dtype, batch=2, channels=264, graph=GRAPH).check(dtype)


@dtypes
@pytest.mark.parametrize("out_channels", [9, 36, 90, 300])
def test_a_wide_head(one_processor, dtype, out_channels):
    """Layers of which each level has its own batch norm, then a prediction of any width."""
    sizes = ((15, 13), (8, 7), (4, 4), (2, 2), (1, 1))
    make = sample("head", dtype, channels=136, sizes=sizes)
    options = {"channels": 136, "out_channels": out_channels, "sizes": sizes}
    last = sample("separable_conv", dtype, **options).weights
    weights = [[*parts[:-1], one] for parts, one in zip(make.weights, last, strict=True)]
    call = type(make)("head", make.maps, tuple(weights))
    names, _ = kernels(one_processor, call)
    assert sum("LargeProduct" in name for name in names) == len(weights[0])
    call.check(dtype)


@dtypes
def test_a_prediction_much_wider_than_its_input(one_processor, dtype):
    call = sample("separable_conv", dtype, channels=16, out_channels=810, sizes=((15, 13), (8, 7)))
    names, result = kernels(one_processor, call)
    assert any("LargeProduct" in name for name in names)
    call.check(dtype)
    one_processor.set_device(1000, 227 * 1024, 90)
    assert_identical(result, call())


def test_other_devices_and_maps(one_processor):
    call = sample("bifpn", torch.float32, batch=2, channels=136, graph=GRAPH)
    assert not any("LargeProduct" in name for name in kernels(one_processor, call)[0])
    # rows that cannot be copied 16 bytes at a time
    call = sample("bifpn", torch.float16, batch=2, channels=141, graph=GRAPH)
    assert not any("LargeProduct" in name for name in kernels(one_processor, call)[0])
    one_processor.set_device(1, 64 * 1024, 75)  # has no asynchronous copies
    call = sample("bifpn", torch.float16, batch=2, channels=136, graph=GRAPH)
    assert not any("LargeProduct" in name for name in kernels(one_processor, call)[0])


@dtypes
@pytest.mark.parametrize("size", [(16, 14), (16, 7), (32, 32)], ids=str)
@pytest.mark.parametrize("channels", [8, 40, 112])
def test_a_projection(one_processor, dtype, size, channels):
    """Gated rows of several images in a block, a residual, columns of several blocks."""
    call = sample("mbconv", dtype, batch=3, channels=channels, size=size, residual=True)
    assert any("LargeProduct" in name for name in kernels(one_processor, call)[0])
    call.check(dtype)


@dtypes
def test_a_projection_without_gates(one_processor, dtype):
    call = sample("mbconv", dtype, batch=3, size=(13, 11), squeeze=False)
    assert any("LargeProduct" in name for name in kernels(one_processor, call)[0])
    call.check(dtype)


@dtypes
@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize("kernel", [3, 5])
def test_an_expansion_through_memory(one_processor, dtype, kernel, stride):
    """Rows to columns of several blocks, then the depthwise convolution of their map."""
    options = {"size": (17, 23), "kernel": kernel, "stride": stride, "expansion": 6}
    call = sample("mbconv", dtype, batch=3, channels=24, residual=stride == 1, **options)
    names, _ = kernels(one_processor, call)
    assert names[:2] == ["Packing", "LargeProduct"]
    call.check(dtype)
    one_processor.set_device(100, 227 * 1024, 90)  # for which the map is small
    assert "LargeProduct" not in kernels(one_processor, call)[0]
