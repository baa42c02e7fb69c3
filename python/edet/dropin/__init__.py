"""Fused ops for the EfficientDets people already have: ``accelerate`` and ``restore``.

A backbone, BiFPN or head is fused in place: the module stays the same object with the same tensors
and state-dict keys, and its class is replaced by one derived from it, whose ``forward`` runs the
fused ops in eval mode without gradients and the module's own layers otherwise.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor, nn

from edet_kernels import library

from ..fused.describe import Mismatch
from ..fused.module import RESERVED, PackedModule
from .modules import Fused, unfuse
from .recognise import METHODS, RECOGNISERS, Description, describe
from .report import Part, Report
from .trial import capture, network_of, sample_images, time_whole, try_part

__all__ = [
    "RECOGNISERS",
    "Description",
    "Fused",
    "Part",
    "Report",
    "accelerate",
    "describe",
    "restore",
]

_HELP = (
    "describe yours by a method as_fusion_nodes() (a head: as_head_layers()), see edet.describe "
    "and docs/dropin.md"
)


def _find(model: nn.Module) -> Iterator[tuple[str, nn.Module, str]]:
    """Name and module of every part, and why it must be left alone (or "")."""
    inside: str | None = None
    for name, module in model.named_modules():
        if inside is not None and name.startswith(inside):
            continue
        reason = ""
        if isinstance(module, Fused):
            reason = "it is accelerated already"
        elif isinstance(module, PackedModule):
            if not any(hasattr(module, method) for method in METHODS):
                continue
            reason = "it runs on fused ops by itself"
        else:
            try:
                if describe(module) is None:
                    continue
            except Mismatch as error:
                reason = str(error)
            if isinstance(module, torch.jit.ScriptModule):
                reason = "it is TorchScript"
            elif taken := [a for a in (*RESERVED, "_made_of") if hasattr(module, a)]:
                reason = f"it has an attribute {taken[0]} of its own"
            elif not reason:
                reason = _hooked(module)
        inside = f"{name}." if name else ""
        yield name, module, reason


def _hooked(module: nn.Module) -> str:
    """Why hooks of layers keep ``module`` from being fused, which would not run them; or ""."""
    for name, layer in module.named_modules():
        if layer is not module and (layer._forward_pre_hooks or layer._forward_hooks):
            return f"its layer {name} has a forward hook, as pruning sets one"
    return ""


def _is_backbone(module: nn.Module) -> bool:
    return hasattr(module, "conv_stem") or hasattr(module, "as_backbone_blocks")


def _notes() -> list[str]:
    return [] if library.load() else [f"The fused ops run their reference: {library.status()}"]


def _check(model: nn.Module, sample: Tensor | None, rounds: int) -> None:
    """Checks the arguments of :func:`accelerate`."""
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a torch.nn.Module, got {type(model).__name__}")
    if sample is not None and not isinstance(sample, Tensor):
        raise TypeError(f"sample must be a tensor of images, got {type(sample).__name__}")
    if rounds < 0:
        raise ValueError(f"rounds must be 0 or more, got {rounds}")
    if any(tensor.is_meta for tensor in (*model.parameters(), *model.buffers())):
        raise ValueError("model must have weights to be compared with, got some on the meta device")


@contextlib.contextmanager
def _evaluated(network: nn.Module) -> Iterator[None]:
    """Runs the network in eval mode; afterwards its modules are in the modes that they were in."""
    training = [module for module in network.modules() if module.training]
    network.eval()
    stance = contextlib.ExitStack()
    if any(module._compiled_call_impl is not None for module in network.modules()):
        # what module.compile() has compiled does not run hooks that are new
        stance.enter_context(torch.compiler.set_stance("force_eager"))
    try:
        yield
    finally:
        stance.close()
        for module in training:
            module.training = True


def _fuse_parts(
    network: nn.Module, candidates: Sequence[tuple[str, nn.Module]], images: Tensor, rounds: int
) -> tuple[list[Part], dict[str, float]]:
    """Fuses the candidates that come out right; what became of each, and times of the network.

    An error leaves all of them as they were.
    """
    try:
        try:
            maps = capture(network, [module for _, module in candidates], images)
        except Exception as error:
            raise ValueError(
                f"sample must be images that {type(network).__name__} can run, got "
                f"{tuple(images.shape)}, for which it says: {error}"
            ) from error
        parts = [
            try_part(name, module, maps.get(module), rounds, images.device)
            for name, module in candidates
        ]
        replaced = [
            module for part, (_, module) in zip(parts, candidates, strict=True) if part.replaced
        ]
        whole = time_whole(network, replaced, images, rounds) if replaced and rounds else {}
    except BaseException:
        for _, module in candidates:
            if isinstance(module, Fused):
                unfuse(module)
        raise
    return parts, whole


@torch.no_grad()
def accelerate(model: nn.Module, sample: Tensor | None = None, *, rounds: int = 5) -> Report:
    """Replaces the backbone, the BiFPN and the heads of ``model`` by fused ones, in place.

    Known are effdet's models and their EfficientNets of timm, modules built like zylo117's, and
    whatever describes itself by ``as_fusion_nodes``, ``as_head_layers`` or ``as_backbone_blocks``
    (:mod:`edet.describe`), also inside ``DetBenchPredict``, ``DetBenchTrain`` or any other wrapper.
    Modules, parameters, buffers, hooks and state-dict keys stay the same objects. In training mode,
    or when a gradient is needed, the model's own layers run; in eval mode without gradients the
    fused ops do.

    Every part is compared with a float64 run of its own layers on a sample input before it is
    accepted: a part that cannot be matched is left as it was, and the report says why.

    Args:
        model: the model, or a wrapper around it.
        sample: images (N, 3, H, W) that the network is tried with; one random image of the model's
            own size (``config.image_size``, else 512×512) when None.
        rounds: timed runs of every part before and after; 0 measures nothing.

    Returns:
        A report that prints as a table.

    Raises:
        TypeError: ``model`` is not a module, or ``sample`` not a tensor.
        ValueError: ``model`` holds no BiFPN and no head that is known, cannot run ``sample``, or is
            on the meta device; ``rounds`` is negative.
    """
    _check(model, sample, rounds)
    found = list(_find(model))
    if all(_is_backbone(module) for _, module, _ in found):
        raise ValueError(
            f"model must hold a BiFPN or a head that is known, got {type(model).__name__} "
            f"without one: {_HELP}"
        )
    candidates = [(name, module) for name, module, reason in found if not reason]
    parts = {n: Part(n, type(m).__name__, reason) for n, m, reason in found if reason}
    if not candidates:
        return Report([parts[name] for name, _, _ in found], notes=_notes())
    network = network_of(model, [name for name, _, _ in found])
    images = sample_images(network, sample)
    with _evaluated(network):
        tried, whole = _fuse_parts(network, candidates, images, rounds)
    parts |= {part.name: part for part in tried}
    shape = "×".join(map(str, images.shape))
    dtype = str(images.dtype).removeprefix("torch.")
    return Report(
        [parts[name] for name, _, _ in found],
        whole.get("own"),
        whole.get("fused"),
        f"{'random images' if sample is None else 'given images'} {shape}, {dtype}, "
        f"{images.device}, {torch.get_num_threads()} threads; "
        + (f"medians of {rounds} runs, " if rounds else "")
        + "differences from float64 as a fraction of the largest value",
        _notes(),
    )


def restore(model: nn.Module) -> list[str]:
    """Undoes :func:`accelerate`: every part runs its own layers again.

    Returns:
        Names of the modules that were restored.
    """
    fused = [(name, m) for name, m in model.named_modules() if isinstance(m, Fused)]
    for _, module in fused:
        unfuse(module)
    return [name for name, _ in fused]
