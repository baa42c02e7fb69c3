"""The Triton kernels against the fp64 reference: on a GPU where there is one, else interpreted.

Interpreted kernels take a second a program, so that the maps are small and the tiles large.
"""

from __future__ import annotations

import math
import os
import subprocess
import sys

import pytest
import torch
from op_utils import (
    DTYPES,
    FUSIONS,
    Call,
    assert_identical,
    bifpn_graph,
    map_tree,
    sample,
    tensors,
)
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

import edet_kernels
from edet_kernels import BackendError, backend, explain, packing
from edet_kernels.ops import ACTIVATIONS

pytest.importorskip("triton")

from edet_kernels import triton as kernels
from edet_kernels.triton import configs

backend_module = sys.modules["edet_kernels.backend"]

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
#: The interpreter cuts bfloat16 results off where a GPU rounds them.
ROUNDED = DTYPES if DEVICE == "cuda" else (torch.float32, torch.float16)
dtypes = pytest.mark.parametrize("dtype", ROUNDED, ids=str)
#: Names of the ops and the smallest samples of them.
OPS = {
    "weighted_fusion": {},
    "fusion_node": {},
    "separable_conv": {"sizes": [(9, 6), (5, 3)]},
    "lateral": {},
    "bifpn": {"graph": bifpn_graph((5, 3), levels=2, cells=1)},
    "head": {},
}
GRADIENT_OPS = ("weighted_fusion", "fusion_node", "separable_conv", "lateral")

pytestmark = [
    # NaN and infinity are meant, and lanes outside a map hold anything
    pytest.mark.filterwarnings("ignore::RuntimeWarning:triton"),
    pytest.mark.filterwarnings("ignore:TRITON_DEFAULT_FP_FUSION"),
]


@pytest.fixture(autouse=True)
def triton(monkeypatch, request):
    """Every op runs on Triton; interpreted tiles are large, unless ``default_configs`` is asked."""
    torch.manual_seed(0)
    monkeypatch.setenv("EDET_BACKEND", "triton")
    if DEVICE == "cpu" and "default_configs" not in request.fixturenames:
        find = configs.find
        monkeypatch.setattr(configs, "find", lambda *a: {**find(*a), "BLOCK_P": 256})


@pytest.fixture
def default_configs():
    """Keeps the configurations of configs.json."""


def small(op: str, dtype: torch.dtype = torch.float32, batch: int = 1, **options) -> Call:
    """A sample of ``op`` on the device under test."""
    call = sample(op, dtype, batch, **{**OPS[op], **options})

    def move(t: Tensor) -> Tensor:
        return t.to(DEVICE)

    return Call(op, map_tree(move, call.maps), map_tree(move, call.weights), call.options)


# Forward.


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("op", GRADIENT_OPS)
def test_dtypes(op, dtype):
    small(op, dtype).check(dtype)


@pytest.mark.parametrize("op", ["bifpn", "head"])
def test_ops_of_several_launches(op):
    small(op).check(torch.float32)


@pytest.mark.parametrize(
    ("op", "channels"),
    [
        *((op, channels) for op in ("weighted_fusion", "lateral") for channels in (1, 7, 112)),
        *((op, channels) for op in GRADIENT_OPS for channels in (17, 88)),
    ],
)
def test_channels(op, channels):
    sizes = {"size": (3, 2)} if op == "lateral" else {"sizes": [(3, 2)]}
    small(op, torch.float16, channels=channels, **sizes).check(torch.float16)


@dtypes
def test_many_tiles_of_output_channels(dtype):
    small("separable_conv", dtype, sizes=[(3, 2)], out_channels=270).check(dtype)
    small("lateral", dtype, size=(3, 2), out_channels=(130, 8, 33)).check(dtype)


@pytest.mark.parametrize("op", GRADIENT_OPS)
def test_many_programs(op, default_configs):
    # the last tile of pixels is not full, and tiles go from one image to the next
    sizes = {"size": (5, 3)} if op == "lateral" else {"sizes": [(5, 3), (3, 2)]}
    small(op, batch=3, channels=17, **sizes).check(torch.float32)


@pytest.mark.parametrize("pool", ["same", "symmetric"])
@pytest.mark.parametrize(("fusion", "per_channel"), FUSIONS)
def test_fusion_methods(fusion, per_channel, pool):
    options = {"fusion": fusion, "per_channel": per_channel, "pool": pool}
    small("weighted_fusion", torch.float16, **options).check(torch.float16)


@pytest.mark.parametrize("fusion", ["softmax", "sum"])
def test_fusion_of_a_node(fusion):
    small("fusion_node", fusion=fusion, post_activation="relu", sizes=[(5, 3), (3, 2)]).check(
        torch.float32
    )


@pytest.mark.parametrize("fusion", ["fast", "softmax", "unbounded"])
@pytest.mark.parametrize(
    "weights",
    [(0.0, 1.0, 2.0), (-1.0, 0.0, -2.0), (60.0, -60.0, 0.0), (math.nan, 1.0, 1.0)],
    ids=str,
)
def test_edge_weight_values(weights, fusion):
    edge_weights = torch.tensor(weights)
    small("weighted_fusion", fusion=fusion, edge_weights=edge_weights).check(torch.float32)


RESIZES = [
    ((5, 5), (3, 3)),
    ((3, 3), (5, 5)),
    ((1, 1), (4, 7)),
    ((4, 7), (1, 1)),
    ((8, 5), (8, 10)),
    ((1, 9), (1, 5)),  # pooled along one axis
    ((9, 9), (3, 3)),  # stride 3
    ((13, 9), (4, 3)),  # stride 4 and 3
    ((40, 5), (2, 1)),  # stride 20 and 5: a window of more than 256 taps, in int32
    ((3, 2), (7, 9)),  # no whole factor
]
resizes = pytest.mark.parametrize(("source", "size"), RESIZES, ids=str)
pools = pytest.mark.parametrize("pool", ["same", "symmetric"])


@pools
@resizes
def test_resize(source, size, pool):
    options = {"channels": 3, "sizes": [source, size], "size": size, "pool": pool}
    small("weighted_fusion", **options).check(torch.float32)


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_activations(activation):
    call = small("weighted_fusion", fusion="sum", sizes=[(5, 3)], activation=activation)
    values = torch.tensor([-math.inf, -1e4, -90, -20, -3.5, -3, -1e-3, -0.0, 0.0, 1e-3, 3, 6, 7, 9])
    values = torch.cat(
        [values, torch.tensor([100, math.inf, math.nan]), torch.linspace(-7, 7, 343)]
    )
    call.maps[0] = values.view(1, 24, 5, 3).to(DEVICE)
    call.check(torch.float32)


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf], ids=str)
@pytest.mark.parametrize("op", ["weighted_fusion", "separable_conv", "lateral"])
def test_non_finite_inputs(op, value):
    call = small(op, batch=2)
    for x in tensors(call.maps):
        x[0, 1, x.shape[2] // 2, x.shape[3] // 3] = value
        x[1, 2, 0, -1] = value
    call.check(torch.float32)


def test_padding_is_zero_whatever_the_weights():
    # ∞ · 0 outside the image would be NaN everywhere; where it is inside, the reference has it too
    call = small("fusion_node", sizes=[(5, 3)], fusion="unbounded", pre_activation="none")
    call.weights[0].fill_(math.inf)
    call.maps[0].abs_()
    call.check(torch.float32)


@pytest.mark.parametrize("op", OPS)
def test_batch_0(op):
    call = small(op, batch=0)
    assert_identical(map_tree(Tensor.contiguous, call()), call.reference(torch.float32))


def sliced_channels(x: Tensor) -> Tensor:
    wide = torch.full((x.shape[0], x.shape[1] + 3, *x.shape[2:]), math.nan, device=x.device)
    wide = wide.to(x.dtype).contiguous(memory_format=torch.channels_last)
    wide[:, 2:-1] = x
    return wide[:, 2:-1]


@pytest.mark.parametrize("layout", [Tensor.contiguous, sliced_channels], ids=["NCHW", "sliced"])
@pytest.mark.parametrize("op", ["weighted_fusion", "separable_conv", "lateral"])
def test_layouts_give_identical_results(op, layout):
    call = small(op)
    assert_identical(call(map_tree(layout, call.maps)), call())


def test_strided_weights():
    call = small("fusion_node", sizes=[(5, 3), (3, 2)], per_channel=True)

    def strided(t: Tensor) -> Tensor:
        wide = torch.full((*t.shape, 2), math.nan, device=t.device)
        wide[..., 0] = t
        return wide[..., 0]

    weights = map_tree(strided, call.weights)
    assert_identical(Call(call.op, call.maps, weights, call.options)(), call())
    fused = Call("weighted_fusion", call.maps, weights[:1], call.options)
    assert_identical(fused(), Call("weighted_fusion", call.maps, call.weights[:1], call.options)())


def test_a_node_in_two_launches():
    call = small("fusion_node", sizes=[(5, 3), (3, 2)])
    config = configs.find("fusion_node", call.maps[0], 24, 15)
    with configs.forced({"fusion_node": {**config, "launches": 2}}):
        call.check(torch.float32)


def test_arguments_are_unchanged():
    call = small("fusion_node", sizes=[(5, 3), (3, 2)])
    before = map_tree(Tensor.clone, (call.maps, call.weights))
    call()
    assert_identical(tensors((call.maps, call.weights)), tensors(before))


# Backward.


class Arguments(TorchDispatchMode):
    """Notes the arguments of the operator behind a public call."""

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function.namespace == "edet_kernels_triton":
            self.found = args
        return function(*args, **(kwargs or {}))


def operator_arguments(call: Call) -> tuple:
    with Arguments() as mode:
        call()
    return mode.found


def gradients(call: Call, grads: list[Tensor]) -> list[Tensor]:
    """Gradients by the kernels, of everything, flat, of the shapes of the call's own tensors."""
    one = call.op in ("weighted_fusion", "fusion_node")
    function = getattr(torch.ops.edet_kernels_triton, call.op + "_backward")
    found = function(grads[0] if one else grads, *operator_arguments(call))
    leaves = tensors((call.maps, call.weights))
    shaped = []
    for grad, leaf in zip(found, leaves, strict=False):
        if leaf.dim() == 4 and grad.dim() == 2:
            grad = packing.unpack_depthwise(grad)
        elif leaf.dim() == 4 and grad.dim() == 3:
            most = 16 * grad.shape[0]
            assert not packing.unpack_pointwise(grad, most)[leaf.shape[0] :].any()
            grad = packing.unpack_pointwise(grad, leaf.shape[0])
        shaped.append(grad)
    assert [g.shape for g in shaped] == [t.shape for t in leaves]
    assert all(g.numel() == 0 for g in found[len(leaves) :])
    return shaped


def reference_gradients(call: Call, grads: list[Tensor], dtype: torch.dtype) -> list[Tensor]:
    weights = torch.promote_types(dtype, torch.float32)  # eager keeps its weights in float32
    maps = map_tree(lambda t: t.detach().to(dtype).requires_grad_(), call.maps)
    leaves = map_tree(lambda t: t.detach().to(weights).requires_grad_(), call.weights)
    results = tensors(getattr(edet_kernels.reference, call.op)(maps, *leaves, **call.options))
    torch.autograd.backward(results, [g.to(dtype) for g in grads])
    return [torch.zeros_like(t) if t.grad is None else t.grad for t in tensors((maps, leaves))]


def check_gradients(call: Call, dtype: torch.dtype) -> None:
    """Checks every gradient: relative L2 error by eager's, direction, and bias."""
    grads = [torch.randn(t.shape, device=DEVICE).to(dtype) for t in tensors(call.reference(dtype))]
    triples = zip(
        gradients(call, grads),
        reference_gradients(call, grads, torch.float64),
        reference_gradients(call, grads, dtype),
        strict=True,
    )
    # below 2^-21 the error of eager's sums, in float32 for weights, is a matter of luck
    eps = max(torch.finfo(dtype).eps, 2**-21)
    for i, (found, exact, eager) in enumerate(triples):
        assert found.dtype == eager.dtype, i
        norm = exact.norm()
        error, eager_error = (found.double() - exact).norm(), (eager.double() - exact).norm()
        assert error <= 2 * eager_error + eps * norm, (i, error / norm, eager_error / norm)
        if norm > 0:
            cosine = (found.double() * exact).sum() / (found.double().norm() * norm)
            assert cosine > 1 - 16 * eps, (i, cosine)
        bias = (found.double() - exact).mean().abs()
        assert bias <= 2 * eager_error / math.sqrt(max(exact.numel(), 1)) + eps * exact.abs().mean()


@dtypes
@pytest.mark.parametrize("op", GRADIENT_OPS)
def test_gradients(op, dtype):
    check_gradients(small(op, dtype), dtype)


@pytest.mark.parametrize(("fusion", "per_channel"), FUSIONS)
def test_gradients_of_fusion_methods(fusion, per_channel):
    options = {"fusion": fusion, "per_channel": per_channel, "activation": "swish"}
    check_gradients(small("weighted_fusion", **options), torch.float32)


@pools
@resizes
def test_gradients_of_resizes(source, size, pool):
    options = {"channels": 3, "sizes": [source, size], "size": size, "pool": pool}
    check_gradients(small("weighted_fusion", **options), torch.float32)


@pools
def test_gradients_of_ties_go_where_torch_sends_them(pool):
    call = small(
        "weighted_fusion", channels=5, fusion="sum", sizes=[(9, 8)], size=(5, 4), pool=pool
    )
    x = call.maps[0]
    x.copy_(torch.randint(0, 3, x.shape).to(x))  # most windows have several maxima
    x[:, 1] = -math.inf
    x[:, 2, ::3, ::2] = math.nan
    grads = [torch.randint(-9, 9, (1, 5, 5, 4), device=DEVICE).float()]  # in any order: exact sums
    [found], [expected] = gradients(call, grads), reference_gradients(call, grads, torch.float32)
    assert_identical(found.contiguous(), expected.contiguous())


@pytest.mark.parametrize("weights", [(0.0, 1.0, 2.0), (-1.0, 0.0, -2.0)], ids=str)
def test_gradients_of_edge_weights_follow_relu(weights):
    check_gradients(small("weighted_fusion", edge_weights=torch.tensor(weights)), torch.float32)


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_gradients_of_activations(activation):
    call = small("weighted_fusion", fusion="sum", sizes=[(5, 3)], activation=activation)
    values = torch.tensor([-1e4, -90.0, -20, -3.5, -3, -1e-3, 0, 1e-3, 3, 5.9, 6, 7, 90])
    values = torch.cat([values, torch.linspace(-7, 7, 347)])
    call.maps[0] = values.view(1, 24, 5, 3).to(DEVICE)
    check_gradients(call, torch.float32)


@pytest.mark.parametrize("activation", ["none", "relu6"])
def test_gradients_before_an_activation(activation):
    options = {"channels": 17, "out_channels": 33, "activation": activation}
    check_gradients(small("separable_conv", **options), torch.float32)


def test_gradients_of_many_programs(default_configs):
    options = {"sizes": [(5, 4), (2, 1)], "channels": 17, "out_channels": 20}
    check_gradients(small("separable_conv", batch=2, **options), torch.float32)


@pytest.mark.parametrize("pooled", [0, 1])
def test_gradients_of_lateral(pooled):
    options = {"out_channels": (7, 64, 40), "pooled": pooled}
    check_gradients(small("lateral", **options), torch.float32)


@pytest.mark.parametrize("op", GRADIENT_OPS)
def test_gradients_of_batch_0_are_zero(op):
    call = small(op, batch=0)
    grads = [torch.empty(t.shape, device=DEVICE) for t in tensors(call.reference(torch.float32))]
    for grad in gradients(call, grads):
        assert not grad.any()


def test_gradients_are_the_same_every_time():
    call = small("lateral", size=(5, 3))
    grads = [torch.randn(t.shape, device=DEVICE) for t in tensors(call.reference(torch.float32))]
    assert_identical(gradients(call, grads), gradients(call, grads))


# As PyTorch operators.


@pytest.mark.parametrize("op", ["weighted_fusion", "lateral"])
def test_opcheck(op):
    arguments = operator_arguments(small(op))
    torch.library.opcheck(getattr(torch.ops.edet_kernels_triton, op), arguments)


@pytest.mark.parametrize("op", GRADIENT_OPS)
def test_fake_gradients(op):
    arguments = operator_arguments(small(op, batch=0))
    result = getattr(torch.ops.edet_kernels_triton, op)(*arguments)
    function = getattr(torch.ops.edet_kernels_triton, op + "_backward")
    torch.library.opcheck(function, (result, *arguments), test_utils="test_faketensor")


def test_compile_without_graph_breaks():
    call = small("weighted_fusion")
    torch.compiler.reset()
    compiled = torch.compile(lambda maps: call(maps) * 2, backend="aot_eager", fullgraph=True)
    assert_identical(compiled(call.maps), call() * 2)


# Being chosen.


@pytest.fixture
def fresh(monkeypatch):
    """Forgets earlier choices, before and after."""
    monkeypatch.delenv("EDET_BACKEND")
    for clear in (backend_module._refusal.cache_clear, backend_module._load_triton.cache_clear):
        clear()
    yield
    for clear in (backend_module._refusal.cache_clear, backend_module._load_triton.cache_clear):
        clear()


def test_a_request_is_met_or_refused(fresh):
    with backend("triton"):
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
    monkeypatch.setattr(kernels, "INTERPRETED", False)
    with backend("triton"), pytest.raises(BackendError, match="set TRITON_INTERPRET=1 before"):
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


def test_an_old_gpu_is_refused(fresh, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (7, 5))
    with (
        backend("triton"),
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


# Accuracy helper of this file.


def test_the_rule_for_gradients_can_fail(monkeypatch):
    call = small("lateral", size=(3, 2), pooled=0)
    right = gradients

    def wrong(call, grads):
        found = right(call, grads)
        found[0] = found[0] * (1 + 1e-4)
        return found

    monkeypatch.setitem(globals(), "gradients", wrong)
    with pytest.raises(AssertionError):
        check_gradients(call, torch.float32)
