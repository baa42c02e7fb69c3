"""What PyTorch asks of an operator: honest schemas, fake kernels, and no graph breaks."""

import pytest
import torch
from torch._subclasses import FakeTensorMode

import edet_kernels
from backends import BLOCK_OPS, cases
from compiled_calls import Recorder, compiled_call
from edet_kernels.names import MAP_OPS
from edet_kernels.testing.numeric import assert_identical
from edet_kernels.testing.samples import DTYPES, SAMPLES, Graph, map_tree, sample, tensors

pytestmark = pytest.mark.usefixtures("kernels_only")
all_ops = pytest.mark.parametrize("op", SAMPLES)


def backward_calls(call):
    """The compiled ops, with their arguments, that the backward pass of a public call runs."""
    leaves = [t.requires_grad_() for t in tensors(call.maps) if t.is_floating_point()]
    total = sum(t.double().sum() for t in tensors(call()))
    with Recorder() as recorder:
        torch.autograd.grad(total, leaves)
    return recorder.calls


VARIANTS = {
    "weighted_fusion": [{"fusion": "sum"}, {"per_channel": True}, {"size": (5, 3)}],
    "fusion_node": [{"fusion": "sum"}, {"per_channel": True}, {"out_channels": 24}],
    "bifpn": [
        {"fusion": "sum"},
        {"per_channel": True},
        {"graph": Graph([(9, 6)], [(0,), (0, 1)], [(9, 6), (5, 3)], [2, 1])},
    ],
    "separable_conv": [{"per_level": False}, {"sizes": [(9, 6)]}],
    "head": [{"activation": "relu6"}],
    "lateral": [{"pooled": 0}, {"pooled": 3, "size": (1, 5)}],
    "mbconv": [{"expansion": 1, "squeeze": False}, {"stride": 2}, {"residual": True}],
    "stem": [{"uint8": True}, {"normalise": False}],
    "training_node": [{"nodes": 3}, {"normalised": False}, {"statistics": False}],
    "training_moments": [{"products": False}],
    "training_depthwise": [
        {"expansion": 1, "normalised": False},
        {"stride": 2, "kernel": 5},
        {"statistics": False},
    ],
    "training_project": [{"squeeze": False}, {"statistics": False}],
    "nms": [{"method": "gaussian"}, {"count": 0}, {"max_detections": 3}],
    "detect": [{"limits": False}, {"method": "gaussian"}],
}
EVERY = [{}, {"batch": 0}, {"dtype": torch.float16}, {"dtype": torch.bfloat16}]
CASES = [(op, options) for op in SAMPLES for options in EVERY + VARIANTS[op]]


@pytest.mark.parametrize(("op", "options"), CASES, ids=str)
def test_opcheck(op, options):
    # all four tests: schema (nothing mutated, no aliases), autograd registration, fake tensors,
    # and tracing with dynamic shapes
    function, args, kwargs = compiled_call(sample(op, **options))
    torch.library.opcheck(function, args, kwargs)


@cases(SAMPLES, dtype=DTYPES, backends=["triton", "emulated"])
def test_opcheck_of_other_backends(backend, op, dtype):
    # batches of 0 ask everything of the host's side, and take no time
    function, args, kwargs = compiled_call(backend.sample(op, dtype, batch=0))
    torch.library.opcheck(function, args, kwargs)


@pytest.mark.parametrize("backend", ["triton", "emulated"], indirect=True)
def test_opcheck_with_pixels_and_gradients(backend):
    function, args, kwargs = compiled_call(backend.sample("lateral"))
    args = map_tree(lambda t: t.requires_grad_() if t.is_floating_point() else t, args)
    torch.library.opcheck(function, args, kwargs)


@cases(["weighted_fusion", "fusion_node", "separable_conv", "lateral", "training_node", *BLOCK_OPS],
       dtype=DTYPES, backends=["cpu", "triton"])  # fmt: skip
def test_opcheck_of_backward_kernels(backend, op, dtype):
    calls = backward_calls(backend.sample(op, dtype, batch=2 if backend.name == "cpu" else 0))
    assert len(calls) == (0 if (backend.name, op) == ("cpu", "lateral") else 1)
    for function, args, kwargs in calls:
        assert function.__name__ == f"{op}_backward.default"
        torch.library.opcheck(function, map_tree(torch.Tensor.detach, args), kwargs)


@pytest.mark.parametrize("op", MAP_OPS)
def test_opcheck_with_gradients(op):
    # the last test then traces the backward pass as well
    function, args, kwargs = compiled_call(sample(op))
    args = map_tree(lambda t: t.requires_grad_() if t.is_floating_point() else t, args)
    torch.library.opcheck(function, args, kwargs)


def test_an_output_that_is_asked_for_twice_is_refused():
    graph = Graph([(9, 6)], [(0,), (0, 1)], [(9, 6), (9, 6)], [1, 2, 1])
    with pytest.raises(ValueError, match=r"outputs must be different nodes, got \(1, 2, 1\)"):
        sample("bifpn", graph=graph)()


@all_ops
def test_opcheck_of_planar_maps(op):
    # fake kernels must give the strides of the real ones, whatever those of the inputs
    call = sample(op)
    planar = map_tree(torch.Tensor.contiguous, call.maps)
    function, args, kwargs = compiled_call(lambda: call(planar))
    torch.library.opcheck(function, args, kwargs)


@all_ops
def test_compile_without_graph_breaks(op):
    torch.compiler.reset()
    function = getattr(edet_kernels, op)
    compiled = torch.compile(
        lambda maps, weights, options: function(maps, *weights, **options),
        backend="aot_eager",
        fullgraph=True,
    )
    for batch in (2, 3):  # the second batch size is traced with dynamic shapes
        call = sample(op, batch=batch)
        assert_identical(compiled(call.maps, call.weights, call.options), call())


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_compile_with_inductor():
    node, heads = sample("fusion_node", out_channels=24), sample("separable_conv")

    def function(maps):
        fused = node([x * 2 for x in maps])
        return heads([fused.relu(), *maps[1:]])

    torch.compiler.reset()
    compiled = torch.compile(function, fullgraph=True)
    torch.testing.assert_close(compiled(node.maps), function(node.maps))


@pytest.mark.parametrize("op", MAP_OPS)
def test_export(op):
    call = sample(op)

    class Module(torch.nn.Module):
        def forward(self, maps):
            return call(maps)

    with torch.no_grad():
        program = torch.export.export(Module(), (call.maps,))
    targets = [str(node.target) for node in program.graph.nodes]
    assert f"edet_kernels.{op}.default" in targets
    assert_identical(program.module()(call.maps), call())


@pytest.mark.parametrize("op", MAP_OPS)
def test_fake_tensors_run_nothing(op):
    call = sample(op)
    expected = tensors(call())
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        fakes = tensors(call(map_tree(mode.from_tensor, call.maps)))
    for fake, real in zip(fakes, expected, strict=True):
        assert fake.shape == real.shape
        assert fake.dtype == real.dtype
        assert fake.stride() == real.stride()


def test_inference_mode():
    call = sample("fusion_node")
    with torch.inference_mode():
        out = call()
    assert out.is_inference()
    assert_identical(out.clone(), call())
