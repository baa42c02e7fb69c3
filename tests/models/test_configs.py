"""The model table agrees with the paper and effdet, and bad requests say what is wrong."""

from __future__ import annotations

import numpy as np
import pytest
import torch

import edet
from edet.models.configs import checked_size, get_config

# size, width, cells, head repeats, levels, fusion, anchor scale, backbone
TABLE = {
    "d0": (512, 64, 3, 3, (3, 7), "fast", 4, "b0"),
    "d1": (640, 88, 4, 3, (3, 7), "fast", 4, "b1"),
    "d2": (768, 112, 5, 3, (3, 7), "fast", 4, "b2"),
    "d3": (896, 160, 6, 4, (3, 7), "fast", 4, "b3"),
    "d4": (1024, 224, 7, 4, (3, 7), "fast", 4, "b4"),
    "d5": (1280, 288, 7, 4, (3, 7), "fast", 4, "b5"),
    "d6": (1280, 384, 8, 5, (3, 7), "sum", 4, "b6"),
    "d7": (1536, 384, 8, 5, (3, 7), "sum", 5, "b6"),
    "d7x": (1536, 384, 8, 5, (3, 8), "sum", 4, "b7"),
    "lite0": (320, 64, 3, 3, (3, 7), "sum", 3, "lite0"),
    "lite1": (384, 88, 4, 3, (3, 7), "sum", 3, "lite1"),
    "lite2": (448, 112, 5, 3, (3, 7), "sum", 3, "lite2"),
    "lite3": (512, 160, 6, 4, (3, 7), "sum", 4, "lite3"),
    "lite3x": (640, 200, 6, 4, (3, 7), "sum", 3, "lite3"),
    "lite4": (640, 224, 7, 4, (3, 7), "sum", 4, "lite4"),
}


def test_list_models() -> None:
    tf = [f"tf_efficientdet_{scale}" for scale in TABLE]
    ap = [f"tf_efficientdet_d{i}_ap" for i in range(6)]
    native = [f"efficientdet_d{i}" for i in range(8)]
    assert sorted(edet.list_models()) == sorted(tf + ap + native)


@pytest.mark.parametrize("name", edet.list_models())
def test_table(name: str) -> None:
    config = get_config(name)
    assert config.name == name
    scale = name.removeprefix("tf_").removeprefix("efficientdet_").removesuffix("_ap")
    size, width, cells, repeats, levels, fusion, anchor_scale, backbone = TABLE[scale]
    assert config.image_size == (size, size)
    assert (config.width, config.cells, config.head_repeats) == (width, cells, repeats)
    assert (config.min_level, config.max_level) == levels
    assert (config.fusion, config.anchor_scale) == (fusion, anchor_scale)
    assert config.backbone == f"efficientnet_{backbone}"
    lite, native = "lite" in name, not name.startswith("tf_")
    assert config.activation == ("relu6" if lite else "swish")
    assert config.padding == ("symmetric" if native else "same")
    assert config.redundant_bias is not native
    assert config.mean == ((0.5,) * 3 if lite or name.endswith("ap") else (0.485, 0.456, 0.406))
    assert config.std == ((0.5,) * 3 if lite or name.endswith("ap") else (0.229, 0.224, 0.225))
    tf_ratios = ((1.0, 1.0), (1.4, 0.7), (0.7, 1.4))
    assert config.aspect_ratios == tf_ratios
    assert config.num_anchors == 9


@pytest.mark.parametrize(
    ("name", "near"),
    [
        ("d0", "tf_efficientdet_d0"),
        ("D7x", "tf_efficientdet_d7x"),
        ("lite3x", "tf_efficientdet_lite3x"),
        ("efficientdet-d3", "tf_efficientdet_d3"),
    ],
)
def test_short_names_suggest_the_whole_one(name: str, near: str) -> None:
    with pytest.raises(ValueError, match=rf"did you mean {near}[,?]"):
        get_config(name)


@pytest.mark.parametrize("name", ["resnet50", ""])
def test_unlike_names_are_told_where_the_list_is(name: str) -> None:
    with pytest.raises(ValueError, match=r"edet.list_models\(\) lists them"):
        get_config(name)


def test_unknown_name_gives_the_nearest_ones() -> None:
    with pytest.raises(
        ValueError, match=r"got 'tf_efficientdet_d8': did you mean tf_efficient.*\?"
    ):
        edet.create_model("tf_efficientdet_d8")
    with pytest.raises(ValueError, match=r"got 'resnet': edet\.list_models"):
        edet.create_model("resnet")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"fusion": "max"}, "fusion must be one of fast, softmax, unbounded, sum, got 'max'"),
        ({"num_classes": 0}, "num_classes must be an integer ≥ 1, got 0"),
        ({"num_classes": 1.5}, "num_classes must be an integer ≥ 1, got 1.5"),
        ({"width": -8}, "width must be an integer ≥ 1, got -8"),
        ({"cells": 0}, "cells must be an integer ≥ 1, got 0"),
        ({"head_repeats": -1}, "head_repeats must be an integer ≥ 0, got -1"),
        ({"image_size": (512, 0)}, r"image_size must be two positive integers, got \(512, 0\)"),
        ({"image_size": 0}, r"image_size must be two positive integers, got \(0, 0\)"),
        ({"min_level": 7}, "levels must be 1 ≤ min_level < max_level, got min_level 7"),
        ({"min_level": 0}, "levels must be 1 ≤ min_level < max_level, got min_level 0"),
        ({"max_level": 4}, "levels of efficientnet_b0 must be min_level ≤ 5 ≤ max_level, got 3"),
    ],
)
def test_impossible_changes(changes: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        edet.create_model("tf_efficientdet_d0", **changes)


@pytest.mark.parametrize(
    "size",
    [
        *(96, np.int64(96), np.uint8(96), torch.tensor(96), (96, 96), [96, 96]),
        *(torch.Size((96, 96)), np.array([96, 96]), torch.tensor([96, 96]), (np.int32(96), 96)),
    ],
    ids=repr,
)
def test_kinds_of_image_sizes(size):
    config = edet.create_model("tf_efficientdet_lite0", width=8, cells=1, image_size=size).config
    assert config.image_size == (96, 96)
    assert [type(n) for n in config.image_size] == [int, int]
    assert checked_size(size) == (96, 96)


@pytest.mark.parametrize(
    "size",
    [0, -1, 96.0, (96.0, 96.0), np.float32(96), True, None, "96", (96,), (96, 96, 3), (96, 0), {}],
    ids=repr,
)
def test_sizes_that_are_none(size):
    with pytest.raises(ValueError, match="image_size must be two positive integers, got"):
        checked_size(size)
