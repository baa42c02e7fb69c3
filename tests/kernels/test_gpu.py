"""Every op's CUDA kernel on a GPU against the fp64 reference; needs an NVIDIA GPU."""

import pytest
import torch
from op_utils import DTYPES, SAMPLES, Call, assert_identical, map_tree, sample

from edet_kernels import explain
from edet_kernels.backend import TF32_OPS

pytestmark = [pytest.mark.gpu]
dtypes = pytest.mark.parametrize("dtype", DTYPES, ids=str)
all_ops = pytest.mark.parametrize("op", SAMPLES)


@pytest.fixture(autouse=True)
def cuda_only(monkeypatch):
    """Runs no reference in the place of a kernel, and eager without tf32."""
    monkeypatch.setenv("EDET_BACKEND", "cuda")
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)


def on_gpu(call: Call) -> Call:
    moved = [map_tree(torch.Tensor.cuda, part) for part in (call.maps, call.weights, call.options)]
    return Call(call.op, *moved)


@dtypes
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
    assert {c.op for c in explain("cuda") if "TF32 products" in c.reason} == set(TF32_OPS)
    on_gpu(sample(op, channels=72)).check_tf32()


@dtypes
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
