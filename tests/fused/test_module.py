"""Packed weights follow their sources: however these change, the fused ops see it."""

from __future__ import annotations

import copy
import io
import pickle
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parameters_to_vector, parametrize, vector_to_parameters

import edet
from edet.fused.module import PackedModule, fold_batch_norm

IMAGES = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(1))
Run = Callable[..., list[Tensor]]


def other(model: nn.Module) -> dict[str, Tensor]:
    """Another state dict for ``model``."""
    return {
        key: 1.05 * tensor if tensor.is_floating_point() else tensor + 1
        for key, tensor in model.state_dict().items()
    }


def step(optimizer: type[torch.optim.Optimizer], **options: object) -> Callable[..., None]:
    def change(model: edet.EfficientDet) -> None:
        outputs = model(IMAGES)
        sum((x**2).mean() for maps in outputs for x in maps).backward()
        with torch.no_grad():
            model(IMAGES)  # packed after the backward pass
        optimizer(model.parameters(), lr=0.1, **options).step()

    return change


def load(model: edet.EfficientDet) -> None:
    model.load_state_dict(other(model))


def load_assigned(model: edet.EfficientDet) -> None:
    model.load_state_dict(other(model), assign=True)


@torch.no_grad()
def average(model: edet.EfficientDet) -> None:
    for key, tensor in other(model).items():
        if tensor.is_floating_point():
            model.state_dict()[key].lerp_(tensor, 0.5)


@torch.no_grad()
def multiply(model: edet.EfficientDet) -> None:
    for p in model.parameters():
        p.mul_(1.05)


@torch.inference_mode()
def multiply_in_inference_mode(model: edet.EfficientDet) -> None:
    for p in model.parameters():
        p.mul_(1.05)


def foreach(model: edet.EfficientDet) -> None:
    with torch.no_grad():
        torch._foreach_mul_(list(model.parameters()), 1.05)


def set_data(model: edet.EfficientDet) -> None:
    for p in model.parameters():
        p.data = p.data * 1.05


def from_vector(model: edet.EfficientDet) -> None:
    vector_to_parameters(1.05 * parameters_to_vector(model.parameters()), model.parameters())


def from_vector_twice(model: edet.EfficientDet) -> None:
    for factor in (2, 0.525):  # what the first one freed may get the second one's values
        vector_to_parameters(factor * parameters_to_vector(model.parameters()), model.parameters())


def train(model: edet.EfficientDet) -> None:
    model.train()
    with torch.no_grad():
        model(3 * IMAGES + 1)
    model.eval()


@torch.no_grad()
def write_statistics(model: edet.EfficientDet) -> None:
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.running_var.fill_(0.7)


def reset_statistics(model: edet.EfficientDet) -> None:
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.reset_running_stats()


def replace_parameters(model: edet.EfficientDet) -> None:
    for module in model.modules():
        if isinstance(module, nn.Conv2d):
            module.weight = nn.Parameter(1.05 * module.weight.detach())


def replace_modules(model: edet.EfficientDet) -> None:
    conv = model.fpn.cells[0].nodes[2].after_combine.conv
    conv.bn = nn.BatchNorm2d(16).eval()
    model.class_net.predict.conv_pw = nn.Conv2d(16, 27, 1)
    model.box_net.predict.conv_pw = nn.Conv2d(16, 36, 1)
    model.backbone.bn1 = nn.BatchNorm2d(32).eval()


def remove_bias(model: edet.EfficientDet) -> None:
    for node in model.fpn.cells[0].nodes:
        node.after_combine.conv.conv_pw.bias = None


class Halved(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x / 2


def reparametrise(model: edet.EfficientDet) -> None:
    for node in model.fpn.cells[0].nodes:
        parametrize.register_parametrization(node.after_combine.conv.conv_pw, "weight", Halved())


def behind_the_back(model: edet.EfficientDet) -> None:
    for p in model.parameters():
        p.data.mul_(1.05)
    for module in model.modules():
        if isinstance(module, PackedModule):
            module.repack()


CHANGES = {
    "load_state_dict": load,
    "load_state_dict, assign": load_assigned,
    "SGD": step(torch.optim.SGD, momentum=0.9),
    "SGD, fused": step(torch.optim.SGD, fused=True),
    "AdamW": step(torch.optim.AdamW),
    "AdamW, for each": step(torch.optim.AdamW, foreach=True),
    "AdamW, fused": step(torch.optim.AdamW, fused=True),
    "moving average": average,
    "in place": multiply,
    "in place, inference mode": multiply_in_inference_mode,
    "in place, all at once": foreach,
    ".data =": set_data,
    "vector_to_parameters": from_vector,
    "vector_to_parameters, twice": from_vector_twice,
    "training forward": train,
    "running_var": write_statistics,
    "reset_running_stats": reset_statistics,
    "new parameters": replace_parameters,
    "new modules": replace_modules,
    "no bias": remove_bias,
    "parametrization": reparametrise,
    "through .data, then repack": behind_the_back,
}


def assert_close(found: list[Tensor], expected: list[Tensor]) -> None:
    for x, y in zip(found, expected, strict=True):
        assert (x - y).abs().max() <= 2e-5 * y.abs().max()


@pytest.mark.parametrize("name", CHANGES)
def test_fused_ops_see_the_change(
    name: str, small: edet.EfficientDet, fused: Run, assert_agrees: Callable[..., None]
) -> None:
    before = [fused(small, IMAGES) for _ in range(3)][-1]  # replayed
    CHANGES[name](small)
    after = fused(small, IMAGES)
    assert any(
        (x - y).abs().max() > 1e-3 * y.abs().max() for x, y in zip(after, before, strict=True)
    )
    assert_agrees(small, IMAGES)
    for x, y in zip(fused(small, IMAGES), after, strict=True):
        assert torch.equal(x, y)


@pytest.mark.parametrize("part", ["backbone", "fpn", "class_net", "box_net"])
def test_every_source_counts(part: str, small: edet.EfficientDet) -> None:
    module = getattr(small, part)
    x = IMAGES if part == "backbone" else torch.zeros(1, 16, 4, 4)
    with torch.no_grad():
        packed = module.packed(x)[0]
        assert module.packed(x)[0] is packed
        for name, tensor in module.state_dict().items():
            tensor.add_(1)
            assert module.packed(x)[0] is not packed, name
            packed = module.packed(x)[0]


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_dtype_and_back(
    small: edet.EfficientDet, dtype: torch.dtype, fused: Run, layers: Run
) -> None:
    fused(small, IMAGES)
    small.to(dtype)
    converted = fused(small, IMAGES.to(dtype))
    assert {x.dtype for x in converted} == {dtype}
    if dtype == torch.float64:
        assert_close(converted, layers(small, IMAGES.double()))
    small.float()
    assert_close(fused(small, IMAGES), layers(small, IMAGES))


def test_moving_one_submodule(small: edet.EfficientDet, fused: Run, layers: Run) -> None:
    fused(small, IMAGES)
    for module in small.modules():
        if isinstance(module, nn.Conv2d):
            module.to(torch.float16)  # rounds the weights
            module.to(torch.float32)
    after = fused(small, IMAGES)
    assert_close(after, layers(small, IMAGES))


@pytest.mark.gpu
def test_device_and_back(small: edet.EfficientDet, fused: Run) -> None:
    expected = fused(small, IMAGES)
    small.cuda()
    found = [x.cpu() for x in fused(small, IMAGES.cuda())]
    for x, y in zip(found, expected, strict=True):
        torch.testing.assert_close(x, y, rtol=1e-2, atol=1e-2)  # TF32
    small.cpu()
    assert_close(fused(small, IMAGES), expected)


def saved_whole(model: nn.Module) -> nn.Module:
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


COPIES = {
    "deepcopy": copy.deepcopy,
    "pickle": lambda model: pickle.loads(pickle.dumps(model)),
    "torch.save": saved_whole,
}


@pytest.mark.parametrize("name", COPIES)
def test_copies_are_independent(
    name: str, small: edet.EfficientDet, fused: Run, layers: Run
) -> None:
    before = fused(small, IMAGES)
    clone = COPIES[name](small)
    assert_close(fused(clone, IMAGES), before)
    multiply(clone)
    assert_close(fused(clone, IMAGES), layers(clone, IMAGES))
    assert all(x.equal(y) for x, y in zip(fused(small, IMAGES), before, strict=True))


def test_packed_weights_are_not_state(small: edet.EfficientDet, fused: Run) -> None:
    keys, size = list(small.state_dict()), len(pickle.dumps(small))
    fused(small, IMAGES)
    assert list(small.state_dict()) == keys
    assert len(pickle.dumps(small)) == size


def test_functional_call(small: edet.EfficientDet, fused: Run) -> None:
    before = fused(small, IMAGES)
    state = other(small)
    with torch.no_grad():
        swapped = torch.func.functional_call(small, state, (IMAGES,))
    assert all(x.equal(y) for x, y in zip(fused(small, IMAGES), before, strict=True))
    load(small)
    expected = fused(small, IMAGES)
    assert_close([x for maps in swapped for x in maps], expected)


def test_model_made_in_inference_mode(
    randomise: Callable[[nn.Module], nn.Module], fused: Run, layers: Run
) -> None:
    with torch.inference_mode():
        model = edet.create_model(
            "tf_efficientdet_d0", width=16, cells=1, head_repeats=1, num_classes=3
        )
        randomise(model).eval()
        before = fused(model, IMAGES)
        for p in model.parameters():  # these have no version to look at
            p.mul_(1.05)
        after = fused(model, IMAGES)
        assert not any(x.equal(y) for x, y in zip(after, before, strict=True))
        clone = copy.deepcopy(model)
    assert_close(fused(clone, IMAGES), after)


def test_packed_in_inference_mode_then_without_gradients(
    small: edet.EfficientDet, fused: Run
) -> None:
    with torch.inference_mode():
        first = [x for maps in small(IMAGES) for x in maps]
    assert all(x.equal(y) for x, y in zip(fused(small, IMAGES), first, strict=True))


def test_batch_norm_left_in_training_mode(
    small: edet.EfficientDet, fused: Run, layers: Run
) -> None:
    before = fused(small, IMAGES)
    small.fpn.cells[0].nodes[0].after_combine.conv.bn.train()
    state = copy.deepcopy(small.state_dict())
    found = fused(small, IMAGES)
    small.load_state_dict(state)
    assert_close(found, layers(small, IMAGES))
    small.eval()
    small.load_state_dict(state)
    assert_close(fused(small, IMAGES), before)


def test_gradients_when_asked_for(small: edet.EfficientDet) -> None:
    assert all(x.requires_grad for maps in small(IMAGES) for x in maps)
    small.requires_grad_(False)
    assert not any(x.requires_grad for maps in small(IMAGES) for x in maps)
    assert small.fpn.packed(torch.zeros(1, 16, 4, 4)) is not None
    images = IMAGES.clone().requires_grad_()
    small(images)[0][0].sum().backward()
    assert images.grad is not None
    assert images.grad.abs().sum() > 0


def test_fold_batch_norm() -> None:
    bn = nn.BatchNorm2d(4, eps=1e-3).double().eval()
    with torch.no_grad():
        for tensor in (bn.weight, bn.bias, bn.running_mean, bn.running_var):
            tensor.uniform_(0.5, 1.5)
    bias, x = torch.randn(4, dtype=torch.float64), torch.randn(2, 4, 3, 3, dtype=torch.float64)
    scale, shift = fold_batch_norm(bn, bias)
    expected = bn(x + bias.view(-1, 1, 1))
    torch.testing.assert_close(x * scale.view(-1, 1, 1) + shift.view(-1, 1, 1), expected)
    scale, shift = fold_batch_norm(bn)
    torch.testing.assert_close(x * scale.view(-1, 1, 1) + shift.view(-1, 1, 1), bn(x))
    with pytest.raises(ValueError, match="bn must track running statistics"):
        fold_batch_norm(nn.BatchNorm2d(4, track_running_stats=False))
