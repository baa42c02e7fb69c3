"""A predictor computes what its model does now: numbers, words, functions of layers count."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import edet
import small_models
from edet.fused.module import PackedModule

IMAGE = torch.randint(0, 256, (3, 64, 64), dtype=torch.uint8, generator=torch.manual_seed(1))
INPUT = torch.randn(1, 3, 64, 64, generator=torch.manual_seed(2))
Change = Callable[[edet.EfficientDet], None]


class Adapter(nn.Conv2d):
    """A convolution with a correction of low rank beside it, as LoRA's are written."""

    def __init__(self, conv: nn.Conv2d) -> None:
        super().__init__(conv.in_channels, conv.out_channels, 1)
        self.load_state_dict(conv.state_dict())
        self.down = nn.Conv2d(conv.in_channels, 2, 1, bias=False)
        self.up = nn.Conv2d(2, conv.out_channels, 1, bias=False)
        self.scaling, self._disabled, self.active = {"default": 1.0}, False, ["default"]

    def forward(self, x: Tensor) -> Tensor:
        y = super().forward(x)
        if self._disabled:
            return y
        return y + sum(self.scaling[name] * self.up(self.down(x)) for name in self.active)


class Backbone(small_models.Backbone):
    """One whose activation is a function, as many are."""

    def __init__(self) -> None:
        super().__init__()
        self.act: Callable[[Tensor], Tensor] = F.silu

    def forward(self, x: Tensor) -> list[Tensor]:
        maps = []
        for conv in self.convs:
            x = self.act(conv(x))
            maps.append(x)
        return maps[-3:]


def published() -> edet.EfficientDet:
    options = {"num_classes": 3, "width": 16, "cells": 1, "head_repeats": 1}
    return edet.create_model("tf_efficientdet_d0", **options)


def adapted() -> edet.EfficientDet:
    model = published()
    model.class_net.predict.conv_pw = Adapter(model.class_net.predict.conv_pw)
    return model


def own_backbone() -> edet.EfficientDet:
    options = {"num_classes": 3, "width": 16, "cells": 1, "head_repeats": 1}
    return edet.create_model("tf_efficientdet_d0", backbone=Backbone(), **options)


def words(name: str, value: str) -> Change:
    def change(model: edet.EfficientDet) -> None:
        for module in model.modules():
            if hasattr(module, name):
                setattr(module, name, value)

    return change


def rescaled(model: edet.EfficientDet) -> None:
    model.class_net.predict.conv_pw.scaling["default"] = 9.0


def disabled(model: edet.EfficientDet) -> None:
    model.class_net.predict.conv_pw._disabled = True


def deactivated(model: edet.EfficientDet) -> None:
    model.class_net.predict.conv_pw.active.clear()


def another_function(model: edet.EfficientDet) -> None:
    model.backbone.act = torch.tanh


CASES: dict[str, tuple[Callable[[], edet.EfficientDet], Change]] = {
    "activation": (published, words("activation", "relu")),
    "fusion": (published, words("fusion", "unbounded")),
    "pool": (published, words("pool", "symmetric")),
    "number in a dict": (adapted, rescaled),
    "private flag": (adapted, disabled),
    "list": (adapted, deactivated),
    "function": (own_backbone, another_function),
}


def make(model: edet.EfficientDet) -> edet.Predictor:
    return edet.Predictor(model, image_size=(64, 64), score_threshold=0.0)


def outputs(model: edet.EfficientDet) -> list[Tensor]:
    with torch.no_grad():
        return [x for maps in model(INPUT) for x in maps]


def by_layers(model: edet.EfficientDet) -> list[Tensor]:
    model = copy.deepcopy(model)
    for part in model.modules():
        if isinstance(part, PackedModule):
            part.fused = False
    return outputs(model)


@pytest.fixture(params=CASES)
def case(request: pytest.FixtureRequest) -> tuple[edet.EfficientDet, Change]:
    torch.manual_seed(4)
    build, change = CASES[request.param]
    return build().eval(), change


@pytest.mark.parametrize("frozen", [False, True])
def test_a_model(frozen: bool, case: tuple[edet.EfficientDet, Change]) -> None:
    model, change = case
    if frozen:
        model.freeze()
    before = [outputs(model) for _ in range(3)][-1]
    change(model)
    found, expected = outputs(model), by_layers(model)
    assert any((x - y).abs().max() > 1e-4 for x, y in zip(before, expected, strict=True))
    for x, y in zip(found, expected, strict=True):
        torch.testing.assert_close(x, y, rtol=0, atol=1e-4 * float(y.abs().max()))


def test_a_kept_predictor(case: tuple[edet.EfficientDet, Change]) -> None:
    model, change = case
    predictor = make(model)
    before = [predictor(IMAGE) for _ in range(3)][-1]
    assert predictor.stats().plans == 1
    change(model)
    expected = make(copy.deepcopy(model))(IMAGE)
    assert not torch.equal(before.scores, expected.scores)
    for _ in range(3):
        found = predictor(IMAGE)
        torch.testing.assert_close(found.scores, expected.scores, rtol=0, atol=1e-5)
        torch.testing.assert_close(found.boxes, expected.boxes, rtol=0, atol=1e-2)
    assert predictor.stats().plans == 1  # of the model as it is now


@pytest.mark.parametrize("wholly", [False, True])
def test_tensors_of_inference_mode(wholly: bool) -> None:
    """They have no version; one of them hid the versions of all others."""
    with torch.inference_mode(wholly):
        model = published()
    with torch.inference_mode():
        model.to(torch.bfloat16).float()
    predictor = make(model)
    before = [predictor(IMAGE) for _ in range(3)][-1]
    with torch.inference_mode(wholly), torch.no_grad():
        model.class_net.predict.conv_pw.weight.mul_(-2)
    found, expected = predictor(IMAGE), make(copy.deepcopy(model))(IMAGE)
    assert not torch.equal(found.scores, before.scores)
    torch.testing.assert_close(found.scores, expected.scores, rtol=0, atol=1e-5)
