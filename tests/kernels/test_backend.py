"""Which implementation runs: what is asked for, what is refused and why, and what is explained."""

import logging
import os
import re
import subprocess
import sys
import threading

import pytest
import torch

import edet_kernels
from edet_kernels import BackendError, backend, current_backend, explain, library
from edet_kernels.names import MAP_OPS, OPS, TF32_OPS, TRITON_OPS
from edet_kernels.testing.numeric import assert_identical
from edet_kernels.testing.samples import SAMPLES, cast, sample, tensors

backend_module = sys.modules["edet_kernels.backend"]  # the package has a function of this name
all_ops = pytest.mark.parametrize("op", SAMPLES)


@pytest.fixture(autouse=True)
def _nothing_asked_for(monkeypatch):
    monkeypatch.delenv("EDET_BACKEND", raising=False)


def test_samples_cover_every_op():
    assert set(SAMPLES) == set(OPS)


# Asking.


def test_auto_is_the_default():
    assert current_backend() == "auto"


def test_the_environment_variable_is_read_at_each_call(monkeypatch):
    for name in ("reference", "cpu", "auto"):
        monkeypatch.setenv("EDET_BACKEND", name)
        assert current_backend() == name


def test_the_innermost_context_wins(monkeypatch):
    monkeypatch.setenv("EDET_BACKEND", "cuda")
    with backend("cpu"):
        assert current_backend() == "cpu"
        with backend("reference"):
            assert current_backend() == "reference"
        assert current_backend() == "cpu"
        with backend("auto"):
            assert current_backend() == "auto"
    assert current_backend() == "cuda"


def test_the_context_ends_with_an_exception():
    with pytest.raises(KeyError), backend("reference"):
        raise KeyError
    assert current_backend() == "auto"


def test_a_context_is_its_own_threads():
    seen = []
    with backend("reference"):
        thread = threading.Thread(target=lambda: seen.append(current_backend()))
        thread.start()
        thread.join()
    assert seen == ["auto"]


@pytest.mark.parametrize("name", ["tpu", "", "CPU", None])
def test_unknown_names(name, monkeypatch):
    message = re.escape("must be one of auto, reference, cpu, cuda, triton, got " + repr(name))
    with pytest.raises(ValueError, match="^backend " + message), backend(name):
        pass
    if name is not None:
        monkeypatch.setenv("EDET_BACKEND", name)
        with pytest.raises(ValueError, match="^EDET_BACKEND " + message):
            sample("weighted_fusion")()


# Being refused.


@all_ops
def test_a_request_for_another_device_is_refused(op):
    with backend("cuda"), pytest.raises(BackendError) as error:
        sample(op)()
    assert str(error.value) == f"{op} cannot run on backend 'cuda': the tensors are on cpu"


@all_ops
def test_a_request_in_double_precision_is_refused(op):
    call = sample(op, **({"uint8": True} if op == "stem" else {}))
    options = dict(call.options, **({"dtype": torch.float64} if op == "stem" else {}))
    arguments = cast((call.maps, *call.weights), torch.float64)
    with backend("cpu"), pytest.raises(BackendError, match="float16 or bfloat16, not float64"):
        getattr(edet_kernels, op)(*arguments, **options)
    out = getattr(edet_kernels, op)(*arguments, **options)
    assert torch.float64 in {t.dtype for t in tensors(out)}


# Falling back.


@pytest.mark.parametrize("op", MAP_OPS)
def test_every_argument_that_needs_a_gradient_gets_one(op):
    # softmax: a negative weight has no gradient in fast fusion
    fused = ("weighted_fusion", "fusion_node", "bifpn", "training_node")
    fusion = {"fusion": "softmax"} if op in fused else {}
    call = sample(op, **fusion)
    arguments = (call.maps, call.weights, call.options)
    for leaf in tensors(arguments):
        leaf.requires_grad_()
        sum(out.square().mean() for out in tensors(call())).backward()
        assert leaf.grad is not None and leaf.grad.abs().sum() > 0
        leaf.requires_grad_(False)


@all_ops
def test_reference_and_kernel_are_one_op(op):
    call = sample(op)
    with backend("cpu"):
        kernel = call()
    with backend("reference"):
        reference = call()
    torch.testing.assert_close(kernel, reference, rtol=1e-4, atol=1e-4)


@all_ops
def test_auto_runs_the_kernel(op):
    call = sample(op)
    with backend("cpu"):
        kernel = call()
    assert_identical(call(), kernel)


@pytest.mark.parametrize("op", MAP_OPS)
def test_no_backend_returns_its_input(op):
    # a sum of one map is that map: even the reference must return a copy
    options = {"sizes": [(9, 6)], "fusion": "sum"} if op == "weighted_fusion" else {}
    call = sample(op, **options)
    addresses = {t.data_ptr() for t in tensors(call.maps)}
    for name in ("cpu", "reference"):
        with backend(name):
            assert not addresses & {t.data_ptr() for t in tensors(call())}


def test_falling_back_is_logged_once(caplog, monkeypatch):
    monkeypatch.setattr(sys.modules["edet_kernels.backend"], "_told", set())
    call = sample("weighted_fusion")
    with caplog.at_level(logging.DEBUG, "edet_kernels"):
        for _ in range(3):
            call(cast(call.maps, torch.float64))
    assert [record.levelname for record in caplog.records] == ["DEBUG"]
    assert caplog.messages[0].startswith("weighted_fusion runs its reference: its maps are float32")


# Explaining.


def test_explain_names_every_op():
    choices = explain()
    assert [c.op for c in choices] == list(OPS)
    assert {(c.backend, c.reason) for c in choices} == {("cpu", "compiled CPU kernel")}


def test_explain_gives_the_reason():
    assert {c.backend for c in explain(dtype=torch.float64)} == {"reference"}
    assert all("not float64" in c.reason for c in explain(dtype=torch.float64))
    assert all("device type meta" in c.reason for c in explain("meta"))
    with backend("reference"):
        assert {(c.backend, c.reason) for c in explain()} == {("reference", "asked for")}
    with backend("cpu"):
        assert {(c.backend, c.reason) for c in explain()} == {("cpu", "asked for")}


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_explain_a_missing_gpu():
    choices = explain("cuda")
    assert {c.backend for c in choices} == {"reference"}
    assert all(re.search("cuda|gpu", c.reason, re.IGNORECASE) for c in choices)


@pytest.mark.slow
def test_without_the_library():
    code = """
import torch, edet_kernels
x = torch.ones(1, 8, 4, 4)
print(edet_kernels.weighted_fusion([x, x], fusion="sum").sum().item())
print({c.backend for c in edet_kernels.explain()}, edet_kernels.explain()[0].reason)
with edet_kernels.backend("cpu"):
    try:
        edet_kernels.weighted_fusion([x], fusion="sum")
    except edet_kernels.BackendError as error:
        print(error)
"""
    environment = dict(os.environ, EDET_LIBRARY="0")
    output = subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True
    ).stdout.splitlines()
    reason = "the op library is switched off by EDET_LIBRARY=0"
    assert output == [
        "256.0",
        "{'reference'} " + reason,
        "weighted_fusion cannot run on backend 'cpu': " + reason,
    ]


# TF32.

ASK_FOR_TF32 = {
    "matmul.fp32_precision": lambda: setattr(torch.backends.cuda.matmul, "fp32_precision", "tf32"),
    "matmul.allow_tf32": lambda: setattr(torch.backends.cuda.matmul, "allow_tf32", True),
    "set_float32_matmul_precision": lambda: torch.set_float32_matmul_precision("high"),
    "fp32_precision": lambda: setattr(torch.backends, "fp32_precision", "tf32"),
}


@pytest.fixture
def ampere(monkeypatch):
    """As if the library had CUDA kernels and torch a GPU that can multiply TF32."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (8, 0))
    monkeypatch.setattr(library, "cuda_refusal", lambda capability: "")
    monkeypatch.setattr(backend_module, "has_kernel", lambda *arguments: True)
    caches = (backend_module._refusal, backend_module._has_tf32)
    before = (torch.backends.cuda.matmul.fp32_precision, torch.backends.fp32_precision)
    for cache in caches:
        cache.cache_clear()
    yield
    torch.backends.cuda.matmul.fp32_precision, torch.backends.fp32_precision = before
    for cache in caches:
        cache.cache_clear()


def tf32_ops(dtype=torch.float32):
    """The ops that run with TF32 products on a GPU; what they explain agrees."""
    found = {op for op in OPS if backend_module._namespace(op, "cuda", dtype).endswith("_tf32")}
    assert found == {c.op for c in explain("cuda", dtype) if "TF32 products" in c.reason}
    return found


@pytest.mark.parametrize("way", ASK_FOR_TF32)
def test_tf32_is_multiplied_where_torch_may(ampere, way):
    assert tf32_ops() == set()
    ASK_FOR_TF32[way]()
    assert tf32_ops() == set(TF32_OPS)
    assert tf32_ops(torch.float16) == set()
    with backend("cuda"):
        assert tf32_ops() == set(TF32_OPS)
    with backend("triton"):
        assert backend_module._namespace("head", "cuda", torch.float32) == "edet_kernels_triton"
    torch.backends.cuda.matmul.fp32_precision = "ieee"
    assert tf32_ops() == set()


@pytest.mark.parametrize("op", sorted(set(OPS) - set(TRITON_OPS)))
def test_only_what_triton_has_is_looked_for_there(ampere, op):
    """Whatever the first tensor is: the stem's is of bytes, which are no dtype of maps."""
    for dtype in (torch.uint8, torch.float32, torch.float64):
        assert backend_module._namespace(op, "cuda", dtype) == "edet_kernels"


def test_older_gpus_do_not_multiply_tf32(ampere, monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (7, 5))
    torch.backends.cuda.matmul.fp32_precision = "tf32"
    assert tf32_ops() == set()


@pytest.mark.skipif(not library.load(), reason="needs the op library")
def test_tf32_operators_are_like_the_others():
    for op in TF32_OPS:
        tf32 = getattr(torch.ops.edet_kernels_tf32, op).default._schema
        other = getattr(torch.ops.edet_kernels, op).default._schema
        assert str(tf32).replace("_tf32", "") == str(other)
        assert torch._library.simple_registry.singleton.find(tf32.name).fake_impl.kernel is not None
