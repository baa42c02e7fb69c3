"""torch.func and forward-mode derivatives see PyTorch's own operations, not results alone."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.func import functional_call, grad, jvp, stack_module_state, vmap

import edet
import edet_kernels
from edet_kernels.backend import BackendError
from small_models import small_model

# of torch's own rules for forward-mode derivatives
pytestmark = pytest.mark.filterwarnings("ignore:.torch.jit.script. is deprecated")

GENERATOR = torch.Generator().manual_seed(3)
IMAGES = torch.randn(2, 3, 64, 64, generator=GENERATOR)
DIRECTION = torch.randn(2, 3, 64, 64, generator=GENERATOR)


@pytest.fixture(params=["as made", "used", "frozen"])
def model(request: pytest.FixtureRequest) -> edet.EfficientDet:
    torch.manual_seed(0)
    options = {"num_classes": 3, "width": 16, "cells": 1, "head_repeats": 1}
    made = edet.create_model("tf_efficientdet_lite0", **options).eval().requires_grad_(False)
    if request.param == "frozen":
        made.freeze()
    if request.param != "as made":
        with torch.no_grad():
            made(IMAGES)
            made(IMAGES)
    return made


def first(model: edet.EfficientDet, images: Tensor) -> Tensor:
    classes, _ = model(images)
    return classes[0]


def by_differences(model: edet.EfficientDet) -> Tensor:
    double, step = copy.deepcopy(model).double(), 1e-7
    images, direction = IMAGES.double(), step * DIRECTION.double()
    with torch.no_grad():
        ahead, behind = first(double, images + direction), first(double, images - direction)
    return ((ahead - behind) / (2 * step)).float()


def assert_near(found: Tensor, expected: Tensor) -> None:
    assert (found - expected).abs().max() <= 0.01 * expected.abs().max()  # relu6 has kinks


@pytest.mark.parametrize("mode", [torch.no_grad, torch.enable_grad])
def test_a_derivative_in_a_direction(model: edet.EfficientDet, mode: type) -> None:
    with mode():
        _, tangent = jvp(lambda x: first(model, x), (IMAGES,), (DIRECTION,))
    assert_near(tangent, by_differences(model))


@torch.no_grad()
def test_dual_numbers(model: edet.EfficientDet) -> None:
    with forward_ad.dual_level():
        found = first(model, forward_ad.make_dual(IMAGES, DIRECTION))
        tangent = forward_ad.unpack_dual(found).tangent
    assert tangent is not None
    assert_near(tangent, by_differences(model))


@torch.no_grad()
def test_mapped_over_images(model: edet.EfficientDet) -> None:
    found = vmap(lambda x: first(model, x[None])[0])(IMAGES)
    torch.testing.assert_close(found, first(model, IMAGES), rtol=1e-4, atol=1e-4)


@torch.no_grad()
def test_an_ensemble() -> None:
    models = [small_model().eval() for _ in range(2)]
    state = stack_module_state(models)

    def one(parameters: dict[str, Tensor], buffers: dict[str, Tensor]) -> Tensor:
        return functional_call(models[0], (parameters, buffers), (IMAGES,))[0][0]

    found = vmap(one)(*state)
    for x, model in zip(found, models, strict=True):
        torch.testing.assert_close(x, first(model, IMAGES), rtol=1e-4, atol=1e-4)


def test_gradients_of_each_image() -> None:
    model = small_model().eval()
    parameters = {name: p.detach() for name, p in model.named_parameters()}

    def loss(parameters: dict[str, Tensor], image: Tensor) -> Tensor:
        return functional_call(model, parameters, (image[None],))[0][0].square().sum()

    found = vmap(grad(loss), (None, 0))(parameters, IMAGES)
    for i, image in enumerate(IMAGES):
        model.zero_grad()
        first(model, image[None]).square().sum().backward()
        for name, p in model.named_parameters():
            if p.grad is not None:
                torch.testing.assert_close(found[name][i], p.grad, rtol=1e-3, atol=1e-3)


@torch.no_grad()
def test_compiled() -> None:
    model = small_model().eval()
    compiled = torch.compile(lambda x: vmap(lambda y: first(model, y[None])[0])(x), backend="eager")
    expected = first(model, IMAGES)
    torch.testing.assert_close(compiled(IMAGES), expected, rtol=1e-4, atol=1e-4)


@torch.no_grad()
def test_an_op() -> None:
    x, direction = torch.randn(1, 8, 4, 4), torch.randn(1, 8, 4, 4)
    weights = torch.tensor([1.0, 1.0])

    def fused(x: Tensor) -> Tensor:
        return edet_kernels.weighted_fusion([x, x], weights, fusion="fast", activation="none")

    _, tangent = jvp(fused, (x,), (direction,))
    torch.testing.assert_close(tangent, fused(direction))
    with (
        edet_kernels.backend("cpu"),
        pytest.raises(BackendError, match=r"no rules for torch\.func"),
    ):
        vmap(fused)(x[None])
