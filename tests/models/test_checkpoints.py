"""Checkpoints: every form that is read, every misfit that is refused, and nothing by halves."""

from __future__ import annotations

import argparse
import datetime
import importlib.util
import os
import pickle
import tarfile
import warnings
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import edet
from edet.models.checkpoints import CLASS_KEYS, guess_models
from edet.models.configs import get_config
from edet.models.reading import CheckpointError

needs_safetensors = pytest.mark.skipif(
    importlib.util.find_spec("safetensors") is None, reason="safetensors is not installed"
)
SUFFIXES = [".pth", ".pt", pytest.param(".safetensors", marks=needs_safetensors)]


def new(**changes: object) -> edet.EfficientDet:
    options = {"width": 16, "cells": 1, "head_repeats": 1, "num_classes": 3, **changes}
    return edet.create_model("tf_efficientdet_d0", **options).eval()


@pytest.fixture
def model(randomise: Callable[[nn.Module], nn.Module]) -> edet.EfficientDet:
    return randomise(new())


def same(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return list(a) == list(b) and all(a[key].equal(b[key]) for key in a)


def copied(model: nn.Module) -> dict[str, Tensor]:
    return {key: tensor.clone() for key, tensor in model.state_dict().items()}


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_round_trip(model: edet.EfficientDet, tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"model{suffix}"
    edet.save_checkpoint(model.to(memory_format=torch.channels_last), path)
    other = new()
    edet.load_checkpoint(other, path)
    assert same(other.state_dict(), model.state_dict())
    assert [p.name for p in tmp_path.iterdir()] == [path.name]


def test_create_model_with_a_checkpoint(model: edet.EfficientDet, tmp_path: Path) -> None:
    edet.save_checkpoint(model, tmp_path / "model.pth")
    loaded = new(checkpoint=tmp_path / "model.pth")
    assert same(loaded.state_dict(), model.state_dict())


@pytest.mark.parametrize("wrapper", ["", "module.", "model.", "_orig_mod.module.", "module.model."])
@pytest.mark.parametrize("key", [None, "state_dict", "state_dict_ema", "model"])
def test_wrapped_state_dicts(
    model: edet.EfficientDet, tmp_path: Path, key: str | None, wrapper: str
) -> None:
    state = {wrapper + k: v for k, v in model.state_dict().items()}
    extra = {"epoch": 3, "args": argparse.Namespace(lr=0.1), "optimizer": {"state": {}}}
    torch.save(state if key is None else {key: state, **extra}, tmp_path / "model.pth")
    other = new()
    edet.load_checkpoint(other, tmp_path / "model.pth")
    assert same(other.state_dict(), model.state_dict())


def test_averaged_weights_first(model: edet.EfficientDet, tmp_path: Path) -> None:
    plain, path = new(), tmp_path / "model.pth"
    torch.save({"state_dict": plain.state_dict(), "state_dict_ema": model.state_dict()}, path)
    assert same(edet.read_checkpoint(path), model.state_dict())
    assert same(edet.read_checkpoint(path, ema=False), plain.state_dict())


PREFIXES = [
    *("", "module.", "model.", "net.", "network.", "detector.model.", "_orig_mod.model.module."),
    *("model._orig_mod.", "module.model._orig_mod.module."),
]


@pytest.mark.parametrize("beside", [False, True])
@pytest.mark.parametrize("prefix", PREFIXES)
def test_networks_inside_of_others(
    model: edet.EfficientDet, tmp_path: Path, prefix: str, beside: bool
) -> None:
    """effdet's bench, Lightning, AveragedModel, DataParallel, torch.compile, in any order."""
    state: dict[str, object] = {prefix + key: value for key, value in model.state_dict().items()}
    if beside:
        outer = prefix.rpartition("model.")[0]
        state = {
            "n_averaged": torch.tensor(3),
            f"{outer}anchors.boxes": torch.zeros(19, 4),
            "criterion.weight": torch.ones(3),
            **state,
            "loss_fn.alpha": torch.ones(()),
        }
    for content in (state, {"epoch": 1, "state_dict": state}, {"checkpoint": {"weights": state}}):
        torch.save(content, tmp_path / "model.pth")
        other = new()
        edet.load_checkpoint(other, tmp_path / "model.pth")
        assert same(other.state_dict(), model.state_dict())


def test_wrapped_layers(model: edet.EfficientDet, tmp_path: Path) -> None:
    expected = copied(model)
    wrapped = {
        k.replace("fpn.", "fpn._orig_mod.").replace("class_net.", "class_net._orig_mod."): v
        for k, v in expected.items()
    }
    wrapped = {
        k.replace(".bn1.", ".bn1._checkpoint_wrapped_module."): v for k, v in wrapped.items()
    }
    torch.save(wrapped, tmp_path / "model.pth")
    assert same(edet.read_checkpoint(tmp_path / "model.pth"), expected)


NAMES = [
    *("model_state_dict", "model_state", "ema", "model_ema", "ema_state_dict", "state_dict_ema"),
    *("net", "network", "weights", "module", "params", "params_ema", "student", "best"),
]


@pytest.mark.parametrize("name", NAMES)
def test_names_of_a_state_dict(model: edet.EfficientDet, tmp_path: Path, name: str) -> None:
    optimizer = torch.optim.AdamW(model.parameters())
    content = {"epoch": 3, name: model.state_dict(), "optimizer": optimizer.state_dict()}
    torch.save(content, tmp_path / "model.pth")
    for ema in (False, True):
        assert same(edet.read_checkpoint(tmp_path / "model.pth", ema=ema), model.state_dict())


@pytest.mark.parametrize(
    ("plain", "averaged"),
    [
        ("model", "ema"),
        ("model_state_dict", "ema_state_dict"),
        ("state_dict", "model_ema"),
        ("net", "net_ema"),
        ("params", "params_ema"),
        ("model", "modelEMA"),
        ("model", "swa_model"),
        ("weights", "averaged"),
    ],
)
def test_averaged_weights_beside_others(
    model: edet.EfficientDet, tmp_path: Path, plain: str, averaged: str
) -> None:
    other, path = new(), tmp_path / "model.pth"
    for content in (
        {plain: other.state_dict(), averaged: model.state_dict()},
        {averaged: {"module": model.state_dict(), "updates": 7}, plain: other.state_dict()},
        {
            "state_dict": {
                **{f"{plain}.{k}": v for k, v in other.state_dict().items()},
                **{f"{averaged}.module.{k}": v for k, v in model.state_dict().items()},
            }
        },
    ):
        torch.save(content, path)
        assert same(edet.read_checkpoint(path), model.state_dict())
        assert same(edet.read_checkpoint(path, ema=False), other.state_dict())


def test_an_averaged_model_of_torch(model: edet.EfficientDet, tmp_path: Path) -> None:
    average = torch.optim.swa_utils.AveragedModel(model)
    content = {"first": new().state_dict(), "second": average.state_dict()}
    torch.save(content, tmp_path / "model.pth")
    assert same(edet.read_checkpoint(tmp_path / "model.pth"), model.state_dict())


def test_several_state_dicts_are_listed(model: edet.EfficientDet, tmp_path: Path) -> None:
    path, state = tmp_path / "model.pth", model.state_dict()
    torch.save({"teacher": new().state_dict(), "student": state}, path)
    with pytest.raises(CheckpointError, match=r"several state dicts.* 'teacher', 'student'"):
        edet.load_checkpoint(model, path)
    torch.save({"last": state, "best": {k: v.clone() for k, v in state.items()}}, path)
    assert same(edet.read_checkpoint(path), state)  # they are equal


def test_which_was_taken_is_logged(
    model: edet.EfficientDet, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    content = {"model": new().state_dict(), "ema": model.state_dict()}
    torch.save(content, tmp_path / "model.pth")
    with caplog.at_level("INFO", logger="edet"):
        edet.read_checkpoint(tmp_path / "model.pth")
    assert "'ema' is taken of model., ema." in caplog.text


@pytest.mark.parametrize("legacy", [False, True])
def test_what_training_scripts_store_beside(
    model: edet.EfficientDet, tmp_path: Path, legacy: bool
) -> None:
    """effdet's train.py: the metric is a NumPy scalar, the arguments hold paths."""
    content = {
        "epoch": 5,
        "arch": "tf_efficientdet_d0",
        "state_dict": model.state_dict(),
        "args": argparse.Namespace(lr=0.08, output=Path("out"), sizes=[np.int64(1)]),
        "metric": np.float64(0.31),
        "more": [np.float32(1), np.bool_(True), np.zeros(3), np.dtype("int16"), np.str_("x")],
        "began": datetime.datetime(2024, 1, 1),
        "took": datetime.timedelta(seconds=3),
    }
    path = tmp_path / "model_best.pth.tar"
    torch.save(content, path, _use_new_zipfile_serialization=not legacy)
    other = new()
    edet.load_checkpoint(other, path)
    assert same(other.state_dict(), model.state_dict())


def test_numpy_objects_are_not_made(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A data type of a wrong description, given to NumPy, reads memory that is not there."""

    class Crafted:
        def __reduce__(self) -> object:
            state = (3, "|", None, ("a",), {"a": (np.dtype("O"), 0)}, 8, 1, 0)
            return np.dtype, ("V8", False, True), state

    torch.save({"metric": Crafted(), **new().state_dict()}, tmp_path / "model.pth")
    edet.load_checkpoint(new(), tmp_path / "model.pth")


def test_other_formats_are_named(tmp_path: Path) -> None:
    path = tmp_path / "model.pt"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.jit.save(torch.jit.trace(nn.Linear(2, 2), torch.ones(1, 2)), path)
    with pytest.raises(CheckpointError, match=r"TorchScript program: save the state_dict") as e:
        edet.read_checkpoint(path)
    assert "weights_only" not in str(e.value)
    with tarfile.open(tmp_path / "old.tar", "w") as archive:
        archive.add(path, "model.pt")
    with pytest.raises(CheckpointError, match="it is a tar archive") as e:
        edet.read_checkpoint(tmp_path / "old.tar")
    assert "weights_only" not in str(e.value)


def test_a_file_that_holds_itself(tmp_path: Path) -> None:
    content: dict[str, object] = {"a": 1}
    content["again"] = [content, content]
    torch.save(content, tmp_path / "model.pth")
    with pytest.raises(CheckpointError, match="other values for a, again"):
        edet.read_checkpoint(tmp_path / "model.pth")


def test_legacy_files_and_missing_counters(model: edet.EfficientDet, tmp_path: Path) -> None:
    state = {k: v for k, v in model.state_dict().items() if "num_batches" not in k}
    torch.save(state, tmp_path / "old.pth", _use_new_zipfile_serialization=False)
    other = new()
    edet.load_checkpoint(other, tmp_path / "old.pth")
    assert all(other.state_dict()[key].equal(state[key]) for key in state)


def test_published_checkpoint_of_another_number_of_classes(
    model: edet.EfficientDet, tmp_path: Path
) -> None:
    edet.save_checkpoint(model, tmp_path / "model.pth")
    other = new(num_classes=7)
    before = copied(other)
    with pytest.raises(CheckpointError) as caught:
        edet.load_checkpoint(other, tmp_path / "model.pth")
    message = str(caught.value)
    assert "has 3 classes, the model 7" in message
    assert all(key in message for key in CLASS_KEYS)
    assert "num_classes=3" in message
    assert "reinit_head=True" in message
    assert caught.value.misshaped == list(CLASS_KEYS)
    assert same(copied(other), before)

    edet.load_checkpoint(other, tmp_path / "model.pth", reinit_head=True)
    for key, tensor in other.state_dict().items():
        assert tensor.equal(before[key] if key in CLASS_KEYS else model.state_dict()[key])
    created = new(num_classes=7, checkpoint=tmp_path / "model.pth", reinit_head=True)
    assert created.class_net.predict.conv_pw.weight.shape[0] == 63


def test_every_misfit_is_listed(model: edet.EfficientDet, tmp_path: Path) -> None:
    state = copied(model)
    del state["fpn.resample.3.conv.bn.bias"]
    state["extra.weight"] = torch.zeros(1)
    state["backbone.bn1.weight"] = torch.zeros(7)
    torch.save(state, tmp_path / "model.pth")
    other = new()
    before = copied(other)
    with pytest.raises(CheckpointError) as caught:
        edet.load_checkpoint(other, tmp_path / "model.pth", reinit_head=True)
    message = str(caught.value)
    assert "missing (1): fpn.resample.3.conv.bn.bias" in message
    assert "unexpected (1): extra.weight" in message
    assert "mis-shaped (1): backbone.bn1.weight (7,) not (32,)" in message
    assert caught.value.missing == ["fpn.resample.3.conv.bn.bias"]
    assert caught.value.unexpected == ["extra.weight"]
    assert same(copied(other), before)


def test_checkpoint_of_another_model(tmp_path: Path) -> None:
    with torch.device("cpu"):
        d1 = edet.create_model("tf_efficientdet_d1")
    edet.save_checkpoint(d1, tmp_path / "d1.pth")
    with pytest.raises(CheckpointError, match=r"not a checkpoint of this tf_efficientdet_d0") as e:
        edet.create_model("tf_efficientdet_d0", checkpoint=tmp_path / "d1.pth")
    assert "it looks like one of: tf_efficientdet_d1, tf_efficientdet_d1_ap" in str(e.value)
    assert "more)" in str(e.value)
    assert len(e.value.missing) + len(e.value.unexpected) + len(e.value.misshaped) > 100


@pytest.mark.parametrize("name", edet.list_models())
def test_guess(name: str) -> None:
    with torch.device("meta"):
        state = edet.create_model(name, num_classes=5).state_dict()
    guesses = guess_models(state)
    assert name in guesses
    config = get_config(name)
    for guess in guesses:  # the others differ in what a state dict does not show
        other = get_config(guess)
        assert (other.width, other.cells, other.backbone, other.max_level) == (
            config.width,
            config.cells,
            config.backbone,
            config.max_level,
        )
        assert (other.fusion, other.padding) == (config.fusion, config.padding)


def test_checkpoint_of_another_kind_of_network(model: edet.EfficientDet, tmp_path: Path) -> None:
    torch.save(nn.Linear(2, 2).state_dict(), tmp_path / "linear.pth")
    with pytest.raises(CheckpointError, match="none of its keys is one of an EfficientDet"):
        edet.load_checkpoint(model, tmp_path / "linear.pth")


def test_numbers_that_are_not_finite(model: edet.EfficientDet, tmp_path: Path) -> None:
    state = copied(model)
    state["fpn.cell.0.fnode.0.combine.edge_weights"][0] = float("nan")
    torch.save(state, tmp_path / "model.pth")
    before = copied(model)
    with pytest.raises(CheckpointError, match=r"got NaN or ∞ in fpn\.cell\.0\.fnode\.0\.combine"):
        edet.load_checkpoint(model, tmp_path / "model.pth")
    assert same(copied(model), before)


@pytest.mark.parametrize("suffix", SUFFIXES)
@pytest.mark.parametrize(
    ("begin", "message"),
    [
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:0", "is a pointer of Git LFS"),
        (b"\n<!DOCTYPE html><html>", "is a web page"),
        (b"\x1f\x8b\x08", "is compressed by gzip"),
        (b"", "is empty"),
    ],
)
def test_what_is_found_in_the_place_of_a_checkpoint(
    tmp_path: Path, suffix: str, begin: bytes, message: str
) -> None:
    (tmp_path / f"model{suffix}").write_bytes(begin)
    with pytest.raises(CheckpointError, match=rf"model{suffix} {message}"):
        edet.read_checkpoint(tmp_path / f"model{suffix}")


@needs_safetensors
@pytest.mark.parametrize("name", ["blob", "model.bin", "model.SAFETENSORS"])
def test_safetensors_of_another_name(model: edet.EfficientDet, tmp_path: Path, name: str) -> None:
    edet.save_checkpoint(model, tmp_path / "model.safetensors")
    (tmp_path / "model.safetensors").rename(tmp_path / name)
    with pytest.raises(CheckpointError, match=r"its name must end in \.safetensors"):
        edet.read_checkpoint(tmp_path / name)


def test_an_index_of_parts(tmp_path: Path) -> None:
    (tmp_path / "model.safetensors.index.json").write_text('{"weight_map": {}}')
    with pytest.raises(CheckpointError, match="lists the parts of a checkpoint"):
        edet.read_checkpoint(tmp_path / "model.safetensors.index.json")


KEY = "fpn.cell.0.fnode.0.combine.edge_weights"


@pytest.mark.parametrize(
    "change",
    [
        lambda x: (10 * x).to(torch.int8),
        lambda x: x > 0,
        lambda x: x.to(torch.complex64),
        lambda x: x.to_sparse(),
        lambda x: x.to("meta"),
    ],
)
def test_weights_that_are_no_floats(
    model: edet.EfficientDet, tmp_path: Path, change: Callable[[torch.Tensor], torch.Tensor]
) -> None:
    state = copied(model)
    before = copied(model)
    state[KEY] = change(state[KEY])
    torch.save(state, tmp_path / "model.pth")
    with pytest.raises(CheckpointError, match=rf"float dtype, got {KEY} \(torch\."):
        edet.load_checkpoint(model, tmp_path / "model.pth")
    assert same(copied(model), before)


def test_counts_that_thop_left_are_no_weights(model: edet.EfficientDet, tmp_path: Path) -> None:
    state = copied(model)
    for key in ("", "fpn.", "backbone.blocks.0.0."):
        state |= {f"{key}total_ops": torch.ones(1).double(), f"{key}total_params": torch.zeros(1)}
    torch.save({"state_dict": state}, tmp_path / "model.pth")
    other = new()
    edet.load_checkpoint(other, tmp_path / "model.pth")
    assert same(copied(other), copied(model))


def test_a_variance_below_zero(model: edet.EfficientDet, tmp_path: Path) -> None:
    state, before = copied(model), copied(model)
    state["backbone.bn1.running_var"][3] = -1e-3
    torch.save(state, tmp_path / "model.pth")
    with pytest.raises(
        CheckpointError, match=r"at least 0, got less in backbone\.bn1\.running_var"
    ):
        edet.load_checkpoint(model, tmp_path / "model.pth")
    assert same(copied(model), before)


def test_numbers_beyond_the_range_of_the_model(model: edet.EfficientDet, tmp_path: Path) -> None:
    state = copied(model)
    state[KEY] = state[KEY].double() + 1e300
    torch.save(state, tmp_path / "model.pth")
    with pytest.raises(CheckpointError, match=f"got NaN or ∞ in {KEY}"):
        edet.load_checkpoint(model, tmp_path / "model.pth")
    state[KEY] = torch.ones_like(state[KEY]).to(torch.float8_e4m3fn)  # holds no ∞ at all
    torch.save(state, tmp_path / "model.pth")
    edet.load_checkpoint(model, tmp_path / "model.pth")
    assert bool((model.state_dict()[KEY] == 1).all())


def test_a_class_prediction_of_no_number_of_classes(
    model: edet.EfficientDet, tmp_path: Path
) -> None:
    state = copied(model)
    state[CLASS_KEYS[1]] = torch.zeros(5)
    torch.save(state, tmp_path / "model.pth")
    with pytest.raises(CheckpointError, match=r"mis-shaped \(1\): .*bias \(5,\) not \(27,\)"):
        edet.load_checkpoint(model, tmp_path / "model.pth")


class Attack:
    def __reduce__(self) -> tuple[object, tuple[str]]:
        return os.mkdir, (str(Attack.folder),)

    folder: Path


@pytest.mark.parametrize("how", ["torch", "pickle", "nested"])
def test_no_code_is_run(tmp_path: Path, how: str) -> None:
    Attack.folder, path = tmp_path / "attacked", tmp_path / "model.pth"
    if how == "pickle":
        path.write_bytes(pickle.dumps(Attack()))
    else:
        torch.save(Attack() if how == "torch" else {"state_dict": {}, "x": Attack()}, path)
    with pytest.raises(CheckpointError, match="unpickling them can run code") as caught:
        edet.read_checkpoint(path)
    assert "weights_only=False" not in str(caught.value)
    assert not Attack.folder.exists()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ([1, 2], "must hold a state dict, got list"),
        ({}, "must hold a state dict, got an empty dict"),
        ({"state_dict": {}}, "must hold a state dict, got an empty dict"),
        ({"epoch": 3, "weight": torch.zeros(1)}, "other values for epoch"),
        (torch.zeros(3), "must hold a state dict, got Tensor"),
    ],
)
def test_pickles_that_are_no_state_dict(tmp_path: Path, content: object, message: str) -> None:
    torch.save(content, tmp_path / "model.pth")
    with pytest.raises(CheckpointError, match=message):
        edet.read_checkpoint(tmp_path / "model.pth")


@pytest.mark.parametrize("suffix", SUFFIXES)
@pytest.mark.parametrize("keep", [0.0, 0.001, 0.5, 0.999])
def test_truncated_files(
    model: edet.EfficientDet, tmp_path: Path, suffix: str, keep: float
) -> None:
    path = tmp_path / f"model{suffix}"
    edet.save_checkpoint(model, path)
    data = path.read_bytes()
    path.write_bytes(data[: int(keep * len(data))])
    before = copied(model)
    with pytest.raises(CheckpointError, match=str(path)):
        edet.load_checkpoint(model, path)
    assert same(copied(model), before)


def test_files_that_are_not_there(model: edet.EfficientDet, tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"path must be a checkpoint file, got .*no\.pth"):
        edet.load_checkpoint(model, tmp_path / "no.pth")
    with pytest.raises(FileNotFoundError, match="path must be a checkpoint file"):
        edet.load_checkpoint(model, tmp_path)
    with pytest.raises(FileNotFoundError, match="path must be in a folder that exists"):
        edet.save_checkpoint(model, tmp_path / "no" / "model.pth")
    with pytest.raises(ValueError, match=r"path must end in \.pth, \.pt or \.safetensors"):
        edet.save_checkpoint(model, tmp_path / "model.onnx")


def test_a_failed_save_leaves_the_old_file(
    model: edet.EfficientDet, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "model.pth"
    edet.save_checkpoint(model, path)
    data = path.read_bytes()

    def full(state: object, file: object) -> None:
        file.write(b"half")
        raise OSError("No space left on device")

    monkeypatch.setattr(torch, "save", full)
    with pytest.raises(OSError, match="No space left"):
        edet.save_checkpoint(model, path)
    assert path.read_bytes() == data
    assert [p.name for p in tmp_path.iterdir()] == ["model.pth"]


@needs_safetensors
def test_missing_safetensors_names_the_extra(
    model: edet.EfficientDet, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    edet.save_checkpoint(model, tmp_path / "model.safetensors")
    monkeypatch.setitem(__import__("sys").modules, "safetensors.torch", None)
    with pytest.raises(ImportError, match=r'pip install "edet-kernels\[safetensors\]"'):
        edet.load_checkpoint(model, tmp_path / "model.safetensors")
