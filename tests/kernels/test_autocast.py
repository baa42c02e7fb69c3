"""Autocast: the ops' maps are cast as a convolution's are, their weights stay in float32."""

import pytest
import torch

import edet_kernels
from backends import gradient_cases
from compiled_calls import compiled_call
from edet_kernels.names import MAP_OPS
from edet_kernels.testing.numeric import assert_identical
from edet_kernels.testing.samples import cast, map_tree, sample, tensors

# lanes outside a map hold anything
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning:triton")

HALVES = (torch.float16, torch.bfloat16)
BACKENDS = ("cpu", "reference", "triton", "emulated")
map_ops = pytest.mark.parametrize("op", MAP_OPS)


def autocast(call, dtype):
    """Autocast on the device of the call's maps."""
    return torch.autocast(tensors(call.maps)[0].device.type, dtype)


@gradient_cases(MAP_OPS, backends=BACKENDS, half=HALVES)
def test_results_are_those_of_cast_maps(backend, op, half):
    call = backend.sample(op)
    expected = call(cast(call.maps, half))
    with autocast(call, half):
        found = call()
    assert_identical(found, expected)
    # statistics, which are all that training_moments returns, stay in float32
    dtypes = {t.dtype for t in tensors(found) if t.dim() == 4}
    assert dtypes == (set() if op == "training_moments" else {half})


@gradient_cases(MAP_OPS, backends=("cpu",), half=HALVES)
def test_gradients_have_the_dtypes_of_their_tensors(backend, op, half):
    call = backend.sample(op)
    leaves = tensors((call.maps, call.weights))
    with autocast(call, half):
        results = tensors(call(map_tree(lambda t: t.requires_grad_(), call.maps)))
    found = torch.autograd.grad(
        sum(t.float().square().sum() for t in results), tensors(call.maps), retain_graph=True
    )
    assert {g.dtype for g in found} == {torch.float32}
    halved = map_tree(lambda t: t.detach().to(half).requires_grad_(), call.maps)
    loss = sum(t.float().square().sum() for t in tensors(call(halved)))
    for g, e in zip(found, torch.autograd.grad(loss, tensors(halved)), strict=True):
        assert_identical(g.to(half).contiguous(), e.contiguous())
    assert all(t.dtype == torch.float32 for t in leaves)


@pytest.mark.usefixtures("kernels_only")
@map_ops
def test_operators_have_the_rule_themselves(op):
    # a graph that was exported has no Python functions in front of its operators
    call = sample(op)
    function, arguments, _ = compiled_call(call)
    with torch.autocast("cpu", torch.bfloat16):
        found, expected = function(*arguments), call()
    results = tensors([expected])
    found = tensors([found])
    # with what training_project keeps for its backward pass
    assert len(found) == len(results) + (op == "training_project")
    for x, y in zip(found, results, strict=False):
        assert_identical(x, y)


@pytest.mark.usefixtures("kernels_only")
@map_ops
def test_compiled(op):
    call = sample(op)

    def function(maps):
        with torch.autocast("cpu", torch.bfloat16):
            return call(maps)

    torch.compiler.reset()
    compiled = torch.compile(function, backend="aot_eager", fullgraph=True)
    assert_identical(compiled(call.maps), function(call.maps))


@pytest.mark.usefixtures("backend")
def test_maps_may_be_of_two_dtypes():
    call = sample("fusion_node")
    with torch.autocast("cpu", torch.bfloat16):
        mixed = [call.maps[0].bfloat16(), *call.maps[1:]]
        assert_identical(call(mixed), call())


@pytest.mark.parametrize("op", ["weighted_fusion", "lateral", "nms", "detect"])
def test_what_is_not_cast(op):
    call = sample(op)
    doubles = cast(call.maps, torch.float64) if op in MAP_OPS else call.maps
    with edet_kernels.backend("auto"):
        expected = call(doubles)
        with torch.autocast("cpu", torch.bfloat16):
            assert_identical(call(doubles), expected)


@pytest.mark.usefixtures("kernels_only")
@pytest.mark.parametrize("op", [op for op in MAP_OPS if op != "stem"])
def test_integer_maps_are_refused(op):
    call = sample(op)
    with (
        torch.autocast("cpu", torch.bfloat16),
        pytest.raises(TypeError, match=r"input.* must be a float tensor, got torch\.uint8"),
    ):
        call(map_tree(lambda t: t.byte(), call.maps))


@pytest.mark.usefixtures("kernels_only")
def test_an_integer_image_gives_the_dtype_that_is_asked_for():
    call = sample("stem", uint8=True)
    with torch.autocast("cpu", torch.bfloat16):
        assert call().dtype == torch.float32
