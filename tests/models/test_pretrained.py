"""Models that come with their weights: files, cards, and what they find."""

import pytest
import torch

import edet
from edet.demo import photograph
from edet.models.described import read_description, save_described
from edet.models.pretrained import PRETRAINED, pretrained_file


@pytest.mark.parametrize("name", PRETRAINED)
def test_files(name):
    weights = pretrained_file(name)
    description = read_description(weights)
    assert weights.stat().st_size <= 7_000_000
    assert description.class_names and 0 < description.figures["AP"] < description.figures["AP50"]
    card = weights.with_suffix(".md").read_text(encoding="utf-8")
    assert name in card and f"{description.figures['AP50']:.3f}" in card
    assert pretrained_file("tf_efficientdet_d0") is None


def test_the_person_in_a_portrait_is_found():
    found = edet.Predictor("edet_lite0_person")(photograph())
    assert found.names == ["person"]
    assert found.scores[0] > 0.5
    x1, y1, x2, y2 = found.boxes[0].tolist()  # the portrait is 512×600, the head its middle third
    assert x1 < 150 and y1 < 150 and x2 > 370 and y2 > 450


def test_weights_are_those_of_the_file():
    model = edet.create_model("edet_lite0_person")
    assert model.training and model.config.num_classes == 1
    assert model.config.image_size == (320, 320)
    stored = edet.read_checkpoint(pretrained_file("edet_lite0_person"))
    assert {x.dtype for x in stored.values() if x.is_floating_point()} == {torch.float16}
    state = model.state_dict()
    assert stored.keys() == state.keys()
    assert all(torch.equal(x.to(state[key].dtype), state[key]) for key, x in stored.items())


def test_they_are_a_start_for_other_classes():
    with pytest.raises(edet.CheckpointError, match="class"):
        edet.create_model("edet_lite0_person", num_classes=3)
    model = edet.create_model("edet_lite0_person", num_classes=3, reinit_head=True, image_size=256)
    assert model.config.num_classes == 3
    assert model.config.image_size == (256, 256)


def test_described_safetensors(tmp_path):
    model = edet.create_model("tf_efficientdet_lite0", width=16, cells=1, num_classes=2).eval()
    path = tmp_path / "cells.safetensors"
    save_described(model, path, class_names=["red", "white"], figures={"AP": 0.5})
    description = read_description(path)
    assert description.config == model.config
    assert (description.class_names, description.figures) == (["red", "white"], {"AP": 0.5})
    loaded = edet.Predictor(path).model.state_dict()
    assert all(torch.equal(x, loaded[key]) for key, x in model.state_dict().items())
    with pytest.raises(ValueError, match=r"needs a path that ends in \.pt"):
        save_described(model, path, training={"step": 1})
    with torch.no_grad():
        model.backbone.conv_stem.weight[0] = 1e6
    with pytest.raises(ValueError, match=r"conv_stem\.weight is not finite in torch\.float16"):
        save_described(model, tmp_path / "half.safetensors", dtype=torch.float16)
    assert not (tmp_path / "half.safetensors").exists()
    assert read_description(path).class_names == ["red", "white"]
