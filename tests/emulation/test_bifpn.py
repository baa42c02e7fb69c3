"""Node graphs by their CUDA launches, executed on the host: node by node, overtaking, all at once.

In one launch blocks run together in orders that a seed shuffles, and the emulation reports reads of
what another block has not released, and deadlocks. Every result must be that of separate nodes.
"""

import pytest
import torch

import edet_kernels
from edet_kernels.testing.numeric import assert_identical
from edet_kernels.testing.samples import (
    DTYPES,
    FUSION_KINDS,
    Graph,
    bifpn_graph,
    sample,
)
from plain_bifpn import node_by_node

LAUNCHES = ("nodes", "pdl", "persistent")
dtypes = pytest.mark.parametrize("dtype", DTYPES, ids=str)
launches = pytest.mark.parametrize("launch", LAUNCHES)


@pytest.fixture(autouse=True)
def together(emulated, monkeypatch):
    """All graphs in one launch of blocks that run together, unless a test says otherwise."""
    monkeypatch.setenv("EDET_CUDA_LAUNCH", "persistent")
    emulated.set_resident(5)
    yield
    emulated.set_resident(1)


def count_launches(emulated, call):
    emulated.count_launches(True)
    result = call()
    emulated.count_launches(False)
    return len(emulated.launches()), result


def layer_by_layer(call):
    """The result of a ``head`` from one ``separable_conv`` for each layer."""
    maps = call.maps
    for i, layer in enumerate(zip(*call.weights, strict=True)):
        last = i + 1 == len(call.weights[0])
        maps = edet_kernels.separable_conv(maps, *layer, activation="none" if last else "swish")
    return maps


@launches
@dtypes
@pytest.mark.parametrize(
    ("size", "levels", "cells", "channels"),
    [
        ((13, 18), 5, 1, 24),  # odd sizes all the way down
        ((36, 33), 6, 1, 16),  # the ten nodes of D7x
        ((1, 1), 3, 2, 7),
        ((20, 9), 3, 1, 88),  # two chunks of channels, the second one not full
    ],
)
def test_efficientdet_graphs(monkeypatch, launch, size, levels, cells, channels, dtype):
    monkeypatch.setenv("EDET_CUDA_LAUNCH", launch)
    graph = bifpn_graph(size, levels, cells)
    call = sample("bifpn", dtype, batch=1, channels=channels, graph=graph)
    call.check(dtype)
    assert_identical(call(), node_by_node(call))


@dtypes
@launches
@pytest.mark.parametrize("op", ["bifpn", "head", "separable_conv"])
@pytest.mark.parametrize("batch", [0, 2])
def test_batch(monkeypatch, op, batch, launch, dtype):
    monkeypatch.setenv("EDET_CUDA_LAUNCH", launch)
    sample(op, dtype, batch=batch).check(dtype)


@pytest.mark.parametrize("pool", ["same", "symmetric"])
@pytest.mark.parametrize(("fusion", "per_channel"), FUSION_KINDS)
def test_fusion_methods(fusion, per_channel, pool):
    call = sample("bifpn", torch.float16, fusion=fusion, per_channel=per_channel, pool=pool)
    call.check(torch.float16)
    assert_identical(call(), node_by_node(call))


def test_non_finite_inputs():
    call = sample("bifpn", torch.bfloat16)
    call.maps[0][0, 1, 4, 2] = torch.nan
    call.maps[1][0, 2, 0, 0] = torch.inf
    call.check(torch.bfloat16)
    assert_identical(call(), node_by_node(call))


def test_one_launch(emulated, monkeypatch):
    for op, nodes in (("bifpn", None), ("head", 3), ("separable_conv", 1)):
        call = sample(op)
        count, result = count_launches(emulated, call)
        assert count == 1
        for launch in ("nodes", "pdl"):
            monkeypatch.setenv("EDET_CUDA_LAUNCH", launch)
            count, other = count_launches(emulated, call)
            assert count == (nodes or len(call.options["nodes"]))
            assert_identical(other, result)
        monkeypatch.setenv("EDET_CUDA_LAUNCH", "persistent")


def test_a_launch_without_a_wish_is_node_by_node(emulated, monkeypatch):
    monkeypatch.delenv("EDET_CUDA_LAUNCH")
    call = sample("bifpn")
    assert count_launches(emulated, call)[0] == len(call.options["nodes"])
    monkeypatch.setenv("EDET_CUDA_LAUNCH", "one")
    with pytest.raises(RuntimeError, match="EDET_CUDA_LAUNCH must be auto, nodes, pdl or persi"):
        call()


def test_node_launches_overlap_where_the_gpu_can(emulated, turing, monkeypatch):
    """The first may not: what came before it is not known."""
    monkeypatch.delenv("EDET_CUDA_LAUNCH")
    call = sample("bifpn")
    rest = len(call.options["nodes"]) - 1
    count_launches(emulated, call)
    assert [launch["pdl"] for launch in emulated.launches()] == [False] * (rest + 1)
    emulated.set_device(4, 227 * 1024, 90)
    count_launches(emulated, call)
    assert [launch["pdl"] for launch in emulated.launches()] == [False] + [True] * rest


def test_all_cells_of_d7x_are_one_launch(emulated):
    graph = bifpn_graph((9, 8), levels=6, cells=8)
    call = sample("bifpn", batch=1, channels=8, graph=graph, fusion="sum")
    count, result = count_launches(emulated, call)
    assert (len(graph.nodes), count) == (80, 1)
    assert_identical(result, node_by_node(call))


def test_a_graph_that_one_launch_cannot_hold(emulated):
    chain = Graph([(4, 3)], [(i,) for i in range(81)], [(4, 3)] * 81, [81])
    call = sample("bifpn", batch=1, channels=4, graph=chain)
    count, result = count_launches(emulated, call)
    assert count == 81
    assert_identical(result, node_by_node(call))
    # a max pool of stride 300
    call = sample("bifpn", batch=1, channels=4, graph=Graph([(300, 1)], [(0,)], [(1, 1)], [1]))
    call.check(torch.float32)


def test_any_graph():
    # maps on several edges, nodes that nobody reads, outputs in the middle and in another order
    graph = Graph(
        [(17, 12), (5, 3)],
        [(0, 0, 1), (2, 1), (2, 2), (3, 2, 1), (0,), (5, 4)],
        [(9, 6), (17, 12), (9, 6), (5, 3), (9, 6), (17, 12)],
        [7, 3, 5],
    )
    call = sample("bifpn", torch.float16, graph=graph)
    call.check(torch.float16)
    assert_identical(call(), node_by_node(call))


@dtypes
def test_a_head_with_a_wide_prediction(emulated, dtype):
    # 300 columns are three slices of a block that is made for 24
    make = sample("head", dtype)
    wide = sample("separable_conv", dtype, out_channels=300).weights
    weights = [[*parts[:-1], last] for parts, last in zip(make.weights, wide, strict=True)]
    call = type(make)("head", make.maps, tuple(weights))
    call.check(dtype)
    assert_identical(call(), layer_by_layer(call))


@dtypes
def test_little_shared_memory(emulated, dtype):
    emulated.set_device(4, 64 * 1024)  # weights stream
    call = sample("bifpn", dtype, channels=200, graph=bifpn_graph((9, 6), levels=2, cells=1))
    assert_identical(call(), node_by_node(call))


def sweep(emulated, dtype, seeds, residents):
    graph = bifpn_graph((18, 11), levels=4, cells=2)
    call = sample("bifpn", dtype, channels=16, graph=graph)
    expected = node_by_node(call)
    emulated.set_device(16, 227 * 1024)  # 32 blocks: more than run together
    for resident in residents:
        emulated.set_resident(resident)
        for seed in seeds:
            emulated.set_seed(seed)
            assert_identical(call(), expected)


def test_orders_of_blocks(emulated):
    sweep(emulated, torch.float16, range(2), (1, 2, 3, 7, 32))


@pytest.mark.slow
@dtypes
def test_many_orders_of_blocks(emulated, dtype):
    # what blocks wait for is the same for all dtypes, so that each has a third of the orders
    sweep(emulated, dtype, range(DTYPES.index(dtype), 20, 3), (1, 2, 3, 7, 13, 32))


@dtypes
@pytest.mark.parametrize("channels", [136, 141])
def test_a_wide_node_is_two_launches(emulated, monkeypatch, channels, dtype):
    """One up to the depthwise convolution and one that projects; bit for bit what one computes."""
    graph = bifpn_graph((5, 4), levels=2, cells=1)
    call = sample("bifpn", dtype, batch=1, channels=channels, graph=graph)
    nodes = len(graph.nodes)
    count, whole = count_launches(emulated, call)
    assert count == 1
    monkeypatch.setenv("EDET_CUDA_LAUNCH", "nodes")
    count, result = count_launches(emulated, call)
    packs = sum(launch["kernel"] == "Packing" for launch in emulated.launches())
    assert packs == (dtype != torch.float32 and channels % 8 == 0)  # weights for gemm.cu
    assert count == packs + 2 * nodes
    assert_identical(result, whole)
    assert [launch["pdl"] for launch in emulated.launches()] == [False] * count
    monkeypatch.setenv("EDET_CUDA_LAUNCH", "pdl")
    overlapping, result = count_launches(emulated, call)
    assert overlapping == count
    assert_identical(result, whole)
    assert [launch["pdl"] for launch in emulated.launches()] == [False] + [True] * (count - 1)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("channels", [136, 160, 192])
@pytest.mark.parametrize("size", [(33, 47), (23, 14), (5, 70)], ids=str)
def test_wide_nodes_of_many_pixels_go_down_strips(emulated, monkeypatch, size, channels, dtype):
    """Bit for bit what one launch computes, non-finite numbers included."""
    emulated.set_device(1, 227 * 1024)
    call = sample("bifpn", dtype, batch=2, channels=channels, graph=bifpn_graph(size, 3, 1))
    call.maps[0][0, 1, 4, 2] = torch.nan
    call.maps[1][1, channels - 1, 0, 0] = torch.inf
    whole = call()
    monkeypatch.setenv("EDET_CUDA_LAUNCH", "nodes")
    result = count_launches(emulated, call)[1]
    assert "StripPlan" in {launch["kernel"] for launch in emulated.launches()}
    assert_identical(result, whole)
    call.check(dtype)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_strips_of_several_levels(emulated, monkeypatch, dtype):
    emulated.set_device(1, 227 * 1024)
    sizes = [(19, 31), (10, 16), (5, 8), (1, 1)]
    call = sample("separable_conv", dtype, channels=160, sizes=sizes)
    whole = call()
    monkeypatch.setenv("EDET_CUDA_LAUNCH", "nodes")
    result = count_launches(emulated, call)[1]
    assert "StripPlan" in {launch["kernel"] for launch in emulated.launches()}
    assert_identical(result, whole)
    call.check(dtype)
