"""Every op's CUDA kernel on a GPU against the fp64 reference; needs an NVIDIA GPU."""

import threading

import pytest
import torch

import edet_kernels
from backends import BACKENDS, BLOCK_OPS
from edet_kernels import explain
from edet_kernels.backend import has_kernel
from edet_kernels.names import MAP_OPS, TF32_OPS
from edet_kernels.testing.numeric import assert_identical
from edet_kernels.testing.samples import DTYPES, SAMPLES, Call, bifpn_graph, map_tree, sample

pytestmark = [pytest.mark.gpu]
dtypes = pytest.mark.parametrize("dtype", DTYPES, ids=str)
#: Ops that have CUDA kernels: what is emulated elsewhere, by name, so that none can go missing.
CUDA_OPS = [op for op in SAMPLES if op not in BACKENDS["emulated"].lacks]
# nms takes and gives float32 whatever the maps are
all_ops = pytest.mark.parametrize(
    ("op", "dtype"),
    [(op, dtype) for op in CUDA_OPS for dtype in (DTYPES[:1] if op == "nms" else DTYPES)],
    ids=str,
)


@pytest.fixture(autouse=True)
def cuda_only(monkeypatch):
    """Runs no reference in the place of a kernel, and eager without tf32."""
    monkeypatch.setenv("EDET_BACKEND", "cuda")
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)


@pytest.fixture(autouse=True)
def poisoned():
    """Lets torch's allocator hand out memory that is full of NaN: a pixel not written shows."""
    small = [torch.full((2**17,), torch.nan, device="cuda") for _ in range(32)]
    large = [torch.full((2**22,), torch.nan, device="cuda") for _ in range(4)]
    del small, large


def on_gpu(call: Call) -> Call:
    moved = [map_tree(torch.Tensor.cuda, part) for part in (call.maps, call.weights, call.options)]
    return Call(call.op, *moved)


def test_the_library_has_the_kernels_that_are_tested():
    assert [op for op in SAMPLES if has_kernel(op, "cuda")] == CUDA_OPS


@all_ops
def test_sanitize(op, dtype):  # the part that compute-sanitizer runs
    on_gpu(sample(op, dtype)).check(dtype)


@dtypes
@pytest.mark.parametrize("channels", [16, 64, 88, 112, 160, 384, 640])
@pytest.mark.parametrize("op", ["fusion_node", "separable_conv", "lateral"])
def test_channels(op, channels, dtype):
    on_gpu(sample(op, dtype, channels=channels)).check(dtype)


@pytest.mark.parametrize("op", TF32_OPS)
def test_sanitize_tf32(op, monkeypatch):
    if torch.cuda.get_device_capability() < (8, 0):
        pytest.skip("needs compute capability 8.0")
    monkeypatch.setattr(torch.backends.cuda.matmul, "fp32_precision", "tf32")
    monkeypatch.setenv("EDET_BACKEND", "auto")  # not all ops have a CUDA kernel to be explained
    assert {c.op for c in explain("cuda") if "TF32 products" in c.reason} == set(TF32_OPS)
    monkeypatch.setenv("EDET_BACKEND", "cuda")
    on_gpu(sample(op, channels=72)).check_tf32()


# forward by the CUDA kernels, backward and training by Triton's, where there is one
@dtypes
@pytest.mark.parametrize("op", [op for op in MAP_OPS if op not in BLOCK_OPS])
def test_gradients(op, dtype, monkeypatch):
    monkeypatch.setenv("EDET_BACKEND", "auto")
    on_gpu(sample(op, dtype)).check_gradients(dtype)


@all_ops
def test_results_are_the_same_from_run_to_run(op, dtype):
    call = on_gpu(sample(op, dtype))
    expected = call()
    for _ in range(3):
        assert_identical(call(), expected)


@pytest.mark.parametrize("op", ["fusion_node", "separable_conv", "bifpn", "detect"])
def test_cuda_graph(op):
    call = on_gpu(sample(op, torch.float16))
    expected = call()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        found = call()
    graph.replay()
    torch.cuda.synchronize()
    assert_identical(found, expected)


@dtypes
@pytest.mark.parametrize("kind", ["normal", "narrow", "equal"])
def test_millions_of_logits(kind, dtype):
    """Of D0's first level; those of an untrained network are too many alike to be listed."""
    torch.manual_seed(0)
    n, side, anchors, classes = 3, 64, 9, 90
    logits = torch.randn(n, side, side, anchors * classes)
    if kind != "normal":
        logits[1:] = -4.6 + (0.003 * logits[1:] if kind == "narrow" else 0)
    logits = logits.permute(0, 3, 1, 2).to(dtype)
    boxes = (0.1 * torch.randn(n, side, side, 4 * anchors)).permute(0, 3, 1, 2).to(dtype)
    corner = 500 * torch.rand(side * side * anchors, 2)
    anchor_boxes = torch.cat([corner, corner + 30], 1)
    found = edet_kernels.detect([logits.cuda()], [boxes.cuda()], anchor_boxes.cuda())
    with edet_kernels.backend("reference"):
        expected = edet_kernels.detect([logits], [boxes], anchor_boxes)
    found = tuple(t.cpu() for t in found)
    assert_identical(found[2:], expected[2:])
    torch.testing.assert_close(found[:2], expected[:2], rtol=1e-5, atol=1e-3)


# --- graphs of nodes: EDET_CUDA_LAUNCH ------------------------------------------------------------

launches = pytest.mark.parametrize("launch", ["nodes", "pdl", "persistent"])


def pyramid(monkeypatch, launch, dtype=torch.float16, **options):
    """A BiFPN as node launches compute it, and its call by ``launch``."""
    options = {"batch": 1, "channels": 64, "graph": bifpn_graph((64, 64), 5, 3), **options}
    call = on_gpu(sample("bifpn", dtype, **options))
    monkeypatch.setenv("EDET_CUDA_LAUNCH", "nodes")
    expected = call()
    torch.cuda.synchronize()
    monkeypatch.setenv("EDET_CUDA_LAUNCH", launch)
    return call, expected


@dtypes
@launches
@pytest.mark.parametrize("op", ["bifpn", "head"])
def test_sanitize_launches(monkeypatch, op, launch, dtype):
    monkeypatch.setenv("EDET_CUDA_LAUNCH", launch)
    on_gpu(sample(op, dtype)).check(dtype)


@dtypes
@launches
@pytest.mark.parametrize(
    "options",
    [
        {},  # D0
        {"batch": 8},
        {"channels": 88, "graph": bifpn_graph((75, 57), 5, 4), "fusion": "softmax"},
        {"channels": 384, "graph": bifpn_graph((48, 48), 6, 8), "fusion": "sum"},  # D7x's nodes
    ],
    ids=["D0", "batch 8", "odd sizes", "D7x's nodes"],
)
def test_every_launch_computes_the_same(monkeypatch, launch, dtype, options):
    call, expected = pyramid(monkeypatch, launch, dtype, **options)
    for _ in range(20):
        assert_identical(call(), expected)


@launches
def test_a_captured_graph_can_be_replayed(monkeypatch, launch):
    call, expected = pyramid(monkeypatch, launch)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        found = call()
    for _ in range(20):
        for x in found:
            x.fill_(torch.nan)
        graph.replay()
        torch.cuda.synchronize()
        assert_identical(found, expected)


@launches
def test_streams_overlap(monkeypatch, launch):
    call, expected = pyramid(monkeypatch, launch, batch=4)
    streams = [torch.cuda.Stream() for _ in range(3)]
    torch.cuda.synchronize()
    found = []
    for i in range(30):
        with torch.cuda.stream(streams[i % 3]):
            found.append(call())
    torch.cuda.synchronize()
    for result in found:
        assert_identical(result, expected)


@launches
def test_threads_overlap(monkeypatch, launch):
    call, expected = pyramid(monkeypatch, launch)
    found = {}

    def work(name):
        with torch.inference_mode(), torch.cuda.stream(torch.cuda.Stream()):
            found[name] = [call() for _ in range(20)]
            torch.cuda.current_stream().synchronize()

    torch.cuda.synchronize()
    workers = [threading.Thread(target=work, args=(name,)) for name in range(4)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert len(found) == 4
    for results in found.values():
        for result in results:
            assert_identical(result, expected)
