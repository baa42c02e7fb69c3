"""Fused modules: the class that an accelerated module has until it is restored."""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import Tensor, nn

from ..fused.describe import (
    Mismatch,
)
from ..fused.module import PackedModule, adopt, release
from ..fused.packed import pack
from .recognise import describe


class Fused(PackedModule):
    """Mixed into the class of an accelerated module."""

    original_class: type[nn.Module]

    def pack(self, dtype: torch.dtype) -> Any:
        description = describe(self)
        if description is None:
            raise Mismatch(f"{self.original_class.__name__} is not recognised any more")
        return pack(description, dtype)

    def forward(self, maps: Any) -> Any:
        """The fused ops in eval mode without gradients, otherwise the module's own layers."""
        own = self.original_class.forward
        first = maps[0] if isinstance(maps, (list, tuple)) and maps else maps
        if not isinstance(first, Tensor):
            return own(self, maps)  # which says what it wants
        try:
            packed = self.packed(first)
        except Mismatch:  # its layers were exchanged for others
            packed = None
        return own(self, maps) if packed is None else packed[0].run(maps, packed[1])

    def __reduce_ex__(self, protocol: Any) -> Any:
        return _blank, (self.original_class,), self.__getstate__()


_CLASSES: dict[type[nn.Module], type[Fused]] = {}


def _fused_class(original: type[nn.Module]) -> type[Fused]:
    if original not in _CLASSES:
        members = {"original_class": original, "__doc__": original.__doc__, "__module__": __name__}
        fused = type(f"Fused{original.__name__}", (Fused, original), members)
        _CLASSES[original] = cast("type[Fused]", fused)
    return _CLASSES[original]


def _blank(original: type[nn.Module]) -> Fused:
    """A fused module without state, for copies and pickles."""
    fused = _fused_class(original)
    return fused.__new__(fused)


def fuse(module: nn.Module) -> None:
    adopt(module, _fused_class(type(module)))


def unfuse(module: nn.Module) -> None:
    fused = cast(Fused, module)
    release(fused, fused.original_class)
