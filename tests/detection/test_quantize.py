"""Post-training quantisation: near the float model, kept parts, reports, files, bad arguments."""

from __future__ import annotations

import copy
import math
import pickle
from dataclasses import replace

import pytest
import torch

import edet
import edet_kernels
from edet.fused.int8 import Int8Backbone
from edet.fused.ranges import Observer, Steps, found_range, rounded_weight, signal_to_noise
from tests.small_models import small_model

SMALL = {"width": 32, "cells": 2, "head_repeats": 2, "num_classes": 3, "image_size": 64}


def images(count: int = 4, size: int = 64) -> torch.Tensor:
    """Smooth pictures, so that maps are not noise."""
    generator = torch.Generator().manual_seed(1)
    coarse = torch.rand(count, 3, 8, 8, generator=generator)
    smooth = torch.nn.functional.interpolate(coarse, (size, size), mode="bicubic")
    return (255 * smooth.clamp(0, 1)).to(torch.uint8)


def batch_of(model, pictures=None):
    """Normalised images as the model wants them."""
    config = model.config
    pictures = list(images() if pictures is None else pictures)
    size = pictures[0].shape[-1]
    return edet.preprocess.preprocess(
        pictures, (size, size), mean=config.mean, std=config.std
    ).images


def detector(name: str = "tf_efficientdet_d0", **options) -> edet.EfficientDet:
    """A small detector with batch norms that fit its maps."""
    torch.manual_seed(0)
    model = edet.create_model(name, **(SMALL | options))
    model.train()
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, torch.nn.BatchNorm2d):
                module.momentum = None  # the average of what it sees
        batch = batch_of(model, images(8))
        model(batch)
    return model.eval()


@pytest.fixture(scope="module")
def d0():
    return detector()


@pytest.fixture(scope="module")
def quantised(d0):
    return edet.quantize(d0, images())


def outputs(model, batch=None):
    batch = batch_of(model) if batch is None else batch
    with torch.no_grad():
        classes, boxes = model(batch)
    return [*classes, *boxes]


def decibels(exact, found):
    """Spread of the values over that of the difference."""
    wrong = sum(float((x - y).square().sum()) for x, y in zip(exact, found, strict=True))
    spread = sum(float((x - x.mean()).square().sum()) for x in exact)
    return math.inf if wrong == 0 else 10 * math.log10(spread / wrong)


@torch.no_grad()
def part_errors(model, small, batch=None):
    """Decibels of each part, given the maps of the float model."""
    batch = batch_of(model) if batch is None else batch
    maps = model.backbone(batch)
    pyramid = model.fpn(maps)
    return {
        # random blocks amplify what is wrong before them; see test_blocks_are_near_the_float_ones
        "backbone": decibels(maps[:1], small.backbone(batch)[:1]),
        "fpn": decibels(pyramid, small.fpn(maps)),
        "class_net": decibels(model.class_net(pyramid), small.class_net(pyramid)),
        "box_net": decibels(model.box_net(pyramid), small.box_net(pyramid)),
    }


LEAST = {"backbone": 17.0, "fpn": 26.0, "class_net": 28.0, "box_net": 28.0}


def assert_near(model, small, keep=()):
    for part, value in part_errors(model, small).items():
        assert value == math.inf if part in keep else LEAST[part] < value < 80, (part, value)


@pytest.mark.parametrize("name", ["tf_efficientdet_d0", "efficientdet_d0"])
@pytest.mark.parametrize("method", ["mse", "percentile", "minmax"])
def test_outputs_are_near_the_float_models(name, method):
    model = detector(name)
    small = edet.quantize(model, images(), method=method)
    assert_near(model, small)
    assert all(x.dtype == torch.float32 for x in outputs(small))


def test_trained_outputs_are_near_the_float_models():
    pytest.importorskip("safetensors")
    model = edet.create_model("edet_lite0_person").eval()
    small = edet.quantize(model, images(4, 128), image_size=128)
    batch = batch_of(model, images(4, 128))
    for part, value in part_errors(model, small, batch).items():
        assert value > 17, (part, value)


@pytest.mark.parametrize("name", ["tf_efficientdet_d0", "tf_efficientdet_lite0"])
@torch.no_grad()
def test_blocks_are_near_the_float_ones(name):
    """Each block on the float model's map, so that errors do not add up."""
    with torch.enable_grad():
        model = detector(name)
    settings = edet.quantize(model, images()).backbone.int8
    packed = model.backbone.pack(torch.float32)
    small = Int8Backbone(packed, settings)
    batch = batch_of(model)
    seen = {}
    Int8Backbone.watch(packed, batch, lambda name, x, _: seen.setdefault(name, x))
    source = "stem"
    for i, (block, own) in enumerate(zip(packed.source.blocks, small.blocks, strict=True)):
        scale, zero = small.steps[i].one
        y = edet_kernels.int8.mbconv(
            edet_kernels.int8.quantize(seen[source], 1 / scale, zero),
            own.expand, own.depthwise, own.squeeze, own.project,
            stride=block.depthwise[0].stride[0],
            padding=packed.source.padding,
            activation=packed.source.activation,
            residual=own.residual,
        )  # fmt: skip
        source = f"{i}.out"
        found = edet_kernels.int8.dequantize(y, *small.steps[i + 1].one)
        assert signal_to_noise([seen[source]], [found]) > 24, i


def test_the_model_given_stays_as_it_is(d0):
    before = outputs(d0)
    state = copy.deepcopy(d0.state_dict())
    small = edet.quantize(d0, images())
    assert all(torch.equal(x, y) for x, y in zip(before, outputs(d0), strict=True))
    assert all(torch.equal(state[key], value) for key, value in d0.state_dict().items())
    assert state.keys() == small.state_dict().keys()


@pytest.mark.skipif(not edet_kernels.library.load(), reason=edet_kernels.library.status())
def test_kernels_compute_what_the_reference_does(quantised):
    batch = batch_of(quantised)
    with torch.no_grad():
        maps = quantised.backbone(batch)
        with edet_kernels.backend("reference"):
            exact = quantised.fpn(maps)
            heads = quantised.class_net(exact)
        found = quantised.fpn(maps)
        assert all(torch.equal(x, y) for x, y in zip(found, exact, strict=True))
        for x, y in zip(quantised.class_net(found), heads, strict=True):
            assert torch.equal(x, y)


def test_softmax_and_per_channel_fusion():
    for options in ({"fusion": "softmax"}, {"fusion_per_channel": True}, {"fusion": "sum"}):
        model = detector(**options)
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if name.endswith("edge_weights"):
                    parameter.uniform_(-0.5, 2.0)
        assert_near(model, edet.quantize(model, images()))


@pytest.mark.parametrize(
    "keep",
    [
        ("backbone",),
        ("fpn",),
        ("class_net", "box_net"),
        ("class_net.predict", "box_net.predict"),
        ("backbone.blocks.0", "backbone.blocks.2.1", "backbone.blocks.6"),
    ],
)
def test_what_is_kept_is_float(d0, quantised, keep):
    part = edet.quantize(d0, images(), keep=keep)
    assert_near(d0, part, keep)
    before, after = part_errors(d0, quantised), part_errors(d0, part)
    assert all(before[name] != after[name] for name in {k.split(".")[0] for k in keep})
    if "class_net.predict" in keep:  # a rounding less
        assert after["class_net"] > before["class_net"]


def test_all_parts_kept_is_the_float_model(d0):
    part = edet.quantize(d0, images(), keep=["backbone", "fpn", "class_net", "box_net"])
    assert all(torch.equal(x, y) for x, y in zip(outputs(d0), outputs(part), strict=True))
    with pytest.raises(ValueError, match=r"model must be a result of edet\.quantize"):
        edet.int8_errors(part, images())


def test_a_backbone_of_ones_own_must_be_kept():
    model = small_model()
    with pytest.raises(ValueError, match="backbone has no int8 form: keep it in float"):
        edet.quantize(model, images())
    small = edet.quantize(model, images(), keep=["backbone"])
    assert part_errors(model.eval(), small)["class_net"] > 20


def test_report_names_every_layer(quantised):
    report = edet.int8_errors(quantised, images(2))
    names = [layer.name for layer in report.layers]
    assert {"backbone.0.out", "backbone.15.out", "fpn.15.out", "class_net.predict.4"} <= set(names)
    assert len(names) == 16 + 16 + 5 + 5
    assert all(0 < layer.decibels < 70 for layer in report.layers)
    worst = report.worst(3)
    assert worst[0].decibels == min(layer.decibels for layer in report.layers)
    assert f"{worst[0].decibels:.1f} dB" in str(report)


def test_predictor_and_plans(quantised):
    predictor = edet.Predictor(quantised, score_threshold=0.0)
    picture = images(1)[0]
    first, second = predictor(picture), predictor(picture)  # as it is, then planned
    third = predictor(picture)
    assert len(first.boxes) > 0
    for found in (second, third):
        assert torch.equal(first.boxes, found.boxes)
        assert torch.equal(first.scores, found.scores)


def test_frozen_and_copied_models_compute_the_same(quantised):
    expected = outputs(quantised)
    frozen = copy.deepcopy(quantised).freeze()
    again = pickle.loads(pickle.dumps(quantised))
    for _ in range(3):
        for model in (frozen, again):
            assert all(torch.equal(x, y) for x, y in zip(expected, outputs(model), strict=True))


def test_new_weights_are_rounded_anew(d0):
    small = edet.quantize(d0, images())
    before = outputs(small)
    with torch.no_grad():
        small.class_net.predict.conv_pw.bias += 1
    after = outputs(small)
    assert torch.allclose(after[0], before[0] + 1, atol=1e-4)


def test_training_runs_the_float_layers(d0):
    small = edet.quantize(d0, images())
    batch = batch_of(d0)
    small.train()
    small(batch)[0][0].sum().backward()
    assert small.class_net.predict.conv_pw.weight.grad.abs().sum() > 0


@pytest.mark.parametrize("suffix", [".safetensors", ".pt"])
def test_a_saved_model_computes_the_same(d0, tmp_path, suffix):
    if suffix == ".safetensors":
        pytest.importorskip("safetensors")
    keep = ["backbone.blocks.0", "box_net", "class_net.predict"]
    small = edet.quantize(d0, images(), keep=keep)
    path = tmp_path / f"small{suffix}"
    edet.save_described(small, path, class_names=["a", "b", "c"])
    loaded, description = edet.load_described(path)
    assert description.class_names == ["a", "b", "c"]
    for x, y in zip(outputs(small), outputs(loaded), strict=True):
        assert torch.equal(x, y)
    assert edet.Predictor(path)(images(1)[0]).names is not None
    plain = edet.create_model("tf_efficientdet_d0", checkpoint=path, **SMALL)
    for x, y in zip(outputs(d0), outputs(plain.eval()), strict=True):  # the weights are float
        assert torch.equal(x, y)


def test_a_file_without_its_ranges_is_refused(d0, quantised, tmp_path):
    path = tmp_path / "small.pt"
    edet.save_described(quantised, path)
    content = torch.load(path, weights_only=True)
    del content["state_dict"]["int8.fpn.3.out"]
    torch.save(content, path)
    with pytest.raises(edet.CheckpointError, match=r"int8 ranges that do not fit: '3\.out'"):
        edet.load_described(path)
    content["state_dict"]["int8.fpn.3.out"] = torch.full((2, 1), float("nan"))
    torch.save(content, path)
    with pytest.raises(edet.CheckpointError, match=r"3\.out must be two rows of finite numbers"):
        edet.load_described(path)


def test_bad_arguments_are_named(d0):
    for arguments, error, message in (
        (
            {"method": "best"},
            ValueError,
            "method must be one of mse, percentile, minmax, got 'b",
        ),
        ({"percentile": 0.99}, ValueError, r"percentile must be in \(50, 100\], got 0.99"),
        ({"batch_size": 0}, ValueError, "batch_size must be at least 1, got 0"),
        ({"keep": ["neck"]}, ValueError, "keep must name backbone, .* got 'neck'"),
        ({"keep": ["fpn.predict"]}, ValueError, "keep must name"),
        ({"keep": "fpn"}, TypeError, "keep must be a list of names, got the string 'fpn'"),
        ({"images": []}, edet.ImageError, "images must hold at least one image, got none"),
        ({"model": "tf_efficientdet_d0"}, TypeError, "model must be an EfficientDet, got str"),
        ({"model": copy.deepcopy(d0).double()}, ValueError, "model must be on the CPU in float32"),
    ):
        with pytest.raises(error, match=message):
            edet.quantize(**{"model": d0, "images": images(1), **arguments})


def test_maps_that_are_not_finite_are_refused(d0):
    broken = copy.deepcopy(d0)
    with torch.no_grad():
        broken.backbone.blocks[0][0].conv_dw.weight.fill_(float("nan"))
    with pytest.raises(ValueError, match="the maps of model must be finite, got others in ba"):
        edet.quantize(broken, images(1))


def test_another_dtype_is_refused(quantised):
    half = copy.deepcopy(quantised).to(torch.bfloat16)
    with pytest.raises(ValueError, match=r"must compute from float32 maps, got torch\.bfloat16"):
        outputs(half, torch.zeros(1, 3, 64, 64, dtype=torch.bfloat16))


def test_ranges_by_each_method():
    x = torch.zeros(1, 2, 100, 100)
    x[0, 0] = torch.linspace(0, 1, 10000).view(100, 100)
    x[0, 0, 0, 0] = 50.0
    x[0, 1] = torch.linspace(-2, 1, 10000).view(100, 100)
    observer = Observer()
    for counting in (False, True):
        observer.counting = counting
        observer.see("x", x, True)
        observer.see("one", x, False)
    whole = observer.ranges("minmax", 100)
    assert whole["x"].tolist() == [[0, -2], [50, 1]]
    assert whole["one"].tolist() == [[-2], [50]]
    cut = observer.ranges("percentile", 99.9)["x"]
    assert 1 <= cut[1, 0] < 1.5
    assert cut[1, 1] > 0.95
    best = observer.ranges("mse", 100)["x"]
    assert best[1, 0] == 50  # one value that far is worth rounding the others more coarsely
    counts = torch.zeros(1, 256, dtype=torch.float64)
    counts[0, :128], counts[0, 255] = 1e4, 1  # nearer, and one of many more
    assert found_range(torch.tensor([[0.0], [2.0]]), counts, "mse", 100)[1] < 1.2
    assert best[:, 1].tolist() == pytest.approx([-2, 1], abs=0.1)


def test_steps_hold_zero_exactly():
    steps = Steps.of(torch.tensor([[-0.3, 0.0, -1.0], [5.0, 0.0, 0.0]]))
    assert steps.zero.tolist() == [14, 0, 255]
    assert steps.scale[1] == steps.scale.min()  # a channel of zeros has the finest
    assert replace(steps).one == (pytest.approx(5.3 / 255), 14)
    whole, scale = rounded_weight(torch.tensor([[0.5, -1.0], [0.0, 0.0]]))
    assert whole.tolist() == [[64, -127], [0, 0]]
    assert scale.tolist() == [1 / 127, 1]


def test_an_empty_histogram_has_a_range():
    ends, counts = torch.zeros(2, 1), torch.zeros(1, 256, dtype=torch.float64)
    counts[0, 0] = 9
    for method in ("mse", "percentile"):
        assert found_range(ends, counts, method, 99.9).tolist() == [[0], [0]]
