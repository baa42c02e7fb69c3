"""Detectors that other projects trained: zylo117's and google/automl's names for the same tensors.

Their values are used as they are. zylo117's network pads its max pools with 0 instead of −∞, so
that its own scores differ a little from what the same weights give here.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from .backbones import backbone_keys
from .checkpoints import CLASS_KEYS, check_values, load_checkpoint, read_checkpoint
from .efficientdet import EfficientDet
from .efficientnet import EfficientNet
from .reading import CheckpointError

_LISTED = 5  # keys in a message

# zylo117's names of the nodes of a cell, of their edge weights, and of the projections of cell 0
_NODES = (
    *("conv6_up", "conv5_up", "conv4_up", "conv3_up"),
    *("conv4_down", "conv5_down", "conv6_down", "conv7_down"),
)
_EDGES = ("p6_w1", "p5_w1", "p4_w1", "p3_w1", "p4_w2", "p5_w2", "p6_w2", "p7_w2")
_PROJECTIONS = {
    (1, 2): "p5_down_channel",
    (2, 1): "p4_down_channel",
    (3, 0): "p3_down_channel",
    (4, 1): "p4_down_channel_2",
    (5, 2): "p5_down_channel_2",
}
_ZYLO_HEADS = {"class_net": "classifier", "box_net": "regressor"}
_ZYLO_PARTS = {"conv_dw": "depthwise_conv.conv", "conv_pw": "pointwise_conv.conv"}

_NORM = {
    "weight": "gamma",
    "bias": "beta",
    "running_mean": "moving_mean",
    "running_var": "moving_variance",
}
_AVERAGED = "/ExponentialMovingAverage"

# keys of BiFPN and heads here
_P6 = re.compile(r"fpn\.resample\.3\.conv\.(conv|bn)\.(\w+)")
_WEIGHTS = re.compile(r"fpn\.cell\.(\d+)\.fnode\.(\d+)\.combine\.edge_weights")
_PROJECT = re.compile(
    r"fpn\.cell\.0\.fnode\.(\d+)\.combine\.resample\.(\d+)\.conv\.(conv|bn)\.(\w+)"
)
_AFTER = re.compile(
    r"fpn\.cell\.(\d+)\.fnode\.(\d+)\.after_combine\.conv\.(conv_dw|conv_pw|bn)\.(\w+)"
)
_REPEAT = re.compile(r"(class_net|box_net)\.conv_rep\.(\d+)\.(conv_dw|conv_pw)\.(\w+)")
_HEAD_NORM = re.compile(r"(class_net|box_net)\.bn_rep\.(\d+)\.(\d+)\.bn\.(\w+)")
_PREDICT = re.compile(r"(class_net|box_net)\.predict\.(conv_dw|conv_pw)\.(\w+)")


def zylo117_key(key: str) -> str | None:
    """zylo117's name of a tensor of BiFPN or heads; None where it has none."""
    if m := _P6.fullmatch(key):
        return f"bifpn.0.p5_to_p6.{'0.conv' if m[1] == 'conv' else '1'}.{m[2]}"
    if (m := _WEIGHTS.fullmatch(key)) and int(m[2]) < len(_EDGES):
        return f"bifpn.{m[1]}.{_EDGES[int(m[2])]}"
    if (m := _PROJECT.fullmatch(key)) and (int(m[1]), int(m[2])) in _PROJECTIONS:
        part = "0.conv" if m[3] == "conv" else "1"
        return f"bifpn.0.{_PROJECTIONS[int(m[1]), int(m[2])]}.{part}.{m[4]}"
    if (m := _AFTER.fullmatch(key)) and int(m[2]) < len(_NODES):
        return f"bifpn.{m[1]}.{_NODES[int(m[2])]}.{_ZYLO_PARTS.get(m[3], 'bn')}.{m[4]}"
    if m := _REPEAT.fullmatch(key):
        return f"{_ZYLO_HEADS[m[1]]}.conv_list.{m[2]}.{_ZYLO_PARTS[m[3]]}.{m[4]}"
    if m := _HEAD_NORM.fullmatch(key):
        return f"{_ZYLO_HEADS[m[1]]}.bn_list.{m[3]}.{m[2]}.{m[4]}"
    if m := _PREDICT.fullmatch(key):
        return f"{_ZYLO_HEADS[m[1]]}.header.{_ZYLO_PARTS[m[2]]}.{m[3]}"
    return None


def _separable(part: str, name: str) -> str:
    if part == "conv_dw":
        return "depthwise_kernel"
    return "pointwise_kernel" if name == "weight" else "bias"


def automl_key(key: str, levels: int) -> str | None:
    """google/automl's name of a tensor of BiFPN or heads; None where it has none.

    Edge weights are scalars there: theirs is the first one's name.
    """
    convolution = {"weight": "kernel", "bias": "bias"}
    if m := _P6.fullmatch(key):
        return f"resample_p6/{_layer(m[1], m[2], convolution)}"
    if m := _WEIGHTS.fullmatch(key):
        return f"fpn_cells/cell_{m[1]}/fnode{m[2]}/WSM"
    if m := _PROJECT.fullmatch(key):
        place = f"fpn_cells/cell_0/fnode{m[1]}/resample_0_{m[2]}_{levels + int(m[1])}"
        return f"{place}/{_layer(m[3], m[4], convolution)}"
    if m := _AFTER.fullmatch(key):
        place = f"fpn_cells/cell_{m[1]}/fnode{m[2]}/op_after_combine{levels + int(m[2])}"
        own = f"bn/{_NORM.get(m[4])}" if m[3] == "bn" else f"conv/{_separable(m[3], m[4])}"
        return f"{place}/{own}"
    if m := _REPEAT.fullmatch(key):
        return f"{m[1]}/{m[1][:-4]}-{m[2]}/{_separable(m[3], m[4])}"
    if m := _HEAD_NORM.fullmatch(key):
        return f"{m[1]}/{m[1][:-4]}-{m[2]}-bn-{3 + int(m[3])}/{_NORM.get(m[4])}"
    if m := _PREDICT.fullmatch(key):
        return f"{m[1]}/{m[1][:-4]}-predict/{_separable(m[2], m[3])}"
    return None


def _layer(kind: str, name: str, convolution: Mapping[str, str]) -> str:
    return f"conv2d/{convolution[name]}" if kind == "conv" else f"bn/{_NORM.get(name)}"


def _automl_backbone(key: str, backbone: EfficientNet, prefix: str) -> str | None:
    """google/automl's name of a tensor of the backbone."""
    norm = "tpu_batch_normalization"
    if m := re.fullmatch(r"conv_stem\.weight|bn1\.(\w+)", key):
        return f"{prefix}/stem/" + (f"{norm}/{_NORM.get(m[1])}" if m[1] else "conv2d/kernel")
    m = re.fullmatch(r"blocks\.(\d+)\.(\d+)\.(.+)", key)
    if m is None:
        return None
    stages = backbone.stages()
    stage, index = int(m[1]), int(m[2])
    number = sum(map(len, stages[:stage])) + index
    expands = stages[stage][index].expands
    place = f"{prefix}/blocks_{number}"
    *parts, name = m[3].split(".")
    if parts[0] == "se":
        suffix = "" if parts[1] == "conv_reduce" else "_1"
        return f"{place}/se/conv2d{suffix}/{'kernel' if name == 'weight' else 'bias'}"
    if parts[0] == "conv_dw":
        return f"{place}/depthwise_conv2d/depthwise_kernel"
    if parts[0].startswith("bn"):
        count = int(parts[0][2:]) - 1
        return f"{place}/{norm}{f'_{count}' if count else ''}/{_NORM.get(name)}"
    return f"{place}/conv2d{'_1' if parts[0] == 'conv_pwl' and expands else ''}/kernel"


def _as_tensor(name: str, value: np.ndarray[Any, Any]) -> Tensor:
    """A TensorFlow variable in PyTorch's layout: kernels are (H, W, in, out) there."""
    if value.ndim == 4:
        value = value.transpose((2, 3, 0, 1) if "depthwise" in name else (3, 2, 0, 1))
    return torch.from_numpy(np.array(value, order="C"))


def from_automl(
    variables: Mapping[str, np.ndarray[Any, Any]], model: EfficientDet
) -> dict[str, Tensor]:
    """The tensors of a checkpoint of google/automl's by the keys of ``model``.

    Args:
        variables: name to value, of ``tf.train.load_checkpoint``; averages are taken where there
            are any.
    """
    found = {}
    config = model.config
    prefix = config.backbone.replace("_", "-")
    backbone = model.backbone
    assert isinstance(backbone, EfficientNet)

    def read(name: str) -> Tensor | None:
        value = variables.get(name + _AVERAGED, variables.get(name))
        return None if value is None else _as_tensor(name, np.asarray(value))

    for key in model.state_dict():
        if key.startswith("backbone."):
            name = _automl_backbone(key.removeprefix("backbone."), backbone, prefix)
        else:
            name = automl_key(key, config.levels)
        value = None if name is None else read(name)
        if value is not None and name is not None and name.endswith("/WSM"):
            scalars = [value, read(f"{name}_1"), read(f"{name}_2")]
            value = torch.stack([x for x in scalars if x is not None])
        if value is not None:
            found[key] = value
    return found


def from_zylo117(state: Mapping[str, Tensor], model: EfficientDet) -> dict[str, Tensor]:
    """The tensors of a checkpoint of zylo117's by the keys of ``model``."""
    assert isinstance(model.backbone, EfficientNet)
    inner, _ = backbone_keys(state, model.backbone)
    found = {f"backbone.{key}": value for key, value in inner.items()}
    for key in model.state_dict():
        name = zylo117_key(key)
        if name is not None and name in state:
            found[key] = state[name]
    return found


def load_detector(
    model: EfficientDet, path: str | os.PathLike[str], *, reinit_head: bool = False
) -> None:
    """Loads a detector of zylo117's (``.pth``), of google/automl's (``.npz``) or a known one.

    A TensorFlow checkpoint becomes an ``.npz`` where TensorFlow is installed, by ``reader =
    tf.train.load_checkpoint(folder)`` and ``numpy.savez(file, **{k: reader.get_tensor(k) for k in
    reader.get_variable_to_shape_map()})``.

    Args:
        reinit_head: leave the class prediction as it is where the file has other classes.

    Raises:
        FileNotFoundError: there is no such file.
        CheckpointError: the file does not fit; the message says what is missing.
        ValueError: the model's backbone is no EfficientNet.
    """
    path = Path(path)
    if not isinstance(model.backbone, EfficientNet):
        raise ValueError(
            f"the model's backbone must be an EfficientNet, got {type(model.backbone).__name__}"
        )
    if not path.is_file():
        raise FileNotFoundError(f"path must be a checkpoint file, got {path}")
    if path.suffix == ".npz":
        try:
            with np.load(path, allow_pickle=False) as content:
                state = from_automl(content, model)
        except (OSError, ValueError, EOFError) as error:
            raise CheckpointError(f"{path} is not a readable .npz file: {error}") from error
    else:
        read = read_checkpoint(path)
        if not any(key.startswith("bifpn.0.conv6_up.") for key in read):
            load_checkpoint(model, path, reinit_head=reinit_head)
            return
        state = from_zylo117(read, model)
    own = model.state_dict()
    missing = [k for k in own if k not in state and not k.endswith("num_batches_tracked")]
    misshaped = [k for k, v in state.items() if v.shape != own[k].shape]
    if reinit_head and set(misshaped) <= set(CLASS_KEYS):
        state = {key: value for key, value in state.items() if key not in misshaped}
        misshaped = []
    for what, keys in (("lacks", missing), ("has other shapes for", misshaped)):
        if keys:
            more = f", … ({len(keys) - _LISTED} more)" if len(keys) > _LISTED else ""
            raise CheckpointError(
                f"{path} is not of a {model.config.name} with {model.config.num_classes} classes: "
                f"it {what} {', '.join(keys[:_LISTED])}{more}",
                missing=missing,
                misshaped=misshaped,
            )
    check_values(path, state, own)
    model.load_state_dict(state, strict=False)
