"""A predictor computes from the weights that its model has, whoever wrote them, and how."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parameters_to_vector, vector_to_parameters
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

import edet
from edet.fused.describe import Mismatch, check_pointwise
from edet.fused.module import PackedModule
from edet.training.trainer import MovingAverage, Trainer

IMAGE = torch.randint(0, 256, (3, 64, 64), dtype=torch.uint8, generator=torch.manual_seed(1))
Write = Callable[[edet.EfficientDet, dict[str, Tensor]], None]


def make(model: edet.EfficientDet) -> edet.Predictor:
    return edet.Predictor(model, image_size=(64, 64), score_threshold=0.0)


def truth(state: dict[str, Tensor]) -> edet.Detections:
    """What a model that has never had other weights than ``state`` finds."""
    model = edet.create_model("tf_efficientdet_lite0", num_classes=3, width=16, cells=1)
    model.load_state_dict(state)
    return make(model)(IMAGE)


@pytest.fixture
def model() -> edet.EfficientDet:
    return edet.create_model("tf_efficientdet_lite0", num_classes=3, width=16, cells=1)


def other(model: nn.Module) -> dict[str, Tensor]:
    return {
        key: 1.2 * tensor + 0.01 if tensor.is_floating_point() else tensor + 1
        for key, tensor in model.state_dict().items()
    }


# --- writes that raise a version, move an address or exchange an object ---------------------------


@torch.no_grad()
def copied(model: edet.EfficientDet, new: dict[str, Tensor]) -> None:
    for key, tensor in model.state_dict().items():
        tensor.copy_(new[key])


@torch.no_grad()
def interpolated(model: edet.EfficientDet, new: dict[str, Tensor]) -> None:
    for key, tensor in model.state_dict(keep_vars=True).items():
        if tensor.is_floating_point():
            tensor.lerp_(new[key], 1.0)
        else:
            tensor.copy_(new[key])


@torch.no_grad()
def for_each(model: edet.EfficientDet, new: dict[str, Tensor]) -> None:
    own = model.state_dict()
    torch._foreach_copy_(list(own.values()), [new[key] for key in own])


def from_vector(model: edet.EfficientDet, new: dict[str, Tensor]) -> None:
    values = [new[name] for name, _ in model.named_parameters()]
    vector_to_parameters(parameters_to_vector(values), model.parameters())
    with torch.no_grad():
        for name, buffer in model.named_buffers():
            buffer.copy_(new[name])


def layer_by_layer(model: edet.EfficientDet, new: dict[str, Tensor]) -> None:
    for name, module in model.named_modules():
        if not list(module.children()) and module.state_dict():
            module.load_state_dict({k: new[f"{name}.{k}"] for k in module.state_dict()})


def assigned_layer_by_layer(model: edet.EfficientDet, new: dict[str, Tensor]) -> None:
    for name, module in model.named_modules():
        if not list(module.children()) and module.state_dict():
            state = {k: new[f"{name}.{k}"].clone() for k in module.state_dict()}
            module.load_state_dict(state, assign=True)


def partially(model: edet.EfficientDet, new: dict[str, Tensor]) -> None:
    keys = list(new)
    for part in (keys[::2], keys[1::2]):
        model.load_state_dict({key: new[key] for key in part}, strict=False)


@torch.no_grad()
def set_to(model: edet.EfficientDet, new: dict[str, Tensor]) -> None:
    for key, tensor in model.state_dict(keep_vars=True).items():
        tensor.set_(new[key].clone())


def data_set(model: edet.EfficientDet, new: dict[str, Tensor]) -> None:
    for key, tensor in model.state_dict(keep_vars=True).items():
        tensor.data = new[key].clone()


def parameters_replaced(model: edet.EfficientDet, new: dict[str, Tensor]) -> None:
    for name, module in model.named_modules():
        for key, _ in [*module.named_parameters(recurse=False)]:
            setattr(module, key, nn.Parameter(new[f"{name}.{key}"].clone()))
        for key, _ in [*module.named_buffers(recurse=False)]:
            setattr(module, key, new[f"{name}.{key}"].clone())


def averaged(model: edet.EfficientDet, new: dict[str, Tensor]) -> None:
    source = copy.deepcopy(model)
    source.load_state_dict(new)
    average = AveragedModel(source, multi_avg_fn=get_ema_multi_avg_fn(0.0), use_buffers=True)
    average.module = model
    average.n_averaged += 1
    average.update_parameters(source)


def moving_average(model: edet.EfficientDet, new: dict[str, Tensor]) -> None:
    source = copy.deepcopy(model)
    source.load_state_dict(new)
    average = MovingAverage(model, decay=0.0)
    average.model = model
    average.update(source)


SEEN: dict[str, Write] = {
    f.__name__: f
    for f in (
        *(copied, interpolated, for_each, from_vector, layer_by_layer, assigned_layer_by_layer),
        *(partially, set_to, data_set, parameters_replaced, averaged, moving_average),
    )
}


# --- writes that cannot be seen from Python -------------------------------------------------------


def through_data(model: edet.EfficientDet, new: dict[str, Tensor]) -> None:
    for key, tensor in model.state_dict(keep_vars=True).items():
        tensor.data.copy_(new[key])


def through_numpy(model: edet.EfficientDet, new: dict[str, Tensor]) -> None:
    for key, tensor in model.state_dict(keep_vars=True).items():
        tensor.detach().numpy()[...] = new[key].numpy()


def through_storage(model: edet.EfficientDet, new: dict[str, Tensor]) -> None:
    for key, tensor in model.state_dict(keep_vars=True).items():
        tensor.untyped_storage().copy_(new[key].contiguous().untyped_storage())


UNSEEN: dict[str, Write] = {f.__name__: f for f in (through_data, through_numpy, through_storage)}


def assert_same(found: edet.Detections, expected: edet.Detections) -> None:
    torch.testing.assert_close(found.scores, expected.scores, rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(found.boxes, expected.boxes, rtol=1e-4, atol=1e-2)


@pytest.mark.parametrize("frozen", [False, True])
@pytest.mark.parametrize("name", [*SEEN, *UNSEEN])
def test_a_new_predictor_sees_every_write(
    name: str, frozen: bool, model: edet.EfficientDet
) -> None:
    new = other(model)
    if frozen:
        model.eval().freeze()
    before = [make(model)(IMAGE) for _ in range(2)][-1]
    (SEEN | UNSEEN)[name](model, new)
    expected = truth(new)
    assert (before.scores[0] - expected.scores[0]).abs() > 1e-3
    assert_same(make(model)(IMAGE), expected)
    with torch.no_grad():  # and so does the model by itself, once it is frozen anew
        found = [x for maps in model.freeze()(torch.zeros(1, 3, 64, 64)) for x in maps]
        model.unfreeze()
    wanted = [x.detach() for maps in model(torch.zeros(1, 3, 64, 64)) for x in maps]
    for x, y in zip(found, wanted, strict=True):
        torch.testing.assert_close(x, y, rtol=0, atol=1e-4 * float(y.abs().max()))


@pytest.mark.parametrize("name", SEEN)
def test_a_kept_predictor_sees_what_can_be_seen(name: str, model: edet.EfficientDet) -> None:
    new = other(model)
    predictor = make(model)
    for _ in range(3):  # planned
        predictor(IMAGE)
    SEEN[name](model, new)
    for _ in range(3):
        assert_same(predictor(IMAGE), truth(new))
    assert predictor.stats().plans == 1
    images = torch.randn(1, 3, 64, 64)
    with torch.no_grad():
        found = model(images)[0][0]
    wanted = model.requires_grad_()(images)[0][0].detach()
    torch.testing.assert_close(found, wanted, rtol=0, atol=1e-4 * float(wanted.abs().max()))


@pytest.mark.parametrize("name", UNSEEN)
def test_a_kept_predictor_is_told_by_repack(name: str, model: edet.EfficientDet) -> None:
    new = other(model)
    predictor = make(model)
    for _ in range(3):
        predictor(IMAGE)
    UNSEEN[name](model, new)
    for part in model.modules():
        if isinstance(part, PackedModule):
            part.repack()
    for _ in range(3):
        assert_same(predictor(IMAGE), truth(new))


def test_two_predictors_of_a_changing_model(model: edet.EfficientDet) -> None:
    first, second = make(model), make(model)
    for _ in range(2):
        copied(model, other(model))
        expected = truth(model.state_dict())
        for predictor in (first, second) * 3:
            assert_same(predictor(IMAGE), expected)
    assert first.stats().plans == second.stats().plans == 1  # neither undoes the other's


@pytest.mark.parametrize("kept", [False, True])
def test_the_average_of_every_epoch_is_evaluated(kept: bool, model: edet.EfficientDet) -> None:
    trainer = Trainer(
        model, steps=20, batch_size=2, learning_rate=0.05, warmup_steps=0, average_decay=0.5
    )
    boxes, labels = [torch.tensor([[10.0, 10, 60, 60]])] * 2, [torch.tensor([1])] * 2
    average = trainer.average.model
    predictor = make(average)
    scores = []
    for _ in range(3):
        trainer.step(torch.randn(2, 3, 128, 128), boxes, labels)
        found = (predictor if kept else make(average))(IMAGE)
        assert_same(found, truth(average.state_dict()))
        scores.append(float(found.scores[0]))
    assert len(set(scores)) == 3


def test_an_average_that_was_frozen_by_hand(model: edet.EfficientDet) -> None:
    average = MovingAverage(model, decay=0.0)
    average.model.freeze()
    images = torch.randn(1, 3, 64, 64)
    with torch.no_grad():
        before = average.model(images)[0][0]
        copied(model, other(model))
        average.update(model)
        found = average.model(images)[0][0]
    assert not torch.equal(found, before)
    wanted = model.eval()(images)[0][0].detach()
    torch.testing.assert_close(found, wanted, rtol=0, atol=1e-4 * float(wanted.abs().max()))


def test_writes_between_training_and_evaluation(model: edet.EfficientDet) -> None:
    """As libraries for averages do: copied in through ``.data``, evaluated, put back."""
    images = torch.randn(1, 3, 64, 64)
    with torch.no_grad():
        model.eval()(images)
        model.train()
        through_data(model, other(model))
        found = model.eval()(images)[0][0]
    wanted = model(images)[0][0].detach()
    torch.testing.assert_close(found, wanted, rtol=0, atol=1e-4 * float(wanted.abs().max()))


@pytest.mark.parametrize(
    ("layer", "changes"),
    [
        ("box_net.predict.conv_dw", {"dilation": (2, 2), "padding": (2, 2)}),
        ("class_net.conv_rep.0.conv_dw", {"padding_mode": "circular"}),
        ("box_net.conv_rep.0.conv_dw", {"dilation": (2, 2), "padding": "same"}),
        ("backbone.blocks.1.1.conv_dw", {"dilation": (2, 2), "padding": (2, 2)}),
    ],
)
def test_a_convolution_that_was_made_another(model, layer, changes):
    """Its numbers are attributes, not weights: what was packed before went on being used."""

    def change(of: edet.EfficientDet) -> edet.EfficientDet:
        for name, value in changes.items():
            setattr(of.get_submodule(layer), name, value)
        of.get_submodule(layer)._reversed_padding_repeated_twice = [1, 1, 1, 1]
        return of

    model.eval()
    images = torch.randn(1, 3, 64, 64)
    changed, frozen = change(copy.deepcopy(model)), copy.deepcopy(model)
    predictor = make(frozen)
    with torch.no_grad():
        for network in (model, frozen):
            before = network(images)
            found, right = change(network)(images), changed(images)
            for ours, theirs in zip(found, right, strict=True):
                torch.testing.assert_close(ours, theirs)
            assert any(not torch.equal(found[i][0], before[i][0]) for i in range(2))
    found, right = predictor(IMAGE), make(changed)(IMAGE)
    torch.testing.assert_close(found.scores, right.scores)
    torch.testing.assert_close(found.boxes, right.boxes)


def test_a_pointwise_convolution_with_a_padding_is_no_plain_one():
    with pytest.raises(Mismatch, match="x: the 1×1 convolution has a padding"):
        check_pointwise("x", nn.Conv2d(3, 3, 1, padding=1))
