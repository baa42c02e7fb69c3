"""Checkpoints: finding a state dict in a file, saying what does not fit, and saving."""

from __future__ import annotations

import logging
import os
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ..extras import require
from ..files import replacing
from .configs import ModelConfig, get_config, list_models
from .efficientnet import scaled_stages
from .reading import CheckpointError, listed, read_file

if TYPE_CHECKING:
    from .efficientdet import EfficientDet

#: The layers whose shape depends on the number of classes.
CLASS_KEYS = ("class_net.predict.conv_pw.weight", "class_net.predict.conv_pw.bias")

#: A key that every EfficientDet's state dict has: what stands in front of it, a wrapper added.
_MARK = "class_net.predict.conv_pw.weight"
_WRAPPERS = ("module.", "model.", "_orig_mod.")  # data parallel, effdet's bench, torch.compile
#: Wrappers that can be around any layer: torch.compile's, activation checkpoints', FSDP's.
_INNER_WRAPPERS = re.compile(
    r"(?<![^.])(_orig_mod|_checkpoint_wrapped_module|_fsdp_wrapped_module)\."
)
#: Names of averaged weights, as a word of their own: ``state_dict_ema``, ``ema_model``, ``swa``.
_AVERAGED = re.compile(
    r"(?i:(?<![a-z])(ema|swa|avg|average|averaged|polyak|shadow)(?![a-z]))|EMA|(?<=[a-z])Ema(?![a-z])"
)
#: The plain weights of Lightning's WeightAveraging, whose ``state_dict`` are the averaged ones.
_LIGHTNING_PLAIN = "current_model_state"
#: Ends of the keys that are no parameters, which some averages lack.
_STATISTICS = ("running_mean", "running_var", "num_batches_tracked")
#: Where one of several state dicts is looked for first.
_USUAL = ("state_dict_ema", "state_dict", "model")
#: Buffers that thop's ``profile`` leaves in every module.
_COUNTS = ("total_ops", "total_params")
_PARTS = ("backbone", "fpn", "class_net", "box_net")

_log = logging.getLogger(__name__)


def _mappings(
    content: Any, name: str = "", seen: set[int] | None = None
) -> Iterator[tuple[str, Mapping[Any, Any]]]:
    """Every mapping in nested mappings and lists, with its name in the file."""
    seen = set() if seen is None else seen
    if not isinstance(content, (Mapping, list, tuple)) or id(content) in seen or len(seen) > 9999:
        return  # a file can hold itself
    seen.add(id(content))
    if isinstance(content, Mapping):
        yield name, content
    items = content.items() if isinstance(content, Mapping) else enumerate(content)
    for key, value in items:
        if name.count(".") < 4:
            yield from _mappings(value, f"{name}.{key}" if name else str(key), seen)


def _state_dicts(content: Any) -> dict[str, dict[str, Any]]:
    """The state dicts of an EfficientDet in a file, by what stands in front of their keys."""
    found: dict[str, dict[str, Any]] = {}
    for name, mapping in _mappings(content):
        plain = {_INNER_WRAPPERS.sub("", str(key)): value for key, value in mapping.items()}
        marks = [k for k, v in plain.items() if k.endswith(_MARK) and isinstance(v, Tensor)]
        for mark in marks:
            prefix = mark.removesuffix(_MARK)
            if prefix and not prefix.endswith("."):
                continue
            full = f"{name}.{prefix}" if name else prefix
            if "n_averaged" in plain:  # of torch.optim.swa_utils
                full += "average."
            found[full] = {
                key.removeprefix(prefix): value
                for key, value in plain.items()
                if key.startswith(prefix)
            }
    return found


def _is_averaged(name: str, found: Mapping[str, Any]) -> bool:
    """Whether a state dict, one of those in a file, is of averaged weights."""
    if _AVERAGED.search(name):
        return True
    lightning = any(n.startswith(f"{_LIGHTNING_PLAIN}.") for n in found)
    return lightning and name.startswith("state_dict.")


def _is_statistic(key: str) -> bool:
    return key.rpartition(".")[2] in _STATISTICS


def _complete_averages(content: Any, found: dict[str, dict[str, Any]]) -> None:
    """Gives averages of the parameters alone the names and statistics that the plain weights have.

    Many have no statistics; torch_ema's no names either, but a list in the parameters' order.
    """
    plain = [state for name, state in found.items() if not _is_averaged(name, found)]
    if not plain or not all(_same(state, plain[0]) for state in plain):
        return
    keys = [key for key in plain[0] if not _is_statistic(key) and key.split(".")[0] in _PARTS]
    for name, mapping in _mappings(content):
        values = mapping.get("shadow_params")
        if not isinstance(values, list):
            continue
        shapes = [getattr(value, "shape", None) for value in values]
        if shapes == [plain[0][key].shape for key in keys]:
            found[f"{name}.shadow_params"] = dict(zip(keys, values, strict=True))
        else:
            _log.warning("%s.shadow_params is left out: its tensors are not the model's", name)
    for name, state in found.items():
        if _is_averaged(name, found) and not any(map(_is_statistic, state)):
            state |= {key: x for key, x in plain[0].items() if _is_statistic(key)}


def _same(a: Mapping[str, Any], b: Mapping[str, Any]) -> bool:
    return a.keys() == b.keys() and all(
        x is b[k] or (isinstance(x, Tensor) and isinstance(b[k], Tensor) and torch.equal(x, b[k]))
        for k, x in a.items()
    )


def _chosen(found: dict[str, dict[str, Any]], path: Path, ema: bool) -> dict[str, Any]:
    """The one of the state dicts in a file that is asked for.

    Raises:
        CheckpointError: there are several of a kind.
    """
    averaged = [name for name in found if _is_averaged(name, found)]
    plain = [name for name in found if name not in averaged]
    names = (averaged or plain) if ema else (plain or averaged)
    different = [
        n for i, n in enumerate(names) if not any(_same(found[n], found[m]) for m in names[:i])
    ]
    if len(different) > 1:
        usual = [
            [n for n in different if n == first or n.startswith(f"{first}.")] for first in _USUAL
        ]
        different = next((group for group in usual if len(group) == 1), different)
    if len(different) > 1:
        raise CheckpointError(
            f"{path} holds several state dicts, of which one must be saved by itself: "
            + ", ".join(repr(name.rstrip(".")) for name in different)
        )
    if len(found) > 1:
        _log.info("%s: %r is taken of %s", path, different[0].rstrip("."), ", ".join(found))
    return found[different[0]]


def read_checkpoint(path: str | os.PathLike[str], *, ema: bool = True) -> dict[str, Tensor]:
    """The state dict in a ``.safetensors`` file, or in one written by ``torch.save``.

    An EfficientDet's state dict is found by its keys, under whatever names and prefixes it is
    stored (``state_dict``, ``model_state_dict``, ``ema``; ``module.``, ``model.``, ``_orig_mod.``),
    and what stands beside it is left out. Nothing but tensors and plain containers is unpickled
    (``weights_only=True``).

    Args:
        ema: take the averaged weights where the file has both; else those that are not averaged.

    Raises:
        FileNotFoundError: there is no such file.
        CheckpointError: the file is damaged, or holds no state dict, or several.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"path must be a checkpoint file, got {path}")
    content = read_file(path)
    if isinstance(content, Mapping) and isinstance(content.get("edet"), Mapping):
        content = content.get("state_dict")  # of this project: the weights to use
    found = _state_dicts(content)
    _complete_averages(content, found)
    if found:
        content = _chosen(found, path, ema)
    else:  # of another network, or of a part of one
        names = _USUAL if ema else (*_USUAL[1:], _USUAL[0])
        for name in names:
            if isinstance(content, Mapping) and isinstance(content.get(name), Mapping):
                content = content[name]
                break
    if not isinstance(content, Mapping) or not content:
        kind = "an empty dict" if isinstance(content, Mapping) else type(content).__name__
        raise CheckpointError(f"{path} must hold a state dict, got {kind}")
    other = [str(key) for key, value in content.items() if not isinstance(value, Tensor)]
    if other and found:  # beside the keys of a state dict without a prefix, as an epoch
        other = [key for key in other if key.split(".")[0] in _PARTS]
        content = {key: value for key, value in content.items() if isinstance(value, Tensor)}
    if other:
        raise CheckpointError(
            f"{path} must hold a state dict of tensors, got other values for {listed(other)}"
        )
    state = {
        str(key): value
        for key, value in content.items()
        if str(key).rpartition(".")[2] not in _COUNTS
    }
    while prefix := next((p for p in _WRAPPERS if all(k.startswith(p) for k in state)), None):
        state = {key.removeprefix(prefix): value for key, value in state.items()}
    return state


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
    if not missing:  # what a wrapper or a loss holds beside the network
        parts = {key.split(".")[0] for key in own}
        unexpected = [k for k in unexpected if k.split(".")[0] in parts]
        state = {key: value for key, value in state.items() if key in own or key in unexpected}
    misshaped = [k for k, v in state.items() if k in own and v.shape != own[k].shape]
    fits = not missing and not unexpected
    counts = {state[k].shape[:1].numel() / model.config.num_anchors for k in misshaped}
    classes = set(misshaped) <= set(CLASS_KEYS) and len(counts) == 1 and counts.pop().is_integer()
    classes = classes and all(state[k].shape[1:] == own[k].shape[1:] for k in misshaped)
    if fits and classes:
        if not reinit_head:
            raise _class_count_error(model, path, state, misshaped)
        for key in misshaped:
            del state[key]
    elif not fits or misshaped:
        raise _mismatch_error(model, path, state, missing, unexpected, misshaped)
    check_values(path, state, own)
    model.load_state_dict(state, strict=False)


def check_values(
    path: str | os.PathLike[str], state: Mapping[str, Tensor], own: Mapping[str, Tensor]
) -> None:
    """Checks that tensors can be copied into those of the same keys, and are ones to compute with.

    Args:
        path: the file they are from.
        state: the tensors.
        own: the model's, of all these keys.

    Raises:
        CheckpointError: a tensor is of a kind or dtype that is no weight's, holds NaN or ∞ in the
            model's dtype, or is a variance below zero.
    """
    strange = [
        f"{k} ({v.dtype}, {v.layout}, {v.device})"
        for k, v in state.items()
        if v.layout != torch.strided
        or v.is_meta
        or v.is_quantized
        or (own[k].is_floating_point() and not v.is_floating_point())
    ]
    if strange:  # copied, the bytes of a quantised model would be weights of some hundreds
        raise CheckpointError(
            f"{path} must hold weights of float32 or another float dtype, got {listed(strange)}"
        )
    floats = {k: v.to(own[k].dtype) for k, v in state.items() if v.is_floating_point()}
    broken = [k for k, v in floats.items() if not v.isfinite().all()]
    if broken:
        raise CheckpointError(
            f"{path} must hold finite numbers of the model's dtype, got NaN or ∞ in "
            f"{listed(broken)}"
        )
    below = [k for k, v in floats.items() if k.endswith(".running_var") and (v < 0).any()]
    if below:  # PyTorch takes its root: NaN for all that follows
        raise CheckpointError(
            f"{path} must hold variances of at least 0, got less in {listed(below)}"
        )


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
            lines.append(f"  {title} ({len(keys)}): {listed(keys)}")
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
