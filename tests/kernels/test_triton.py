"""What only the Triton kernels have: launches, configurations, their operators, being chosen.

``test_ops.py`` and ``test_autograd.py`` compare their results and gradients with the reference's.
"""

from __future__ import annotations

import math
import os
import subprocess
import sys

import pytest
import torch

import edet_kernels
from backends import BACKENDS
from edet_kernels import BackendError, explain, operators
from edet_kernels.testing.numeric import assert_identical
from edet_kernels.testing.samples import DTYPES, gradients, sample

pytest.importorskip("triton")

from edet_kernels.names import TRITON_OPS
from edet_kernels.triton import configs

backend_module = sys.modules["edet_kernels.backend"]

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
OPS = TRITON_OPS
#: Those that have backward kernels.
GRADIENT_OPS = ("weighted_fusion", "fusion_node", "separable_conv", "lateral", "training_node")

pytestmark = [
    # NaN and infinity are meant, and lanes outside a map hold anything
    pytest.mark.filterwarnings("ignore::RuntimeWarning:triton"),
    pytest.mark.filterwarnings("ignore:TRITON_DEFAULT_FP_FUSION"),
]


@pytest.fixture
def triton(monkeypatch):
    """Every op runs on Triton with the configurations of configs.json; gives the backend."""
    monkeypatch.setenv("EDET_BACKEND", "triton")
    with torch.device(DEVICE):
        yield BACKENDS["triton"]


on_triton = pytest.mark.parametrize("backend", ["triton"], indirect=True)


# Launches.


@pytest.mark.parametrize("op", GRADIENT_OPS)
def test_many_programs(triton, op):
    # the last tile of pixels is not full, and tiles go from one image to the next
    sizes = {"size": (5, 3)} if op == "lateral" else {"sizes": [(5, 3), (3, 2)]}
    triton.sample(op, batch=3, channels=17, **sizes).check(torch.float32)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_many_tiles_of_output_channels(triton, dtype):
    triton.sample("separable_conv", dtype, sizes=[(3, 2)], out_channels=270).check(dtype)
    triton.sample("lateral", dtype, size=(3, 2), out_channels=(130, 8, 33)).check(dtype)


def test_gradients_of_many_programs(triton):
    options = {"sizes": [(5, 4), (2, 1)], "channels": 17, "out_channels": 20}
    triton.sample("separable_conv", **options).check_gradients(torch.float32)
    triton.sample("training_node", nodes=2, **options).check_gradients(torch.float32)


@on_triton
def test_a_node_in_two_launches(backend):
    call = backend.sample("fusion_node")
    config = configs.find("fusion_node", call.maps[0], 24, 15)
    with configs.forced({"fusion_node": {**config, "launches": 2}}):
        call.check(torch.float32)


@on_triton
def test_padding_is_zero_whatever_the_weights(backend):
    # ∞ · 0 outside the image would be NaN everywhere; where it is inside, the reference has it too
    call = backend.sample("fusion_node", fusion="unbounded", pre_activation="none")
    call.weights[0].fill_(math.inf)
    call.maps[0].abs_()
    call.check(torch.float32)


@on_triton
def test_gradients_of_projections_of_different_widths(backend):
    backend.sample("lateral", out_channels=(7, 64, 40), pooled=0).check_gradients(torch.float32)


@on_triton
def test_gradients_are_the_same_every_time(backend):
    call = backend.sample("lateral")
    function = edet_kernels.lateral
    once, again = (gradients(call, function, torch.float32) for _ in range(2))
    assert_identical(once, again)


@on_triton
def test_compile_without_graph_breaks(backend):
    call = backend.sample("weighted_fusion")
    torch.compiler.reset()
    compiled = torch.compile(lambda maps: call(maps) * 2, backend="aot_eager", fullgraph=True)
    assert_identical(compiled(call.maps), call() * 2)


# Being chosen.


@pytest.fixture
def fresh(monkeypatch):
    """Forgets earlier choices, before and after."""
    monkeypatch.delenv("EDET_BACKEND", raising=False)
    for clear in (backend_module._refusal.cache_clear, backend_module._load_triton.cache_clear):
        clear()
    yield
    for clear in (backend_module._refusal.cache_clear, backend_module._load_triton.cache_clear):
        clear()


def test_a_request_is_met_or_refused(fresh):
    with edet_kernels.backend("triton"):
        assert edet_kernels.current_backend() == "triton"
        choice = backend_module.choose("lateral", torch.device(DEVICE))
        assert (choice.backend, choice.reason) == ("triton", "asked for")
        with pytest.raises(BackendError, match=r"^stem cannot run .*: there is no Triton"):
            sample("stem")()
        with pytest.raises(BackendError, match="the tensors are on meta"):
            backend_module.choose("lateral", torch.device("meta"))
        with pytest.raises(BackendError, match="float16 or bfloat16, not float64"):
            backend_module.choose("lateral", torch.device(DEVICE), torch.float64)


def test_cpu_tensors_need_the_interpreter(fresh, monkeypatch):
    has_kernel = backend_module.has_kernel

    def uninterpreted(op, device, namespace="edet_kernels"):
        return namespace != "edet_kernels_triton" and has_kernel(op, device, namespace)

    monkeypatch.setattr(backend_module, "has_kernel", uninterpreted)
    with (
        edet_kernels.backend("triton"),
        pytest.raises(BackendError, match="set TRITON_INTERPRET=1 before"),
    ):
        sample("lateral")()
    assert backend_module.choose("lateral", torch.device("cpu")).backend == "cpu"


def test_triton_serves_where_the_library_has_no_cuda_kernel(fresh, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (9, 0))
    monkeypatch.setattr(
        backend_module.library, "cuda_refusal", lambda capability: "no machine code"
    )
    choices = {choice.op: choice for choice in explain("cuda")}
    for op in OPS:
        assert choices[op].backend == "triton"
        assert choices[op].reason == "Triton kernel; no compiled one: no machine code"
        assert backend_module._namespace(op, "cuda", torch.float32) == "edet_kernels_triton"
    assert choices["nms"].backend == "reference"
    assert choices["nms"].reason == "no machine code; Triton: there is no Triton kernel for it"


def test_triton_is_the_backward_of_cuda_kernels(monkeypatch):
    monkeypatch.setattr(operators, "triton_serves", lambda op: True)
    for op in ("weighted_fusion", "lateral", "training_node"):
        kernel = f"{op}_backward"
        found = operators._backward_namespace("edet_kernels", op, kernel, "cuda")
        assert found == "edet_kernels_triton"
        assert backend_module.has_kernel(kernel, "cuda", found)
    found = operators._backward_namespace("edet_kernels", "lateral", "lateral_backward", "cpu")
    assert found == ""


def test_an_old_gpu_is_refused(fresh, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (7, 5))
    with (
        edet_kernels.backend("triton"),
        pytest.raises(BackendError, match=r"capability 8\.0, this GPU has 7\.5"),
    ):
        backend_module.choose("lateral", torch.device("cuda"))


def test_without_triton():
    code = """
import sys
sys.modules["triton"] = None
import torch, edet_kernels
x = torch.ones(1, 8, 4, 4)
print(edet_kernels.weighted_fusion([x, x], fusion="sum").sum().item())
with edet_kernels.backend("triton"):
    try:
        edet_kernels.weighted_fusion([x], fusion="sum")
    except edet_kernels.BackendError as error:
        print(error)
"""
    environment = {**os.environ, "EDET_BACKEND": "auto"}
    output = subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True
    ).stdout.splitlines()
    assert output == [
        "256.0",
        "weighted_fusion cannot run on backend 'triton': the package triton is not installed: "
        "pip install 'edet-kernels[triton]'",
    ]
