"""Every part is tried on a sample before it is kept: compared in float64, then timed."""

from __future__ import annotations

import itertools
import math
import statistics
from collections.abc import Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn

from edet_kernels.testing.numeric import CheckFailed, check_network, relative_difference
from edet_kernels.testing.timing import Call, host_clock, measure

from .modules import Fused, fuse, unfuse
from .report import Part


def network_of(model: nn.Module, names: Sequence[str]) -> nn.Module:
    """The smallest module of ``model`` that holds all of ``names``: without its wrappers."""
    split = [name.split(".")[:-1] for name in names]
    common = [
        parts[0]
        for parts in itertools.takewhile(lambda p: len(set(p)) == 1, zip(*split, strict=False))
    ]
    network = model.get_submodule(".".join(common))
    # a container is not a network: it is run by what holds it
    while isinstance(network, (nn.Sequential, nn.ModuleList, nn.ModuleDict)) and common:
        common.pop()
        network = model.get_submodule(".".join(common))
    return network


def sample_images(network: nn.Module, sample: Tensor | None) -> Tensor:
    """An image of the network's own size, dtype and device, unless one is given."""
    tensor = next(iter(network.parameters()), torch.empty(0))
    if sample is not None:
        return sample.to(tensor.device, tensor.dtype)
    size = getattr(getattr(network, "config", None), "image_size", (512, 512))
    generator = torch.Generator().manual_seed(0)
    images = torch.randn(1, 3, *size, dtype=torch.float32, generator=generator)
    return images.to(tensor.device, tensor.dtype)


def tensors(value: Any) -> list[Tensor]:
    """All tensors in nested lists and tuples."""
    if isinstance(value, Tensor):
        return [value]
    return [t for v in value for t in tensors(v)] if isinstance(value, (list, tuple)) else []


def _copied(maps: Any) -> Any:
    """A new list of the same maps: effdet's BiFPN appends to the one it is given."""
    return maps if isinstance(maps, Tensor) else type(maps)(maps)


def _own_result(module: nn.Module, maps: Any) -> list[Tensor]:
    """What the layers of ``module`` make of ``maps``."""
    own = getattr(module, "original_class", type(module)).forward
    return tensors(own(module, _copied(maps)))


def _exact_result(module: nn.Module, maps: Any) -> list[Tensor]:
    """The same in float64; the module is as it was afterwards."""
    state = {n: t.double() if t.is_floating_point() else t for n, t in module.state_dict().items()}
    exact = maps.double() if isinstance(maps, Tensor) else type(maps)(x.double() for x in maps)
    return tensors(torch.func.functional_call(module, state, (exact,)))


def _time(calls: dict[str, Call], rounds: int, device: torch.device) -> dict[str, float]:
    """Median milliseconds of each call; they take turns."""
    times = measure(calls, host_clock(device), rounds=rounds)
    return {name: statistics.median(t) for name, t in times.items()}


def capture(
    network: nn.Module, modules: Sequence[nn.Module], images: Tensor
) -> dict[nn.Module, Any]:
    """The maps that each of ``modules`` is given when ``network`` runs ``images``."""
    seen: dict[nn.Module, Any] = {}

    def hook(module: nn.Module, args: tuple[Any, ...]) -> None:
        seen.setdefault(module, _copied(args[0]))

    hooks = [module.register_forward_pre_hook(hook) for module in modules]
    try:
        network(images)
    finally:
        for handle in hooks:
            handle.remove()
    return seen


def try_part(name: str, module: nn.Module, maps: Any, rounds: int, device: torch.device) -> Part:
    """Fuses one module if the fused result is right, and times both."""
    kind = type(module).__name__
    if maps is None:
        return Part(name, kind, "the network did not run it on the sample input")
    exact = _exact_result(module, maps)
    own = relative_difference(_own_result(module, maps), exact)
    if not math.isfinite(own):
        return Part(name, kind, "its own result for the sample input is not finite")
    fuse(module)
    try:
        result = tensors(module(_copied(maps)))
        difference = relative_difference(result, exact)
        check_network(name, difference, own, result[0].dtype)
    except (CheckFailed, ValueError, TypeError, RuntimeError) as error:
        unfuse(module)
        wrong = isinstance(error, CheckFailed)
        reason = f"its result differs by {difference:.1e}" if wrong else str(error)
        return Part(name, kind, reason, difference if wrong else None, own)
    times: dict[str, float] = {}
    if rounds:
        times = _time(
            {
                "own": lambda: _own_result(module, maps),
                "fused": lambda: module(_copied(maps)),
            },
            rounds,
            device,
        )
    return Part(name, kind, "", difference, own, times.get("own"), times.get("fused"))


def time_whole(
    network: nn.Module, replaced: Sequence[nn.Module], images: Tensor, rounds: int
) -> dict[str, float]:
    """Median milliseconds of the network with its own layers and with the fused ones."""

    def own() -> None:
        classes = [type(module) for module in replaced]
        for module in replaced:
            module.__class__ = cast(Fused, module).original_class
        try:
            network(images)
        finally:
            for module, fused in zip(replaced, classes, strict=True):
                module.__class__ = fused

    return _time({"own": own, "fused": lambda: network(images)}, rounds, images.device)
