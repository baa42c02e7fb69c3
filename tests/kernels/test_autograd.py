"""Backward passes of every backend against the gradients of the float64 reference."""

import pytest
import torch

import edet_kernels
from backends import BLOCK_OPS, cases, gradient_cases
from edet_kernels import operators, reference
from edet_kernels.names import ACTIVATIONS, MAP_OPS, POOLS
from edet_kernels.testing.numeric import assert_as_accurate_as_eager, assert_identical
from edet_kernels.testing.samples import (
    DTYPES,
    FUSION_KINDS,
    SAMPLES,
    Call,
    gradients,
    map_tree,
    sample,
    tensors,
)

# NaN and infinity are meant, and lanes outside a map hold anything
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning:triton")
#: Ops whose backward pass is a kernel, and the chains of them.
KERNELS = (
    *("weighted_fusion", "fusion_node", "separable_conv", "bifpn", "head", "training_node"),
    *BLOCK_OPS,
)
EDGE_OPS = ("weighted_fusion", "fusion_node", "bifpn", "training_node")


def assert_exact(call):
    """As accurate as eager on the CPU, elementwise, NaN where it has NaN; for float32.

    Of a channels_last window that is all −∞, torch's CUDA max pool takes the map's first pixel for
    the largest, and so loses the gradient.
    """
    found = gradients(call, getattr(edet_kernels, call.op), torch.float32)
    with torch.device("cpu"):
        parts = (call.maps, call.weights, call.options)
        on_cpu = Call(call.op, *(map_tree(torch.Tensor.cpu, part) for part in parts))
        exact = gradients(on_cpu, getattr(reference, call.op), torch.float64)
        eager = gradients(on_cpu, getattr(reference, call.op), torch.float32)
    assert_as_accurate_as_eager(
        [g.float().cpu() for g in found], [x.double() for x in exact], [e.float() for e in eager]
    )


@gradient_cases(MAP_OPS, backends=("cpu", "triton", "emulated"), dtype=DTYPES)
def test_gradients(backend, op, dtype):
    backend.sample(op, dtype).check_gradients(dtype)


@gradient_cases(
    ["training_node"],
    options=[{"nodes": 3}, {"normalised": False}, {"statistics": False}],
    dtype=DTYPES,
)
def test_training_node(backend, op, options, dtype):
    backend.sample(op, dtype, **options).check_gradients(dtype)


@gradient_cases(
    ["weighted_fusion", "fusion_node", "separable_conv"],
    channels=[1, 7, 16, 40, 88, 112],
    dtype=DTYPES,
)
def test_channels(backend, op, channels, dtype):
    backend.sample(op, dtype, batch=1, channels=channels).check_gradients(dtype)


@gradient_cases(
    ["fusion_node", "separable_conv", "training_node"], out_channels=[1, 15, 17, 36, 81]
)
def test_out_channels(backend, op, out_channels):
    backend.sample(op, out_channels=out_channels).check_gradients(torch.float32)


@gradient_cases(
    ["training_depthwise"],
    size=[(1, 1), (2, 3), (9, 6), (13, 40), (40, 70)],
    kernel=[3, 5],
    stride=[1, 2],
    expansion=[1, 2],
    padding=POOLS,
)
def test_expansions_and_depthwise_convolutions(
    backend, op, size, kernel, stride, expansion, padding
):
    options = {"kernel": kernel, "stride": stride, "expansion": expansion, "padding": padding}
    call = backend.sample(op, channels=20, size=size, **options)
    found, exact, eager = call(), call.reference(torch.float64), call.reference(torch.float32)
    assert_as_accurate_as_eager(found[:2], exact[:2], eager[:2])
    # of a few pixels the squares are those of the map; how far eager's are off is a matter of luck
    values = found[0].double().transpose(0, 1).flatten(1)
    squares = (values - values.mean(1, keepdim=True)).square().sum(1)
    torch.testing.assert_close(found[2].double(), squares, rtol=1e-6, atol=0)
    call.check_gradients(torch.float32)


@gradient_cases(
    ["training_project"], size=[(1, 2), (9, 6), (40, 70)], squeeze=[False, True], channels=[7, 96]
)
def test_gates_and_projections(backend, op, size, squeeze, channels):
    call = backend.sample(op, size=size, squeeze=squeeze, channels=channels)
    call.check(torch.float32)
    call.check_gradients(torch.float32)


@gradient_cases(["training_moments"], products=[False, True], channels=[1, 7, 24, 40], dtype=DTYPES)
def test_moments(backend, op, dtype, products, channels):
    call = backend.sample(op, dtype, products=products, channels=channels)
    call.check(dtype)
    call.check_gradients(dtype)


@gradient_cases(["training_depthwise"], options=[{"normalised": False}, {"statistics": False}])
def test_a_block_without_a_norm(backend, op, options):
    backend.sample(op, **options).check_gradients(torch.float32)


@gradient_cases(BLOCK_OPS, batch=[17, 40])
def test_blocks_of_many_images(backend, op, batch):
    backend.sample(op, batch=batch, size=(12, 10)).check_gradients(torch.float32)


@gradient_cases(EDGE_OPS, method=FUSION_KINDS)
def test_fusions(backend, op, method):
    fusion, per_channel = method
    backend.sample(op, fusion=fusion, per_channel=per_channel).check_gradients(torch.float32)


@gradient_cases([op for op in KERNELS if op != "training_moments"], activation=ACTIVATIONS)
def test_activations(backend, op, activation):
    name = {"fusion_node": "pre_activation", "bifpn": "pre_activation"}.get(op, "activation")
    options = {"post_activation": activation} if op == "fusion_node" else {}
    backend.sample(op, **{name: activation}, **options).check_gradients(torch.float32)


@pytest.mark.parametrize("pool", POOLS)
@pytest.mark.parametrize("size", [(1, 1), (3, 8), (40, 70)])
@pytest.mark.parametrize("source", [(1, 1), (2, 2), (40, 70), (79, 139), (120, 140)])
@pytest.mark.usefixtures("kernels_only")
def test_resizes_of_large_maps(source, size, pool):
    if (source[0] > size[0]) != (source[1] > size[1]) and source != size:
        pytest.skip("a map grows or shrinks along both axes")
    call = sample("fusion_node", batch=1, channels=3, sizes=[size, source], size=size, pool=pool)
    call.check_gradients(torch.float32)


RESIZES = [
    ((5, 5), (3, 3)),
    ((3, 3), (5, 5)),
    ((1, 1), (4, 7)),
    ((4, 7), (1, 1)),
    ((8, 5), (8, 10)),
    ((1, 9), (1, 5)),  # pooled along one axis
    ((9, 9), (3, 3)),  # stride 3
    ((13, 9), (4, 3)),  # stride 4 and 3
    ((40, 30), (2, 2)),  # stride 20 and 15: a window of more than 256 taps
    ((3, 2), (7, 9)),  # no whole factor
]


@gradient_cases(["weighted_fusion", "training_node"], resize=RESIZES, pool=POOLS)
def test_resizes(backend, op, resize, pool):
    source, size = resize
    # few channels have few gradients, whose errors in eager PyTorch are a matter of luck
    channels = 16 if op == "training_node" else 3
    options = {"channels": channels, "sizes": [size, source], "pool": pool}
    backend.sample(op, **options).check_gradients(torch.float32)


@pytest.mark.parametrize("size", [(1, 1), (1, 60), (60, 1), (33, 49), (64, 64)])
@pytest.mark.usefixtures("kernels_only")
def test_sizes_of_many_groups(size):
    sample("separable_conv", sizes=[size, (5, 3)], channels=20).check_gradients(torch.float32)


@gradient_cases(["weighted_fusion"], activation=ACTIVATIONS)
def test_corners_of_activations_have_torchs_gradients(backend, op, activation):
    call = sample(op, sizes=[(1, 5)], channels=1, fusion="sum", batch=1, activation=activation)
    call.maps[0].copy_(torch.tensor([-3.0, -0.0, 0.0, 3.0, 6.0]).view(1, 1, 1, 5))
    assert_exact(call)


@gradient_cases(EDGE_OPS, per_channel=[False, True])
def test_edge_weights_at_and_below_zero_have_no_gradient(backend, op, per_channel):
    call = backend.sample(op, per_channel=per_channel, batch=2)
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
    call.check_gradients(torch.float32)


@gradient_cases(["weighted_fusion"], source=[(9, 9), (12, 10)], pool=POOLS)
def test_max_pool_gives_ties_to_the_first(backend, op, source, pool):
    call = sample(op, sizes=[source], size=(5, 5), fusion="sum", pool=pool)
    x = call.maps[0]
    x.copy_(torch.randint(3, x.shape))  # most windows have several maxima
    x[:, 1] = -torch.inf
    x[:, 2, ::3, ::2] = torch.nan
    assert_exact(call)


@gradient_cases(
    ["weighted_fusion", "fusion_node", "separable_conv"], special=[torch.nan, torch.inf, -torch.inf]
)
def test_non_finite_inputs(backend, op, special):
    options = {"activation": "relu"} if op == "weighted_fusion" else {}
    call = backend.sample(op, channels=5, **options)
    for x in call.maps:
        x[0, 1, 1:3, 1] = special
    exact = gradients(call, getattr(reference, op), torch.float32)
    found = gradients(call, getattr(edet_kernels, op), torch.float32)
    for g, x in zip(found, exact, strict=True):
        assert torch.equal(g.isfinite(), x.isfinite())


@gradient_cases(KERNELS)
def test_no_images(backend, op):
    found = gradients(backend.sample(op, batch=0), getattr(edet_kernels, op), torch.float32)
    assert all(not g.any() for g in found)


@gradient_cases(KERNELS)
def test_other_strides(backend, op):
    call = backend.sample(op)
    expected = gradients(call, getattr(edet_kernels, op), torch.float32)
    maps = map_tree(torch.Tensor.contiguous, call.maps)
    planar = type(call)(op, maps, call.weights, call.options)
    assert_identical(gradients(planar, getattr(edet_kernels, op), torch.float32), expected)
    # and a gradient that is expanded from one number
    first = tensors(call.maps)[0].requires_grad_()
    tensors(call())[0].sum().backward()
    assert first.grad.isfinite().all()


@gradient_cases(KERNELS, backends=["cpu"], dtype=DTYPES)
def test_the_number_of_threads_changes_nothing(backend, op, dtype, threads):
    sizes = {"sizes": [(40, 30), (20, 15), (80, 60)]}
    if op == "training_node":
        sizes = {"sizes": [(9, 6), (5, 3), (17, 12)]}
    if op in BLOCK_OPS:
        sizes = {"size": (40, 30)}
    call = sample(op, dtype, **({} if op in ("bifpn", "head") else sizes))
    one = gradients(call, getattr(edet_kernels, op), dtype)
    threads(3)
    for _ in range(5):
        assert_identical(gradients(call, getattr(edet_kernels, op), dtype), one)


@gradient_cases(["training_node"])
def test_statistics_of_a_mean_far_from_zero(backend, op):
    call = sample(op, nodes=1, batch=1, channels=16)
    x = torch.randn(1, 16, 60, 70).contiguous(memory_format=torch.channels_last)
    weights = (None, None, None, *call.weights[3:-1], call.weights[-1] + 1000)
    maps, mean, m2 = edet_kernels.training_node([x], *weights, edge_counts=[1], sizes=[(60, 70)])
    values = maps[0].double().flatten(2)[0]
    torch.testing.assert_close(mean[0].double(), values.mean(1), rtol=2**-23, atol=0)
    deviations = (values - values.mean(1, keepdim=True)).square().sum(1)
    torch.testing.assert_close(m2[0].double(), deviations, rtol=2e-5, atol=0)


@gradient_cases(MAP_OPS, backends=("cpu", "triton", "emulated"))
def test_second_derivatives_are_refused_by_name(backend, op):
    call = backend.sample(op)
    leaf = next(t for t in tensors(call.maps) if t.is_floating_point()).requires_grad_()
    total = sum(t.square().sum() for t in tensors(call()))
    with pytest.raises(RuntimeError, match=rf"edet_kernels\.{op} has no second derivative"):
        torch.autograd.grad(total, leaf, create_graph=True)


@cases([op for op in SAMPLES if op not in MAP_OPS])
def test_inference_only_ops_refuse_gradients(backend, op):
    call = sample(op)
    map_tree(lambda t: t.requires_grad_(), call.maps)
    with pytest.raises(ValueError, match=f"must not require gradients, because {op} has none"):
        call()
    with torch.no_grad():
        assert not any(t.requires_grad for t in tensors(call()))


@gradient_cases([op for op in MAP_OPS if op != "training_moments"])
def test_gradients_of_the_weights_alone(backend, op):
    # a frozen feature map: no gradient of it is asked for
    call = backend.sample(op, **({"fusion": "unbounded"} if op.endswith("fusion") else {}))
    weight = tensors(call.weights)[-1].requires_grad_()
    sum(t.double().square().sum() for t in tensors(call())).backward()
    assert weight.grad.any()
    assert all(t.grad is None for t in tensors(call.maps))


@pytest.mark.usefixtures("kernels_only")
def test_backward_without_its_kernel_runs_the_reference(monkeypatch):
    call = sample("fusion_node")
    expected = gradients(call, edet_kernels.fusion_node, torch.float32)
    monkeypatch.setattr(operators, "has_kernel", lambda *_: False)
    found = gradients(call, edet_kernels.fusion_node, torch.float32)
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)
