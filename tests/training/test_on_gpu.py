"""Training on a GPU, by the Triton kernels, against PyTorch's layers; on the CPU by the CPU's."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

import edet
import edet_kernels
from edet_kernels.testing.numeric import check_network

#: A device, the backend that has kernels for a step of the BiFPN and the heads there, and where
#: these are in ``torch.ops``.
PLACES = [
    ("cpu", "cpu", "edet_kernels"),
    pytest.param("cuda", "triton", "edet_kernels_triton", marks=pytest.mark.gpu),
]


class Ops(TorchDispatchMode):
    """Counts the calls of our ops by namespace and name."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: dict[tuple[str, str], int] = {}

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        if function.namespace.startswith("edet_"):
            name = function.namespace, function.__name__.split(".")[0]
            self.calls[name] = self.calls.get(name, 0) + 1
        return function(*args, **(kwargs or {}))


def loss_of(outputs: tuple[list[Tensor], list[Tensor]]) -> Tensor:
    return sum(((x.double() - 0.3) ** 2).mean() for maps in outputs for x in maps)  # type: ignore[return-value]


def gradients(module: nn.Module, images: Tensor) -> dict[str, Tensor]:
    module.zero_grad()
    loss_of(module(images)).backward()
    return {n: p.grad.double() for n, p in module.named_parameters() if p.grad is not None}


def error(found: dict[str, Tensor], exact: dict[str, Tensor]) -> float:
    """Of all gradients as one vector, as a fraction of its length."""
    assert found.keys() == exact.keys()
    apart = sum((found[n] - x).square().sum() for n, x in exact.items())
    return float(apart / sum(x.square().sum() for x in exact.values())) ** 0.5


@pytest.fixture(autouse=True)
def exact_float32(monkeypatch: pytest.MonkeyPatch) -> None:
    """PyTorch's layers without TF32."""
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)


@pytest.mark.parametrize(("device", "backend", "namespace"), PLACES)
def test_gradients_of_a_step(
    small: edet.EfficientDet, device: str, backend: str, namespace: str
) -> None:
    images = torch.randn(4, 3, 64, 64, device=device)
    model = small.to(device).train()
    layers, double = copy.deepcopy(model), copy.deepcopy(model).double()
    # auto: what has no kernel on the device, as the backbone's training on a GPU, runs its layers
    with Ops() as ops:
        found = gradients(model, images)
    assert ops.calls[namespace, "training_node"] > 0
    assert ops.calls[namespace, "training_node_backward"] > 0
    with edet_kernels.backend("reference"):
        eager, exact = gradients(layers, images), gradients(double, images.double())
    check_network("gradients", error(found, exact), error(eager, exact), torch.float32)
    for (name, x), y in zip(model.state_dict().items(), double.state_dict().values(), strict=True):
        torch.testing.assert_close(x.double(), y.double(), rtol=1e-4, atol=1e-4, msg=name)


@pytest.mark.parametrize(("device", "backend", "namespace"), PLACES)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_gradients_under_autocast(
    small: edet.EfficientDet, device: str, backend: str, namespace: str, dtype: torch.dtype
) -> None:
    """Of the BiFPN and the heads alone, whose layers differ."""
    maps = [torch.randn(2, c, s, s, device=device) for c, s in ((40, 16), (112, 8), (320, 4))]
    model = small.to(device).train()
    layers, double = copy.deepcopy(model), copy.deepcopy(model).double()

    def after_the_backbone(module: edet.EfficientDet, inputs: list[Tensor]) -> dict[str, Tensor]:
        with torch.autocast(device, dtype, enabled=inputs[0].dtype != torch.float64):
            pyramid = module.fpn(inputs)
            outputs = module.class_net(pyramid), module.box_net(pyramid)
        loss_of(outputs).backward()
        return {n: p.grad.double() for n, p in module.named_parameters() if p.grad is not None}

    with Ops() as ops, edet_kernels.backend(backend):
        found = after_the_backbone(model, maps)
    assert ops.calls[namespace, "training_node"] > 0
    with edet_kernels.backend("reference"):
        eager = after_the_backbone(layers, maps)
        exact = after_the_backbone(double, [x.double() for x in maps])
    check_network("gradients", error(found, exact), error(eager, exact), dtype)
