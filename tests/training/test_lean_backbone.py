"""In training the backbone's blocks run fused, with the gradients and statistics of its layers."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.autograd.profiler import profile
from torch.utils._python_dispatch import TorchDispatchMode

import edet
import edet_kernels
from edet.models.efficientnet import EfficientNet

NAMES = ("efficientnet_b0", "efficientnet_b1", "efficientnet_lite0")


class Ops(TorchDispatchMode):
    """Counts the calls of compiled ops."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: dict[str, int] = {}

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        if function.namespace == "edet_kernels":
            name = function.__name__.split(".")[0]
            self.calls[name] = self.calls.get(name, 0) + 1
        return function(*args, **(kwargs or {}))


@pytest.fixture
def make(randomise: Callable[[nn.Module], nn.Module]) -> Callable[..., EfficientNet]:
    """Makes a backbone in training mode."""

    def of(name: str = "efficientnet_b0", **options: object) -> EfficientNet:
        if "lite" in name:  # corners of relu6 make gradients jump, whatever computes them
            options = {"activation": "hard_swish", **options}
        return randomise(EfficientNet(name, **options)).train()  # type: ignore[arg-type, return-value]

    return of


def run(module: nn.Module, images: Tensor, backend: str) -> list[Tensor]:
    """Maps of a forward and a backward pass."""
    with edet_kernels.backend(backend):
        maps = module(images)
        generator = torch.Generator().manual_seed(1)
        total = torch.zeros((), dtype=torch.float64)
        for x in maps:
            factor = torch.randn(x.shape, generator=generator)
            total = total + (x.double() * factor.double()).sum() / x.numel() ** 0.5
        total.backward()
    return list(maps)


def three_ways(module: nn.Module, images: Tensor) -> tuple[nn.Module, nn.Module, nn.Module]:
    """Copies after a step: fused, by the layers in float32, by the layers in float64."""
    fused, eager, exact = (copy.deepcopy(module) for _ in range(3))
    with Ops() as ops:
        run(fused, images, "cpu")
    assert ops.calls["training_project"] == ops.calls["training_project_backward"] > 0
    with Ops() as ops:
        run(eager, images, "reference")
        run(exact.double(), images.double(), "auto")  # which has no kernels for float64
    assert not ops.calls
    return fused, eager, exact


def error(found: list[Tensor], exact: list[Tensor]) -> float:
    """Norm of what all tensors together are off by."""
    pairs = zip(found, exact, strict=True)
    return sum(float((x.double() - y).square().sum()) for x, y in pairs) ** 0.5


def gradients(module: nn.Module) -> list[Tensor]:
    return [p.grad for p in module.parameters() if p.grad is not None]


def assert_as_good_as_eager(module: nn.Module, images: Tensor) -> None:
    fused, eager, exact = three_ways(module, images)
    truth = gradients(exact)
    assert len(gradients(fused)) == len(truth)
    assert error(gradients(fused), truth) <= 2 * error(gradients(eager), truth)
    for (name, x), y in zip(fused.named_buffers(), exact.buffers(), strict=True):
        torch.testing.assert_close(x.double(), y.double(), rtol=1e-4, atol=1e-4, msg=name)


@pytest.mark.parametrize("padding", ["same", "symmetric"])
@pytest.mark.parametrize("name", NAMES)
def test_gradients_and_statistics(
    name: str, padding: str, make: Callable[..., EfficientNet]
) -> None:
    assert_as_good_as_eager(make(name, padding=padding), torch.randn(2, 3, 97, 130))


@pytest.mark.parametrize("which", ["all", "some"])
def test_frozen_norms(which: str, make: Callable[..., EfficientNet]) -> None:
    backbone = make()
    norms = [m for m in backbone.modules() if isinstance(m, nn.BatchNorm2d)]
    for norm in norms if which == "all" else norms[::2]:
        norm.eval().requires_grad_(False)
    before = norms[0].running_mean.clone()  # type: ignore[union-attr, operator]
    assert_as_good_as_eager(backbone, torch.randn(2, 3, 64, 64))
    assert torch.equal(norms[0].running_mean, before)  # type: ignore[arg-type]


def test_statistics_move_once_a_step(make: Callable[..., EfficientNet]) -> None:
    backbone = make()
    images = torch.randn(2, 3, 64, 64)
    run(backbone, images, "cpu")
    counts = {
        int(m.num_batches_tracked) for m in backbone.modules() if isinstance(m, nn.BatchNorm2d)
    }  # type: ignore[arg-type]
    assert counts == {1}


@pytest.mark.parametrize("reason", ["hook", "kind", "padding", "fused"])
def test_the_layers_run_where_they_must(reason: str, make: Callable[..., EfficientNet]) -> None:
    backbone = make()
    block = backbone.stages()[1][0]
    seen: list[int] = []
    if reason == "hook":
        block.bn2.register_forward_hook(lambda *_: seen.append(1))
    elif reason == "kind":
        block.bn2 = nn.InstanceNorm2d(96)  # type: ignore[assignment]
    elif reason == "padding":
        block.conv_dw.padding_mode = "reflect"
    else:
        backbone.fused = False
    with Ops() as ops:
        run(backbone, torch.randn(2, 3, 64, 64), "auto")
    assert not ops.calls
    assert len(seen) == (reason == "hook")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast(dtype: torch.dtype, make: Callable[..., EfficientNet]) -> None:
    backbone = make()
    images = torch.randn(2, 3, 64, 64)
    with torch.autocast("cpu", dtype):
        fused, eager, exact = three_ways(backbone, images)
    truth = gradients(exact)
    assert all(g.dtype == torch.float32 for g in gradients(fused))
    assert error(gradients(fused), truth) <= 2 * error(gradients(eager), truth)


def test_the_memory_of_a_step() -> None:
    peak = {}
    images = torch.randn(2, 3, 256, 256)
    for backend in ("reference", "cpu"):
        torch.manual_seed(0)
        model = edet.create_model("tf_efficientdet_d0", num_classes=2)
        trainer = edet.Trainer(model, steps=10, batch_size=2)
        boxes, labels = [torch.tensor([[8.0, 8, 90, 120]])] * 2, [torch.tensor([1])] * 2
        with edet_kernels.backend(backend), profile(profile_memory=True) as events:
            trainer.step(images, boxes, labels)
        held = peak[backend] = 0
        for event in events.kineto_results.events():
            if event.name() == "[memory]":
                held += event.nbytes()
                peak[backend] = max(peak[backend], held)
    assert peak["cpu"] <= 0.55 * peak["reference"], peak


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_compiled_without_a_graph_break(make: Callable[..., EfficientNet]) -> None:
    plain = make()
    images = torch.randn(2, 3, 64, 64)
    compiled = copy.deepcopy(plain)
    run(torch.compile(compiled, backend="aot_eager", fullgraph=True), images, "auto")  # type: ignore[arg-type]
    run(plain, images, "auto")
    assert error(gradients(compiled), [g.double() for g in gradients(plain)]) < 1e-3
