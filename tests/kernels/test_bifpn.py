"""Whole feature networks in one call: real BiFPNs, random graphs, and the reuse of buffers."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from edet_kernels.testing.numeric import assert_identical
from edet_kernels.testing.samples import DTYPES, Graph, bifpn_graph, sample
from plain_bifpn import node_by_node

pytestmark = pytest.mark.usefixtures("kernels_only")
dtypes = pytest.mark.parametrize("dtype", DTYPES, ids=str)


@dtypes
@pytest.mark.parametrize(
    ("size", "levels", "cells", "channels", "fusion"),
    [
        ((16, 16), 5, 3, 64, "fast"),  # D0 at 128×128
        ((12, 20), 5, 4, 88, "softmax"),  # D1, not square
        ((13, 7), 5, 2, 112, "unbounded"),  # odd sizes all the way down
        ((36, 36), 6, 8, 24, "sum"),  # D7x: six levels down to 2×2, eight cells
        ((1, 1), 5, 2, 16, "fast"),
    ],
)
def test_efficientdet_graphs(size, levels, cells, channels, fusion, dtype):
    graph = bifpn_graph(size, levels, cells)
    call = sample("bifpn", dtype, batch=1, channels=channels, graph=graph, fusion=fusion)
    call.check(dtype)
    assert_identical(call(), node_by_node(call))


def test_graph_of_a_cell():
    # figure 3 of the paper, levels P3 to P7: 4 nodes down, 4 nodes up
    graph = bifpn_graph((64, 64), levels=5, cells=1)
    assert graph.nodes == [
        (3, 4),
        (2, 5),
        (1, 6),
        (0, 7),
        (1, 7, 8),
        (2, 6, 9),
        (3, 5, 10),
        (4, 11),
    ]
    assert graph.outputs == [8, 9, 10, 11, 12]


@dtypes
@pytest.mark.parametrize("thread_count", [1, 2])
def test_buffers_are_reused_without_harm(dtype, thread_count, threads):
    threads(thread_count)
    graph = bifpn_graph((34, 41), levels=3, cells=12)
    call = sample("bifpn", dtype, channels=16, graph=graph, pre_activation="none")
    assert_identical(call(), node_by_node(call))


def test_buffers_of_a_smaller_call_are_not_mistaken():
    small = sample("bifpn", channels=8, graph=bifpn_graph((9, 6), levels=3, cells=3))
    large = sample("bifpn", channels=40, graph=bifpn_graph((34, 41), levels=4, cells=3))
    expected = [node_by_node(call) for call in (small, large)]
    for _ in range(3):
        assert_identical([call() for call in (small, large)], expected)


@dtypes
def test_outputs_in_the_middle_of_the_graph(dtype):
    full = bifpn_graph((17, 12), levels=4, cells=3)
    first = len(full.input_sizes)
    # every node, in an order of its own: none of them may share a buffer
    outputs = list(range(first + len(full.nodes) - 1, first - 1, -1))
    call = sample("bifpn", dtype, graph=Graph(full.input_sizes, full.nodes, full.sizes, outputs))
    call.check(dtype)
    everything = call()
    for subset in ([first], [first + 5, first + 1], [outputs[0], first + 3]):
        call.options["outputs"] = subset
        assert_identical(call(), [everything[outputs.index(o)] for o in subset])


def test_nodes_that_nobody_reads():
    graph = Graph([(9, 6)], [(0,), (0, 0), (0,), (2,)], [(9, 6)] * 4, [4])
    call = sample("bifpn", graph=graph)
    assert_identical(call(), node_by_node(call))


def test_one_map_on_several_edges():
    graph = Graph([(9, 6), (5, 3)], [(0, 0, 1), (2, 2), (3, 2, 3, 1)], [(9, 6)] * 3, [3, 4])
    call = sample("bifpn", graph=graph)
    call.check(torch.float32)
    assert_identical(call(), node_by_node(call))


@pytest.mark.parametrize("per_channel", [False, True])
def test_weights_of_absent_edges_are_ignored(per_channel):
    call = sample("bifpn", per_channel=per_channel)
    expected = call()
    for i, edges in enumerate(call.options["nodes"]):
        call.weights[0][i, len(edges) :] = torch.nan
    assert_identical(call(), expected)


@st.composite
def graphs(draw):
    """Networks whose nodes fuse any earlier maps, whatever their level."""
    side = st.integers(1, 40)
    extents = bifpn_graph((draw(side), draw(side)), levels=4, cells=0).input_sizes
    levels = st.integers(0, 3)
    input_sizes = [extents[i] for i in draw(st.lists(levels, min_size=1, max_size=4))]
    nodes, sizes = [], []
    for _ in range(draw(st.integers(1, 12))):
        known = len(input_sizes) + len(nodes)
        # mostly recent maps, so that others are no longer needed and their buffers are reused
        edge = st.integers(max(0, known - 4), known - 1) | st.integers(0, known - 1)
        nodes.append(tuple(draw(st.lists(edge, min_size=1, max_size=4))))
        sizes.append(extents[draw(levels)])
    node_ids = range(len(input_sizes), len(input_sizes) + len(nodes))
    outputs = draw(st.lists(st.sampled_from(node_ids), min_size=1, unique=True))
    return Graph(input_sizes, nodes, sizes, outputs)


@settings(max_examples=60, deadline=None, derandomize=True)
@given(
    graph=graphs(),
    channels=st.integers(1, 40),
    dtype=st.sampled_from(DTYPES),
    fusion=st.sampled_from(["fast", "softmax", "unbounded", "sum"]),
    pool=st.sampled_from(["same", "symmetric"]),
    batch=st.integers(1, 2),
    seed=st.integers(0, 2**32),
    thread_count=st.integers(1, 3),
)
def test_random_graphs(graph, channels, dtype, fusion, pool, batch, seed, thread_count):
    torch.manual_seed(seed)
    options = {"graph": graph, "channels": channels, "fusion": fusion, "pool": pool}
    call = sample("bifpn", dtype, batch=batch, **options)
    call.check(dtype)
    torch.set_num_threads(thread_count)
    try:
        assert_identical(call(), node_by_node(call))
    finally:
        torch.set_num_threads(1)
