"""The kernel for nodes of few channels and many pixels, on the host.

What ``test_fusion_node.py`` and ``test_bifpn.py`` test of nodes, on maps that are large enough.
"""

import pytest
import torch

from benchmarks.gpu_model.launches import Recorder
from edet_kernels.testing.numeric import assert_identical
from edet_kernels.testing.samples import Graph, sample

pytestmark = pytest.mark.usefixtures("emulated")
dtypes = pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
#: Of a batch of two the fewest pixels that it is for; no row or column of tiles is whole.
SIZE = (64, 65)
#: Maps of the node's size, enlarged and pooled, by the kind of node.
KINDS = {
    "enlarged": [SIZE, (32, 33)],
    "pooled": [SIZE, (127, 130)],
    "pooled with a skip": [SIZE, SIZE, (128, 130)],
}
kinds = pytest.mark.parametrize("sizes", KINDS.values(), ids=list(KINDS))


def node(dtype, sizes, channels=64, out_channels=64, **options):
    return sample("fusion_node", dtype, channels=channels, out_channels=out_channels, sizes=sizes,
                  size=sizes[0], **options)  # fmt: skip


def layer(dtype, sizes, channels=64, out_channels=64, **options):
    return sample("separable_conv", dtype, channels=channels, out_channels=out_channels,
                  sizes=sizes, **options)  # fmt: skip


def kernels(call):
    """The kernels that a call launches, without what they are compiled for."""
    with Recorder() as recorder:
        call()
    return [launch.kernel.split("<")[0] for one in recorder.calls for launch in one.launches]


@dtypes
@kinds
@pytest.mark.parametrize(("channels", "out_channels"), [(64, 64), (40, 24), (8, 12)])
def test_nodes(channels, out_channels, sizes, dtype):
    call = node(dtype, sizes, channels, out_channels)
    assert kernels(call) == ["narrow_node"]
    call.check(dtype)


@dtypes
@pytest.mark.parametrize("activation", ["none", "swish", "relu6"])
def test_layers_on_all_levels(activation, dtype):
    # one block has tiles of several levels, each with its own batch norm
    call = layer(dtype, [SIZE, (9, 17), (1, 1), (8, 16)], activation=activation)
    assert kernels(call) == ["narrow_node"]
    call.check(dtype)


def test_a_prediction_of_boxes():
    # 36 channels: pixels of the result begin at 8 bytes
    call = layer(torch.float16, [SIZE, (9, 17)], out_channels=36, activation="none")
    assert kernels(call) == ["narrow_node"]
    call.check(torch.float16)


@pytest.mark.parametrize("fusion", ["fast", "softmax", "unbounded", "sum"])
@pytest.mark.parametrize("pool", ["same", "symmetric"])
def test_fusion_methods(fusion, pool):
    # "symmetric" begins a window of an even map inside of it
    call = node(torch.float16, KINDS["pooled with a skip"], 24, 24, fusion=fusion, pool=pool)
    assert kernels(call) == ["narrow_node"]
    call.check(torch.float16)


@kinds
@pytest.mark.parametrize(
    ("value", "dtype"),
    [(torch.nan, torch.float16), (torch.inf, torch.float16), (-torch.inf, torch.bfloat16)],
)
def test_numbers_that_are_not_finite(value, dtype, sizes):
    """Products with the zeros of a diagonal matrix must not spread them over other channels."""
    call = node(dtype, sizes, 24, 24)
    for x in call.maps:
        x[0, 1, x.shape[2] // 2, x.shape[3] // 3] = value
        x[1, 2, 0, -1] = value
    assert kernels(call) == ["narrow_node"]
    call.check(dtype)


@pytest.mark.parametrize(
    ("fusion", "weights"),
    [("fast", [0.5, -0.25]), ("fast", [0.0, 1.0]), ("softmax", [-3.0, 0.5]),
     ("unbounded", [-1.0, 0.0])],
)  # fmt: skip
def test_edge_weights_at_zero_and_below(fusion, weights):
    sizes = KINDS["enlarged"]
    call = node(torch.float16, sizes, 16, 16, fusion=fusion, edge_weights=torch.tensor(weights))
    assert kernels(call) == ["narrow_node"]
    call.check(torch.float16)


@kinds
def test_subnormal_maps(sizes):
    call = node(torch.float16, sizes, 16, 16)
    for x in call.maps:
        x.mul_(2**-20)
    assert all(x.abs().max() < torch.finfo(torch.float16).tiny for x in call.maps)
    assert kernels(call) == ["narrow_node"]
    call.check(torch.float16)


@dtypes
def test_layers_of_numbers_that_are_not_finite(dtype):
    call = layer(dtype, [SIZE], 16, 16)
    call.maps[0][1, 3, 5, 7] = torch.inf
    call.maps[0][0, 15, 63, 64] = torch.nan
    assert kernels(call) == ["narrow_node"]
    call.check(dtype)


def test_a_sum_that_overflows():
    call = node(torch.float16, KINDS["enlarged"], 16, 16, fusion="sum")
    for x in call.maps:
        x[1, 2, 3:5, 3:5] = 6e4
    assert kernels(call) == ["narrow_node"]
    call.check(torch.float16)


@kinds
def test_results_do_not_depend_on_the_order_of_threads(emulated, sizes):
    call = node(torch.float16, sizes, 16, 16)
    expected = call()
    for seed in (1, 2):
        emulated.set_seed(seed)
        assert_identical(call(), expected)
    emulated.set_seed(0)


@pytest.mark.parametrize("kib", [227, 163, 99, 64], ids=str)
def test_a_patch_or_two(emulated, kib):
    """Where two patches leave room for one block only, a tile waits for the one before."""
    calls = [node(torch.float16, KINDS["enlarged"]), layer(torch.bfloat16, [SIZE, (32, 33)])]
    expected = [call() for call in calls]
    emulated.set_device(4, kib * 1024, 80)
    for call, result in zip(calls, expected, strict=True):
        assert kernels(call) == ["narrow_node"]
        assert_identical(call(), result)


@pytest.mark.parametrize(
    ("channels", "out_channels", "size", "dtype"),
    [(72, 64, SIZE, torch.float16), (64, 72, SIZE, torch.float16), (63, 64, SIZE, torch.float16),
     (64, 62, SIZE, torch.float16), (64, 64, (63, 65), torch.float16),
     (64, 64, SIZE, torch.float32)],
)  # fmt: skip
def test_what_it_is_not_for(channels, out_channels, size, dtype):
    sizes = [size, (-(-size[0] // 2), -(-size[1] // 2))]
    assert kernels(node(dtype, sizes, channels, out_channels)) == ["node"]


def test_factors_for_each_channel():
    call = node(torch.float16, KINDS["enlarged"], 16, 16, per_channel=True)
    assert kernels(call) == ["node"]


def test_turing(turing):
    assert kernels(node(torch.float16, KINDS["enlarged"], 16, 16)) == ["node"]


def test_one_launch_of_a_graph_is_of_other_nodes(monkeypatch):
    """Or the ways of launching a graph would differ in their last bits."""
    graph = Graph([SIZE, (32, 33)], [(0, 1), (2,)], [SIZE, SIZE], [3])
    call = sample("bifpn", torch.float16, channels=16, graph=graph)
    results = []
    for launch in ("nodes", "pdl", "persistent"):
        monkeypatch.setenv("EDET_CUDA_LAUNCH", launch)
        assert kernels(call)[0] == "narrow_node"
        results.append(call())
    for result in results:
        assert_identical(result, results[0])


def test_traffic(emulated):
    """A tile asks for itself and its halo, and writes its pixels once."""
    call = layer(torch.float16, [(64, 64)])
    emulated.count_launches(True)
    call()
    emulated.count_launches(False)
    (launch,) = emulated.launches()
    size, blocks = call.maps[0].numel() * 2, launch["grid"][0]
    assert 32 * launch["sectors_written"] == size
    weights = 4 * 64 * (9 + 64 + 2) * blocks
    assert 32 * launch["sectors_read"] <= 10 * 18 / (8 * 16) * size + weights
    assert 32 * launch["sectors_read"] >= size
