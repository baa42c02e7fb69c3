"""Checkpoints: reading effdet's and this project's files, saying what does not fit, and saving."""

from __future__ import annotations

import argparse
import os
import pickle
import struct
import warnings
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ..extras import require
from ..files import replacing
from .configs import ModelConfig, get_config, list_models
from .efficientnet import scaled_stages

if TYPE_CHECKING:
    from .efficientdet import EfficientDet

#: The layers whose shape depends on the number of classes.
CLASS_KEYS = ("class_net.predict.conv_pw.weight", "class_net.predict.conv_pw.bias")

_WRAPPERS = ("module.", "model.", "_orig_mod.")  # data parallel, effdet's bench, torch.compile
_LISTED = 10  # keys of each kind in a message


class CheckpointError(ValueError):
    """A file that is not a checkpoint, or a checkpoint of another model.

    Attributes:
        missing, unexpected, misshaped: the keys that do not fit, all of them.
    """

    def __init__(
        self,
        message: str,
        *,
        missing: Iterable[str] = (),
        unexpected: Iterable[str] = (),
        misshaped: Iterable[str] = (),
    ) -> None:
        super().__init__(message)
        self.missing = list(missing)
        self.unexpected = list(unexpected)
        self.misshaped = list(misshaped)


def _read(path: Path) -> Any:
    if path.suffix == ".safetensors":
        safetensors = require("safetensors.torch", "safetensors")
        try:
            return safetensors.load_file(path)
        except Exception as error:  # its error class is not part of its interface
            raise CheckpointError(f"{path} is not a readable safetensors file: {error}") from error
    with path.open("rb") as file, warnings.catch_warnings():
        # of files that torch.save did not write, on which the errors below say more
        warnings.filterwarnings("ignore", message="Detected pickle protocol")
        try:
            # timm and effdet store the training script's arguments beside the weights
            with torch.serialization.safe_globals([argparse.Namespace]):
                return torch.load(file, map_location="cpu", weights_only=True)
        except (pickle.UnpicklingError, struct.error) as error:
            # torch's own message advises to load it unsafely
            raise CheckpointError(
                f"{path} is damaged, or holds Python objects other than tensors and is not loaded, "
                "because unpickling them can run code"
            ) from error
        except Exception as error:  # torch raises errors of any kind on damaged files
            raise CheckpointError(f"{path} is not a readable checkpoint: {error}") from error


def read_checkpoint(path: str | os.PathLike[str], *, ema: bool = True) -> dict[str, Tensor]:
    """The state dict in a ``.safetensors`` file, or in one written by ``torch.save``.

    Nested state dicts (``state_dict_ema``, ``state_dict``, ``model``) are found and the prefixes of
    wrappers (``module.``, ``model.``, ``_orig_mod.``) removed. Nothing but tensors and plain
    containers is unpickled (``weights_only=True``).

    Args:
        ema: take the averaged weights where the file has both.

    Raises:
        FileNotFoundError: there is no such file.
        CheckpointError: the file is damaged or holds no state dict.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"path must be a checkpoint file, got {path}")
    content = _read(path)
    names = ("state_dict_ema", "state_dict", "model")
    for name in names if ema else (*names[1:], names[0]):
        if isinstance(content, Mapping) and isinstance(content.get(name), Mapping):
            content = content[name]
            break
    if not isinstance(content, Mapping) or not content:
        kind = "an empty dict" if isinstance(content, Mapping) else type(content).__name__
        raise CheckpointError(f"{path} must hold a state dict, got {kind}")
    other = [str(key) for key, value in content.items() if not isinstance(value, Tensor)]
    if other:
        raise CheckpointError(
            f"{path} must hold a state dict of tensors, got other values for {_listed(other)}"
        )
    state = {str(key): value for key, value in content.items()}
    while prefix := next((p for p in _WRAPPERS if all(k.startswith(p) for k in state)), None):
        state = {key.removeprefix(prefix): value for key, value in state.items()}
    return state


def _listed(keys: list[str]) -> str:
    more = f", … ({len(keys) - _LISTED} more)" if len(keys) > _LISTED else ""
    return ", ".join(keys[:_LISTED]) + more


def _signature(state: Mapping[str, Any]) -> tuple[object, ...]:
    """What tells one EfficientDet's state dict from another's, whatever its classes."""

    def count(prefix: str) -> int:
        """Number of different indices after ``prefix``."""
        return len({k[len(prefix) :].split(".")[0] for k in state if k.startswith(prefix)})

    width = state.get("fpn.cell.0.fnode.0.after_combine.conv.conv_pw.weight")
    return (
        None if width is None else width.shape[0],
        count("fpn.cell."),
        count("class_net.conv_rep."),
        count("fpn.cell.0.fnode."),
        tuple(count(f"backbone.blocks.{stage}.") for stage in range(7)),
        "backbone.blocks.0.0.se.conv_reduce.weight" in state,
        "fpn.cell.0.fnode.0.combine.edge_weights" in state,
        "fpn.resample.3.conv.conv.bias" in state,
    )


def _config_signature(config: ModelConfig) -> tuple[object, ...]:
    """:func:`_signature` of the state dicts of ``config``."""
    return (
        config.width,
        config.cells,
        config.head_repeats,
        2 * (config.levels - 1),
        tuple(stage.repeats for stage in scaled_stages(config.backbone)[1]),
        "lite" not in config.backbone,
        config.fusion != "sum",
        config.redundant_bias,
    )


def guess_models(state: Mapping[str, Tensor]) -> list[str]:
    """Names of the models whose width, depth and kinds of layers are those of ``state``."""
    found = _signature(state)
    return [name for name in list_models() if _config_signature(get_config(name)) == found]


def load_checkpoint(
    model: EfficientDet,
    path: str | os.PathLike[str],
    *,
    reinit_head: bool = False,
    ema: bool = True,
) -> None:
    """Loads the weights in ``path``, a file for :func:`read_checkpoint`, into ``model``.

    The model is changed only when everything fits.

    Args:
        reinit_head: when the checkpoint has another number of classes, leave the class prediction
            (:data:`CLASS_KEYS`) as it is instead of refusing.
        ema: take the averaged weights where the file has both.

    Raises:
        FileNotFoundError: there is no such file.
        CheckpointError: the file is no checkpoint, or one of another model; the message lists the
            keys that are missing, unexpected, of another shape or not finite.
    """
    state = read_checkpoint(path, ema=ema)
    own = model.state_dict()
    # the counters do not matter to the result, and files of other tools lack them
    missing = [k for k in own if k not in state and not k.endswith("num_batches_tracked")]
    unexpected = [k for k in state if k not in own]
    misshaped = [k for k, v in state.items() if k in own and v.shape != own[k].shape]
    fits = not missing and not unexpected
    if fits and misshaped and set(misshaped) <= set(CLASS_KEYS):
        if not reinit_head:
            raise _class_count_error(model, path, state, misshaped)
        for key in misshaped:
            del state[key]
    elif not fits or misshaped:
        raise _mismatch_error(model, path, state, missing, unexpected, misshaped)
    broken = [k for k, v in state.items() if v.is_floating_point() and not v.isfinite().all()]
    if broken:
        raise CheckpointError(f"{path} must hold finite numbers, got NaN or ∞ in {_listed(broken)}")
    model.load_state_dict(state, strict=False)


def _class_count_error(
    model: EfficientDet,
    path: str | os.PathLike[str],
    state: Mapping[str, Tensor],
    misshaped: list[str],
) -> CheckpointError:
    layers = ", ".join(f"{key} {tuple(state[key].shape)}" for key in misshaped)
    classes = state[misshaped[0]].shape[0] / model.config.num_anchors
    return CheckpointError(
        f"{path} has {classes:g} classes, the model {model.config.num_classes}: {layers}. "
        f"Create the model with num_classes={classes:g}, or give reinit_head=True to load "
        "everything else and train these layers anew",
        misshaped=misshaped,
    )


def _mismatch_error(
    model: EfficientDet,
    path: str | os.PathLike[str],
    state: Mapping[str, Tensor],
    missing: list[str],
    unexpected: list[str],
    misshaped: list[str],
) -> CheckpointError:
    own = model.state_dict()
    shapes = [f"{k} {tuple(state[k].shape)} not {tuple(own[k].shape)}" for k in misshaped]
    lines = [f"{path} is not a checkpoint of this {model.config.name}"]
    if not any(key in own for key in state):
        lines.append("  none of its keys is one of an EfficientDet in effdet's naming")
    guesses = [name for name in guess_models(state) if name != model.config.name]
    if guesses:
        lines.append(f"  it looks like one of: {', '.join(guesses)}")
    for title, keys in (("missing", missing), ("unexpected", unexpected), ("mis-shaped", shapes)):
        if keys:
            lines.append(f"  {title} ({len(keys)}): {_listed(keys)}")
    return CheckpointError(
        "\n".join(lines), missing=missing, unexpected=unexpected, misshaped=misshaped
    )


def save_checkpoint(model: torch.nn.Module, path: str | os.PathLike[str]) -> None:
    """Writes the state dict of ``model`` to ``path``, ``.pth``, ``.pt`` or ``.safetensors``.

    Raises:
        ValueError: another suffix.
        OSError: the folder does not exist or cannot be written; nothing is left behind.
    """
    path = Path(path)
    if path.suffix not in (".pth", ".pt", ".safetensors"):
        raise ValueError(f"path must end in .pth, .pt or .safetensors, got {path}")
    if not path.parent.is_dir():
        raise FileNotFoundError(f"path must be in a folder that exists, got {path}")
    state = {key: tensor.detach().contiguous() for key, tensor in model.state_dict().items()}
    with replacing(path) as temporary:
        if path.suffix == ".safetensors":
            require("safetensors.torch", "safetensors").save_file(state, temporary)
        else:
            # a file object, because torch.save turns an OSError into a RuntimeError
            with temporary.open("wb") as file:
                torch.save(state, file)
