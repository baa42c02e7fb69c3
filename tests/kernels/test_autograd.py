"""Backward passes: the gradients of the compiled ops against those of the float64 reference."""

import pytest
import torch
from op_utils import (
    DTYPES,
    FUSIONS,
    MAP_OPS,
    SAMPLES,
    assert_as_accurate_as_eager,
    assert_identical,
    gradients,
    map_tree,
    sample,
    tensors,
)

import edet_kernels
from edet_kernels import reference
from edet_kernels.ops import ACTIVATIONS, POOLS

pytestmark = pytest.mark.usefixtures("kernels_only")

dtypes = pytest.mark.parametrize("dtype", DTYPES, ids=str)
map_ops = pytest.mark.parametrize("op", MAP_OPS)
#: Ops whose backward pass is a kernel, and the chains of them.
KERNELS = ("weighted_fusion", "fusion_node", "separable_conv", "bifpn", "head", "training_node")
kernels = pytest.mark.parametrize("op", KERNELS)


def check(call, dtype):
    """Checks every gradient by the error of eager PyTorch, and its bias and direction."""
    exact = gradients(call, getattr(reference, call.op), torch.float64)
    eager = gradients(call, getattr(reference, call.op), dtype)
    found = gradients(call, getattr(edet_kernels, call.op), dtype)
    eps = torch.finfo(dtype).eps
    for g, e, x in zip(found, eager, exact, strict=True):
        assert g.isfinite().all()
        norm = x.norm()
        assert (g - x).norm() <= 2 * (e - x).norm() + 4 * eps * norm
        # rounding errors are as often up as down, so that a sum of them grows like √n
        bias = (g - x).sum().abs()
        assert bias <= 2 * (e - x).sum().abs() + 8 * eps * norm
        if norm > 0:
            cosine = (g * x).sum() / (g.norm() * norm)
            assert cosine > 1 - 2 * eps - 2 * ((e - x).norm() / norm) ** 2


def assert_exact(call):
    """As accurate as eager, elementwise, NaN where it has NaN; for float32."""
    exact = gradients(call, getattr(reference, call.op), torch.float64)
    eager = gradients(call, getattr(reference, call.op), torch.float32)
    found = gradients(call, getattr(edet_kernels, call.op), torch.float32)
    assert_as_accurate_as_eager(
        [g.float() for g in found], [x.double() for x in exact], [e.float() for e in eager]
    )


@dtypes
@map_ops
def test_gradients(op, dtype):
    check(sample(op, dtype), dtype)


@pytest.mark.parametrize("options", [{"nodes": 3}, {"normalised": False}, {"statistics": False}])
@dtypes
def test_training_node(options, dtype):
    check(sample("training_node", dtype, **options), dtype)


@dtypes
@pytest.mark.parametrize("channels", [1, 7, 16, 40, 88, 112])
@pytest.mark.parametrize("op", ["weighted_fusion", "fusion_node", "separable_conv"])
def test_channels(op, channels, dtype):
    check(sample(op, dtype, batch=1, channels=channels), dtype)


@pytest.mark.parametrize("out_channels", [1, 15, 17, 36, 81])
@pytest.mark.parametrize("op", ["fusion_node", "separable_conv", "training_node"])
def test_out_channels(op, out_channels):
    check(sample(op, out_channels=out_channels), torch.float32)


@pytest.mark.parametrize("op", ["weighted_fusion", "fusion_node", "training_node", "bifpn"])
@pytest.mark.parametrize(("fusion", "per_channel"), FUSIONS)
def test_fusions(fusion, per_channel, op):
    check(sample(op, fusion=fusion, per_channel=per_channel), torch.float32)


@pytest.mark.parametrize("activation", ACTIVATIONS)
@kernels
def test_activations(activation, op):
    name = {"fusion_node": "pre_activation", "bifpn": "pre_activation"}.get(op, "activation")
    options = {"post_activation": activation} if op == "fusion_node" else {}
    check(sample(op, **{name: activation}, **options), torch.float32)


@pytest.mark.parametrize("pool", POOLS)
@pytest.mark.parametrize("size", [(1, 1), (3, 8), (40, 70)])
@pytest.mark.parametrize("source", [(1, 1), (2, 2), (40, 70), (79, 139), (120, 140)])
def test_resizes(source, size, pool):
    if (source[0] > size[0]) != (source[1] > size[1]) and source != size:
        pytest.skip("a map grows or shrinks along both axes")
    call = sample("fusion_node", batch=1, channels=3, sizes=[size, source], size=size, pool=pool)
    check(call, torch.float32)


@pytest.mark.parametrize("size", [(1, 1), (1, 60), (60, 1), (33, 49), (64, 64)])
def test_sizes_of_many_groups(size):
    check(sample("separable_conv", sizes=[size, (5, 3)], channels=20), torch.float32)


def test_corners_of_activations_have_torchs_gradients():
    corners = torch.tensor([-3.0, -0.0, 0.0, 3.0, 6.0]).view(1, 1, 1, 5)
    for activation in ACTIVATIONS:
        call = sample("weighted_fusion", sizes=[(1, 5)], channels=1, fusion="sum", batch=1)
        call.options["activation"] = activation
        call.maps[0].copy_(corners)
        assert_exact(call)


@pytest.mark.parametrize("op", ["weighted_fusion", "fusion_node", "bifpn", "training_node"])
@pytest.mark.parametrize("per_channel", [False, True])
def test_edge_weights_at_and_below_zero_have_no_gradient(op, per_channel):
    call = sample(op, per_channel=per_channel)
    edge_weights = call.weights[2 if op == "training_node" else 0]
    edges = edge_weights if op == "bifpn" else edge_weights.unsqueeze(0)  # (nodes, n[, C])
    edges[:, 0] = 0.0
    edges[:, 1] = 0.7 if op == "bifpn" else -0.5  # most of its nodes have two edges
    edges[:, 2:] = 0.7
    edge_weights.requires_grad_()
    sum(t.double().square().sum() for t in tensors(call())).backward()
    grad = edge_weights.grad.reshape(edges.shape)
    assert not grad[edges <= 0].any()
    assert grad[edges > 0].any()
    check(call, torch.float32)


@pytest.mark.parametrize("pool", POOLS)
@pytest.mark.parametrize("source", [(9, 9), (12, 10)])
def test_max_pool_gives_ties_to_the_first(source, pool):
    call = sample("weighted_fusion", sizes=[source], size=(5, 5), fusion="sum", pool=pool)
    call.maps[0].copy_(torch.randint(3, call.maps[0].shape))
    assert_exact(call)


@pytest.mark.parametrize("special", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("op", ["weighted_fusion", "fusion_node", "separable_conv"])
def test_non_finite_inputs(op, special):
    call = sample(op, channels=5, **({"activation": "relu"} if op == "weighted_fusion" else {}))
    for x in call.maps:
        x[0, 1, 1:3, 1] = special
    exact = gradients(call, getattr(reference, op), torch.float32)
    found = gradients(call, getattr(edet_kernels, op), torch.float32)
    for g, x in zip(found, exact, strict=True):
        assert torch.equal(g.isfinite(), x.isfinite())


def test_max_pool_of_nothing_above_minus_infinity():
    for pool in POOLS:
        call = sample("weighted_fusion", sizes=[(8, 8)], size=(4, 4), fusion="sum", pool=pool)
        call.maps[0].fill_(float("-inf"))
        x = call.maps[0].requires_grad_()
        call().backward(torch.ones(2, 24, 4, 4))
        grad, x.grad = x.grad, None
        call.reference(torch.float32).backward(torch.ones(2, 24, 4, 4))
        assert_identical(grad, x.grad)


@kernels
def test_no_images(op):
    found = gradients(sample(op, batch=0), getattr(edet_kernels, op), torch.float32)
    assert all(not g.any() for g in found)


@kernels
def test_other_strides(op):
    call = sample(op)
    expected = gradients(call, getattr(edet_kernels, op), torch.float32)
    planar = type(call)(op, [x.contiguous() for x in call.maps], call.weights, call.options)
    assert_identical(gradients(planar, getattr(edet_kernels, op), torch.float32), expected)
    # and a gradient that is expanded from one number
    call.maps[0].requires_grad_()
    tensors(call())[0].sum().backward()
    assert call.maps[0].grad.isfinite().all()


@dtypes
@kernels
def test_the_number_of_threads_changes_nothing(op, dtype, threads):
    sizes = {"sizes": [(40, 30), (20, 15), (80, 60)]}
    if op == "training_node":
        sizes = {"sizes": [(9, 6), (5, 3), (17, 12)]}
    call = sample(op, dtype, **({} if op in ("bifpn", "head") else sizes))
    one = gradients(call, getattr(edet_kernels, op), dtype)
    threads(3)
    for _ in range(5):
        assert_identical(gradients(call, getattr(edet_kernels, op), dtype), one)


def test_statistics_of_a_mean_far_from_zero():
    call = sample("training_node", nodes=1, batch=1, channels=16)
    call.options["sizes"], call.options["edge_counts"] = [(60, 70)], [1]
    x = torch.randn(1, 16, 60, 70).contiguous(memory_format=torch.channels_last)
    weights = (None, None, None, *call.weights[3:-1], call.weights[-1] + 1000)
    maps, mean, m2 = edet_kernels.training_node([x], *weights, edge_counts=[1], sizes=[(60, 70)])
    values = maps[0].double().flatten(2)[0]
    torch.testing.assert_close(mean[0].double(), values.mean(1), rtol=1e-7, atol=0)
    deviations = (values - values.mean(1, keepdim=True)).square().sum(1)
    torch.testing.assert_close(m2[0].double(), deviations, rtol=2e-5, atol=0)


@map_ops
def test_second_derivatives_are_refused_by_name(op):
    call = sample(op)
    leaf = next(t for t in tensors(call.maps) if t.is_floating_point()).requires_grad_()
    total = sum(t.square().sum() for t in tensors(call()))
    with pytest.raises(RuntimeError, match=rf"edet_kernels\.{op} has no second derivative"):
        torch.autograd.grad(total, leaf, create_graph=True)


@pytest.mark.parametrize("op", [op for op in SAMPLES if op not in MAP_OPS])
def test_inference_only_ops_refuse_gradients(op, backend):
    call = sample(op)
    map_tree(lambda t: t.requires_grad_(), call.maps)
    with pytest.raises(ValueError, match=f"must not require gradients, because {op} has none"):
        call()
    with torch.no_grad():
        assert not any(t.requires_grad for t in tensors(call()))


@map_ops
def test_gradients_of_the_weights_alone(op):
    # a frozen feature map: no gradient of it is asked for
    call = sample(op, **({"fusion": "unbounded"} if op.endswith("fusion") else {}))
    weight = tensors(call.weights)[-1].requires_grad_()
    sum(t.double().square().sum() for t in tensors(call())).backward()
    assert weight.grad.any()
    assert all(t.grad is None for t in tensors(call.maps))


def test_backward_without_its_kernel_runs_the_reference(monkeypatch):
    from edet_kernels import autograd

    call = sample("fusion_node")
    expected = gradients(call, edet_kernels.fusion_node, torch.float32)
    monkeypatch.setattr(autograd, "has_kernel", lambda *_: False)
    found = gradients(call, edet_kernels.fusion_node, torch.float32)
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)
