"""Fake kernels: what each operator returns, without computing it, for torch.compile and export.

They are written beside the op in :mod:`edet_kernels.ops`; the decorator here collects them.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor

F = TypeVar("F", bound=Callable[..., Any])

#: For each operator, forward or backward, its fake kernel.
FAKES: dict[str, Callable[..., Any]] = {}


def fake(op: str) -> Callable[[F], F]:
    """Makes a function the fake kernel of ``op``: it gets the arguments of the op's schema."""

    def take(function: F) -> F:
        FAKES[op] = function
        return function

    return take


def fake_kernel(op: str) -> Callable[..., Any]:
    """The fake kernel of ``op``."""
    return FAKES[op]


def empty_map(
    like: Tensor, channels: int, height: int, width: int, *, dtype: torch.dtype | None = None
) -> Tensor:
    """What a fake kernel returns for a map of the batch, device and, by default, dtype of ``like``.

    As all maps that kernels return it is channels_last.
    """
    return torch.empty(
        (like.shape[0], channels, height, width),
        dtype=dtype or like.dtype,
        device=like.device,
        memory_format=torch.channels_last,
    )


def empty_gradients(grad: Tensor | Sequence[Tensor], *arguments: Any) -> list[Tensor]:
    """The fake kernel of a backward: gradients of ``arguments``, which are those of the forward.

    A map like each map, a float32 tensor like each weight and an empty one for None. Numbers have
    none; lists of tensors count one by one.
    """
    flat = [t for a in arguments for t in (a if isinstance(a, (list, tuple)) else [a])]
    found = []
    for t in flat:
        if t is None:
            like = grad if isinstance(grad, Tensor) else grad[0]
            found.append(like.new_empty(0, dtype=torch.float32))
        elif isinstance(t, Tensor):
            found.append(
                empty_map(t, *t.shape[1:])
                if t.dim() == 4
                else t.new_empty(t.shape, dtype=torch.float32)
            )
    return found
