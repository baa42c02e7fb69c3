"""Autocast rules of the ops: what ``torch.autocast`` does to their maps.

As for PyTorch's convolutions, float32 and half maps are cast to autocast's dtype, which is that of
the results. Weights and folded batch norms stay in float32: a kernel rounds what it multiplies. In
`nms` and `detect` nothing is cast: they compute in float32 in any case. Maps come first among an
operator's arguments.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor

from .names import MAP_OPS

_KEYS = ("AutocastCPU", "AutocastCUDA")


def autocast_dtype(x: Tensor) -> torch.dtype | None:
    """The dtype that ``torch.autocast`` would compute in for ``x``; None where it is off."""
    device = x.device.type
    if not torch.amp.is_autocast_available(device) or not torch.is_autocast_enabled(device):
        return None
    eligible = x.is_floating_point() and x.dtype != torch.float64
    return torch.get_autocast_dtype(device) if eligible else None


def cast(maps: Any) -> Any:
    """``maps``, a map or a list of them, in the dtype that autocast wants; anything else as is."""
    if isinstance(maps, (list, tuple)):
        return [cast(x) for x in maps]
    dtype = autocast_dtype(maps) if isinstance(maps, Tensor) else None
    return maps if dtype is None else maps.to(dtype)


def _below(key: str, function: Callable[..., Any], maps: Any, *arguments: Any) -> Any:
    """The operator ``function`` on cast maps, past autocast."""
    maps = cast(maps)
    if function.__name__ == "stem.default":  # its last argument is the dtype of the result
        arguments = (*arguments[:-1], maps.dtype if maps.is_floating_point() else arguments[-1])
    keys = torch._C.DispatchKeySet(getattr(torch._C.DispatchKey, key))
    with torch._C._ExcludeDispatchKeyGuard(keys):
        return function(maps, *arguments)


_libraries: list[torch.library.Library] = []


def register(namespace: str = "edet_kernels") -> None:
    """Registers the rules for the operators that ``torch.ops`` has under ``namespace``."""
    found = [op for op in MAP_OPS if torch._C._dispatch_has_kernel(f"{namespace}::{op}")]
    if not found:
        return
    library = torch.library.Library(namespace, "FRAGMENT")
    _libraries.append(library)  # a library that is let go takes its kernels with it
    for op in found:
        function = getattr(getattr(torch.ops, namespace), op).default
        for key in _KEYS:
            library.impl(op, partial(_below, key, function), key)
