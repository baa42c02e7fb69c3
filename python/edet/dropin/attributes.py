"""What recognisers read of other people's modules: attributes that must be there, activations."""

from __future__ import annotations

from typing import Any

from ..fused.describe import (
    Mismatch,
)

#: Class names of activations, in lower case, that the kernels compute.
_ACTIVATIONS = {
    "silu": "swish",
    "swish": "swish",
    "swishme": "swish",
    "memoryefficientswish": "swish",
    "relu": "relu",
    "relu6": "relu6",
    "hardswish": "hard_swish",
    "hardswishme": "hard_swish",
    "identity": "none",
    "nonetype": "none",
}


def activation(act: object) -> str:
    name = type(act).__name__
    try:
        return _ACTIVATIONS[name.lower()]
    except KeyError:
        raise Mismatch(f"the kernels have no activation {name}") from None


def attributes(module: object, *names: str) -> list[Any]:
    """The attributes ``names`` of a part of a recognised module.

    Raises:
        Mismatch: one is missing.
    """
    for name in names:
        if not hasattr(module, name):
            raise Mismatch(f"{type(module).__name__} has no {name}")
    return [getattr(module, name) for name in names]
