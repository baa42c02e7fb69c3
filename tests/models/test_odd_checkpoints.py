"""Checkpoints as other scripts write them: averages of parameters, odd objects beside them."""

from __future__ import annotations

import bz2
import collections
import functools
import io
import json
import lzma
import re
import types
import zipfile
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import edet
from edet.models.reading import CheckpointError


def new(seed: int, **changes: Any) -> edet.EfficientDet:
    torch.manual_seed(seed)
    options = {"width": 16, "cells": 1, "head_repeats": 1, "num_classes": 3, **changes}
    model = edet.create_model("tf_efficientdet_d0", **options).eval()
    with torch.no_grad():
        for x in (*model.parameters(), *model.buffers()):
            if x.is_floating_point():
                x.uniform_(0.5, 1.5)
    return model


def parameters(model: edet.EfficientDet) -> dict[str, Tensor]:
    return {name: p.detach() for name, p in model.named_parameters()}


def assert_loads(path: Path, expected: dict[str, Tensor], *, ema: bool = True) -> None:
    model = new(9)
    edet.load_checkpoint(model, path, ema=ema)
    for key, x in model.state_dict().items():
        assert torch.equal(x, expected[key]), key


def averages(plain: edet.EfficientDet, average: edet.EfficientDet) -> dict[str, dict[str, Any]]:
    state, own = plain.state_dict(), parameters(average)
    wrapped = {f"module.{key}": x for key, x in state.items()}
    return {
        "of parameters": {"model": state, "ema": {"decay": 0.99, "shadow": own}},
        "beside, wrapped": {
            "model": wrapped,
            "shadow": {f"module.{key}": x for key, x in own.items()},
        },
        "in a list": {
            "model": state,
            "ema": {"shadow_params": list(own.values()), "collected_params": None},
        },
        "in a list, wrapped": {
            "epoch": 1,
            "state_dict": wrapped,
            "averager": {"shadow_params": list(own.values())},
        },
    }


@pytest.mark.parametrize("name", averages(new(1), new(1)))
def test_averages_of_parameters_alone(name: str, tmp_path: Path) -> None:
    plain, average = new(1), new(2)
    torch.save(averages(plain, average)[name], tmp_path / "model.pth")
    statistics = plain.state_dict()
    assert_loads(tmp_path / "model.pth", statistics | parameters(average))
    assert_loads(tmp_path / "model.pth", statistics, ema=False)


def test_a_list_of_other_parameters_is_told(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    plain = new(1)
    content = {"model": plain.state_dict(), "ema": {"shadow_params": [torch.ones(3)]}}
    torch.save(content, tmp_path / "model.pth")
    assert_loads(tmp_path / "model.pth", plain.state_dict())
    assert "ema.shadow_params is left out" in caplog.text


def test_lightnings_weight_averaging(tmp_path: Path) -> None:
    """Its ``state_dict`` is the averaged one."""
    plain, average = new(1), new(2)
    content = {
        "state_dict": {f"model.{key}": x for key, x in average.state_dict().items()},
        "current_model_state": {f"model.{key}": x for key, x in plain.state_dict().items()},
        "averaging_state": {"n_averaged": torch.tensor(3)},
    }
    torch.save(content, tmp_path / "last.ckpt")
    assert_loads(tmp_path / "last.ckpt", average.state_dict())
    assert_loads(tmp_path / "last.ckpt", plain.state_dict(), ema=False)


def beside(model: edet.EfficientDet) -> dict[str, Any]:
    optimizer = torch.optim.SGD(model.parameters(), 0.1, momentum=0.9)
    empty = collections.defaultdict(float, {"loss": 1.0})
    return {
        "history": collections.defaultdict(list, {"loss": [1.0, 2.0]}),
        "nested": collections.defaultdict(
            functools.partial(collections.defaultdict, float), {"train": empty}
        ),
        "last": collections.deque([1.0, 2.0], maxlen=3),
        "options": types.SimpleNamespace(rate=0.1, sizes=range(3), part=slice(1, 2)),
        "pattern": re.compile("backbone"),
        "set": frozenset([1]),
        "optimizer": optimizer,
        "schedule": torch.optim.lr_scheduler.StepLR(optimizer, 1),
        "criterion": torch.nn.CrossEntropyLoss(),
    }


@pytest.mark.parametrize("name", beside(new(1)))
def test_objects_beside_the_weights(name: str, tmp_path: Path) -> None:
    model = new(1)
    content = {"state_dict": model.state_dict(), name: beside(model)[name]}
    torch.save(content, tmp_path / "model.pth")
    assert_loads(tmp_path / "model.pth", model.state_dict())


def test_a_state_dict_in_a_defaultdict(tmp_path: Path) -> None:
    model = new(1)
    torch.save(collections.defaultdict(list, model.state_dict()), tmp_path / "model.pth")
    assert_loads(tmp_path / "model.pth", model.state_dict())


def archived(data: bytes) -> bytes:
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w") as archive:
        archive.writestr("model.pth", data)
    return file.getvalue()


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (bz2.compress, "is compressed by bzip2: unpack it"),
        (lzma.compress, "is compressed by xz: unpack it"),
        (lambda data: b"\x28\xb5\x2f\xfd" + data, "is compressed by zstd: unpack it"),
        (archived, r"is an archive of model\.pth: unpack it"),
        (lambda _: json.dumps({"weight_map": {}}, indent=1).encode(), "is JSON, not a checkpoint"),
        (lambda _: b'[{"name": 1}]', "is JSON, not a checkpoint"),
    ],
)
def test_other_files_are_named(make: Any, message: str, tmp_path: Path) -> None:
    file = io.BytesIO()
    torch.save({"a": torch.ones(3)}, file)
    (tmp_path / "model.pth").write_bytes(make(file.getvalue()))
    with pytest.raises(CheckpointError, match=message):
        edet.read_checkpoint(tmp_path / "model.pth")


def test_a_prediction_of_more_dimensions_is_not_of_other_classes(tmp_path: Path) -> None:
    """It was told to be of 3 classes and not 3, and to make a model with 3."""
    state = new(1).state_dict()
    state["class_net.predict.conv_pw.bias"] = state["class_net.predict.conv_pw.bias"][:, None]
    torch.save(state, tmp_path / "model.pth")
    with pytest.raises(CheckpointError, match=r"mis-shaped \(1\): .* \(27, 1\) not \(27,\)"):
        edet.load_checkpoint(new(2), tmp_path / "model.pth")
