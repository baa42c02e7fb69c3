"""Checkpoints that know what they are: model, classes, image size, where training was.

One file of ``torch.save``, of tensors and plain values only: ``state_dict`` holds the weights to
use, as any reader of checkpoints finds them; ``edet`` the description; ``training``, where it is
kept, what a run needs to go on. Or a ``.safetensors`` file of the weights, with the description as
JSON in its metadata. A quantised model's ranges and means lie beside its float weights, as
``int8.PART.MAP`` and ``int8_mean.PART.MAP``.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch

from edet_kernels import __version__

from ..extras import require
from ..files import replacing
from ..fused.module import PackedModule
from ..fused.ranges import Int8
from .checkpoints import load_checkpoint
from .configs import ModelConfig
from .efficientdet import EfficientDet
from .efficientnet import EfficientNet
from .reading import CheckpointError, read_file

#: Of the description; raised when an older reader could not understand a file.
FORMAT = 1

SUFFIXES = (".pt", ".pth", ".safetensors")

_PARTS = ("backbone", "fpn", "class_net", "box_net")


@dataclass(frozen=True)
class Description:
    """What a checkpoint says about itself.

    Attributes:
        config: of the model, with the image size it was trained at.
        class_names: of labels 1, 2, …; empty when there are none.
        category_ids: the training data's own id of labels 1, 2, …
        step, epoch: how far training was.
        figures: of the evaluation, for example ``AP``.
        version: of edet-kernels that wrote it.
    """

    config: ModelConfig
    class_names: list[str] = field(default_factory=list)
    category_ids: list[int] = field(default_factory=list)
    step: int = 0
    epoch: int = 0
    figures: dict[str, float] = field(default_factory=dict)
    version: str = __version__

    def to_plain(self) -> dict[str, Any]:
        """In plain Python types, which ``torch.load`` reads without running code."""
        return {"format": FORMAT, **asdict(self)}


def _tuples(value: Any) -> Any:
    return tuple(map(_tuples, value)) if isinstance(value, list | tuple) else value


def _from_plain(plain: Any, path: Path) -> Description:
    if not isinstance(plain, Mapping) or plain.get("format") != FORMAT:
        number = plain.get("format") if isinstance(plain, Mapping) else None
        raise CheckpointError(
            f"{path} was written by another version of edet-kernels "
            f"(format {number!r}, {FORMAT} is known): upgrade edet-kernels"
        )
    values = {key: value for key, value in plain.items() if key != "format"}
    try:
        values["config"] = ModelConfig(**{k: _tuples(v) for k, v in values["config"].items()})
        return Description(**values)
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise CheckpointError(f"{path} has a description that cannot be read: {error}") from error


def save_described(
    model: EfficientDet,
    path: str | os.PathLike[str],
    *,
    class_names: Sequence[str] = (),
    category_ids: Sequence[int] = (),
    step: int = 0,
    epoch: int = 0,
    figures: Mapping[str, float] | None = None,
    training: Mapping[str, Any] | None = None,
    dtype: torch.dtype | None = None,
) -> None:
    """Writes the weights of ``model`` and what they are; the file appears whole or not at all.

    Of a quantised model (:func:`edet.quantize`) also its ranges, from which :func:`load_described`
    makes the same bytes of the same weights again.

    Args:
        path: ends in ``.pt``, ``.pth`` or ``.safetensors``.
        class_names, category_ids, step, epoch, figures: see :class:`Description`.
        training: what a run needs to go on, tensors and plain values; not in ``.safetensors``.
        dtype: of the weights in the file, for example float16; the model's when None.

    Raises:
        ValueError: another suffix, names of another number of classes, weights that ``dtype``
            cannot hold.
        OSError: the file cannot be written; one that was there before stays as it is.
    """
    path = Path(path)
    if not is_checkpoint(path):
        raise ValueError(f"path must end in {', '.join(SUFFIXES)}, got {path}")
    safe = path.suffix == ".safetensors"
    if safe and training is not None:
        raise ValueError(f"a state of training needs a path that ends in .pt, got {path}")
    for name, values in (("class_names", class_names), ("category_ids", category_ids)):
        if values and len(values) != model.config.num_classes:
            raise ValueError(
                f"{name} must hold {model.config.num_classes} entries, got {len(values)}"
            )
    description = Description(
        model.config,
        list(map(str, class_names)),
        list(category_ids),
        step,
        epoch,
        {str(key): float(value) for key, value in (figures or {}).items()},
    )
    plain = description.to_plain()
    plain["own_backbone"] = not isinstance(model.backbone, EfficientNet)
    content: dict[str, Any] = {
        "edet": plain,
        "state_dict": {key: _stored(key, x, dtype) for key, x in model.state_dict().items()},
    }
    quantised = _quantised(model)
    if quantised:
        plain["int8"] = {part: list(own.keep) for part, own in quantised.items()}
        for part, own in quantised.items():
            for name, ends in own.ranges.items():
                content["state_dict"][f"int8.{part}.{name}"] = ends.contiguous()
                content["state_dict"][f"int8_mean.{part}.{name}"] = own.means[name]
    if training is not None:
        content["training"] = training
    if not path.parent.is_dir():
        raise FileNotFoundError(f"path must be in a folder that exists, got {path}")
    with replacing(path) as temporary, temporary.open("wb") as file:
        if safe:
            metadata = {"format": "pt", "edet": json.dumps(plain)}
            save = require("safetensors.torch", "safetensors").save
            file.write(save(content["state_dict"], metadata))
        else:
            torch.save(content, file)


def _quantised(model: EfficientDet) -> dict[str, Int8]:
    """How each part that computes on bytes does so."""
    found = {name: getattr(getattr(model, name), "int8", None) for name in _PARTS}
    return {name: own for name, own in found.items() if isinstance(own, Int8)}


def _quantise(model: EfficientDet, content: Mapping[str, Any], path: Path) -> None:
    """Makes the parts of ``model`` compute on bytes that did so when it was saved."""
    try:
        for part, keep in content["edet"].get("int8", {}).items():
            ranges, means = (
                {
                    key.removeprefix(prefix): x
                    for key, x in content["state_dict"].items()
                    if key.startswith(prefix)
                }
                for prefix in (f"int8.{part}.", f"int8_mean.{part}.")
            )
            module = getattr(model, part) if part in _PARTS else None
            if not isinstance(module, PackedModule):
                raise ValueError(f"{part} is no part with an int8 form")
            for name, ends in ranges.items():
                if ends.dim() != 2 or len(ends) != 2 or not bool(ends.isfinite().all()):
                    raise ValueError(f"the range of {name} must be two rows of finite numbers")
            module.int8 = Int8(ranges, means, tuple(map(str, keep)))
            with torch.no_grad():
                module.pack(torch.float32)
    except (KeyError, ValueError, TypeError, AttributeError, RuntimeError) as error:
        raise CheckpointError(f"{path} has int8 ranges that do not fit: {error}") from error


def _stored(key: str, x: torch.Tensor, dtype: torch.dtype | None) -> torch.Tensor:
    if dtype is None or not x.is_floating_point():
        return x.detach().contiguous()
    stored = x.detach().to(dtype).contiguous()
    if not bool(stored.isfinite().all()):
        raise ValueError(f"dtype must hold the weights, {key} is not finite in {dtype}")
    return stored


def _content(path: str | os.PathLike[str]) -> Any:
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"path must be a checkpoint file, got {path}")
    content = read_file(path)
    if path.suffix == ".safetensors":
        with require("safetensors", "safetensors").safe_open(path, "pt") as file:
            description = (file.metadata() or {}).get("edet")
        if description is not None:
            try:
                return {"edet": json.loads(description), "state_dict": content}
            except ValueError as error:
                raise CheckpointError(
                    f"{path} has a description that cannot be read: {error}"
                ) from error
    return content


def is_checkpoint(name: str | os.PathLike[str]) -> bool:
    """Whether ``name`` is that of a checkpoint, and not of a model."""
    return Path(name).suffix in SUFFIXES


def read_description(path: str | os.PathLike[str]) -> Description | None:
    """What the checkpoint says about itself, or None when it holds weights alone.

    Raises:
        FileNotFoundError: there is no such file.
        CheckpointError: the file is damaged.
    """
    content = _content(path)
    if not isinstance(content, Mapping) or "edet" not in content:
        return None
    plain = dict(content["edet"]) if isinstance(content["edet"], Mapping) else {}
    plain.pop("own_backbone", None)
    plain.pop("int8", None)
    return _from_plain(plain, Path(path))


def read_training(path: str | os.PathLike[str]) -> dict[str, Any]:
    """What a run needs to go on, as :func:`save_described` was given it.

    Raises:
        FileNotFoundError: there is no such file.
        CheckpointError: the file is damaged, or holds no such state.
    """
    content = _content(path)
    if not isinstance(content, Mapping) or "training" not in content:
        raise CheckpointError(f"{path} holds no state to resume from: give a run's last.pt")
    return dict(content["training"])


def load_described(path: str | os.PathLike[str]) -> tuple[EfficientDet, Description]:
    """The model of a checkpoint that describes itself, with its weights, in eval mode.

    Raises:
        FileNotFoundError: there is no such file.
        CheckpointError: the file is damaged or does not describe itself.
    """
    description = read_description(path)
    if description is None:
        raise CheckpointError(
            f"{path} does not say which model it is of: give the model's name, and this file as "
            "its checkpoint"
        )
    content = _content(path)
    if content["edet"].get("own_backbone"):
        raise CheckpointError(
            f"{path} is of a model with a backbone of its own: create that model and load the "
            "file by edet.load_checkpoint"
        )
    model = EfficientDet(description.config)
    load_checkpoint(model, path)
    _quantise(model, content, Path(path))
    return model.eval(), description
