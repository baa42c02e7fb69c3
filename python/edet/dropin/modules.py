"""Fused modules: the class that an accelerated module has until it is restored."""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import Tensor, nn

from ..fused.describe import Mismatch, is_batch_norm
from ..fused.module import PackedModule, adopt, release
from ..fused.packed import pack
from .recognise import describe


class Fused(PackedModule):
    """Mixed into the class of an accelerated module."""

    original_class: type[nn.Module]
    _made_of: dict[str, type]  # the classes of its layers when it was fused, and so compared

    def check_layers(self) -> None:
        found = _made_of(self)
        for name in self._made_of.keys() | found.keys():
            if found.get(name) is not self._made_of.get(name):
                raise Mismatch(f"its layer {name} was exchanged")
        if describe(self) is None:
            raise Mismatch(f"{self.original_class.__name__} is not recognised any more")

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
        packed = self.packed(first)
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


def _made_of(module: nn.Module) -> dict[str, type]:
    """The class of each layer; a synchronised batch norm counts as an ordinary one."""
    return {
        name: nn.BatchNorm2d if is_batch_norm(layer) else type(layer)
        for name, layer in module.named_modules()
        if layer is not module
    }


def fuse(module: nn.Module) -> None:
    """Makes ``module`` a :class:`Fused` one, in place."""
    adopt(module, _fused_class(type(module)))
    cast(Fused, module)._made_of = _made_of(module)


def unfuse(module: nn.Module) -> None:
    """Undoes :func:`fuse`."""
    fused = cast(Fused, module)
    del fused._made_of
    release(fused, fused.original_class)
