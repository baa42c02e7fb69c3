"""What the ops check of their arguments before any memory is touched."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ..names import WORDS, Size
from ..packing import PANEL


def check_word(argument: str, word: str, words: Sequence[str]) -> int:
    """Checks that ``word`` is one of ``words``; its number."""
    try:
        return words.index(word)
    except ValueError:
        raise ValueError(f"{argument} must be one of {', '.join(words)}, got {word!r}") from None


def numbers_of(**arguments: str) -> tuple[int, ...]:
    """The numbers by which an operator is given the words of ``arguments``, checked."""
    return tuple(check_word(name, word, WORDS[name]) for name, word in arguments.items())


def shape_of(x: Tensor) -> str:
    return f"{tuple(x.shape)}"


def check_list(argument: str, value: object, content: str, most: int | None = None) -> None:
    """Checks that ``value`` is a list or tuple of 1 to ``most`` entries."""
    if not isinstance(value, (list, tuple)):
        got = f"a tensor of shape {shape_of(value)}" if isinstance(value, Tensor) else repr(value)
        raise ValueError(f"{argument} must be a non-empty list of {content}, got {got}")
    if not value:
        raise ValueError(f"{argument} must be a non-empty list of {content}, got none")
    if most is not None and len(value) > most:
        raise ValueError(f"{argument} must be at most {most} {content}, got {len(value)}")


def check_maps(argument: str, inputs: Sequence[Tensor], *, same_channels: bool = True) -> None:
    """Checks that ``inputs`` are float NCHW maps of one dtype, device and batch size."""
    check_list(argument, inputs, "maps")
    for i, x in enumerate(inputs):
        name = f"{argument}[{i}]"
        if not isinstance(x, Tensor):
            raise TypeError(f"{name} must be a tensor, got {type(x).__name__}")
        if x.dim() != 4 or 0 in x.shape[1:]:
            raise ValueError(f"{name} must be (N, C, H, W) with C, H, W ≥ 1, got {shape_of(x)}")
        if x.layout != torch.strided:
            raise ValueError(f"{name} must be a dense (strided) tensor, got layout {x.layout}")
        if not x.is_floating_point():
            raise TypeError(f"{name} must be a float tensor, got {x.dtype}")
        first = inputs[0]
        if x.dtype != first.dtype:
            raise TypeError(f"{name} must be {first.dtype} like {argument}[0], got {x.dtype}")
        if x.device != first.device:
            raise ValueError(f"{name} must be on {first.device} like {argument}[0], got {x.device}")
        if x.shape[0] != first.shape[0]:
            raise ValueError(
                f"{name} must have batch {first.shape[0]} like {argument}[0], got {x.shape[0]}"
            )
        if same_channels and x.shape[1] != first.shape[1]:
            raise ValueError(
                f"{name} must have {first.shape[1]} channels like {argument}[0], got {x.shape[1]}"
            )


def check_weight(name: str, w: Tensor, shapes: Sequence[tuple[int, ...]], x: Tensor) -> None:
    """Checks a weight's shape (any of ``shapes``), that it is float and that it is with ``x``."""
    if not isinstance(w, Tensor):
        raise TypeError(f"{name} must be a tensor, got {type(w).__name__}")
    if tuple(w.shape) not in shapes:
        wanted = " or ".join(str(s) for s in shapes)
        raise ValueError(f"{name} must be {wanted}, got {shape_of(w)}")
    if not w.is_floating_point():
        raise TypeError(f"{name} must be a float tensor, got {w.dtype}")
    if w.device != x.device:
        raise ValueError(f"{name} must be on {x.device} like the maps, got {w.device}")


def check_edges(
    edge_weights: Tensor | None, shapes: list[tuple[int, ...]], fusion: str, x: Tensor
) -> None:
    if fusion == "sum":
        if edge_weights is not None:
            raise ValueError(f"edge_weights must be None for fusion 'sum', got {edge_weights!r}")
    elif edge_weights is None:
        raise ValueError(f"edge_weights must be given for fusion {fusion!r}, got None")
    else:
        check_weight("edge_weights", edge_weights, shapes, x)


def check_size(name: str, size: Sequence[int]) -> Size:
    pair = tuple(size) if isinstance(size, (list, tuple)) else size  # torch.Size is a tuple
    if (
        not isinstance(pair, tuple)
        or len(pair) != 2
        or not all(isinstance(n, (int, torch.SymInt)) and n > 0 for n in pair)
    ):
        raise ValueError(f"{name} must be two positive integers (H, W), got {pair}")
    return size[0], size[1]


def check_resize(name: str, in_size: Sequence[int], size: Size) -> None:
    h, w = in_size
    if (h < size[0] and w > size[1]) or (h > size[0] and w < size[1]):
        raise ValueError(
            f"{name} must grow or shrink to {size} along both axes, got a map of {(h, w)}"
        )


def dw_shapes(channels: int) -> list[tuple[int, ...]]:
    return [(channels, 1, 3, 3), (9, channels)]


def out_channels(scale: Tensor) -> int:
    """C_out, the length of ``scale``, checked."""
    if not isinstance(scale, Tensor) or scale.dim() != 1 or len(scale) == 0:
        got = shape_of(scale) if isinstance(scale, Tensor) else type(scale).__name__
        raise ValueError(f"scale must be (C_out,) with C_out at least 1, got {got}")
    return scale.shape[0]


def check_out(scale: Tensor, shift: Tensor, pw_weight: Tensor, channels: int, x: Tensor) -> None:
    """Checks a pointwise weight with its folded batch norm, (C_out,) each."""
    c_out = out_channels(scale)
    check_weight("scale", scale, [(c_out,)], x)
    check_weight("shift", shift, [(c_out,)], x)
    panels = -(-c_out // PANEL)
    shapes = [(c_out, channels, 1, 1), (panels, channels, PANEL)]
    check_weight("pw_weight", pw_weight, shapes, x)


def check_levels(name: str, t: Tensor, levels: int) -> None:
    """Checks that ``t`` is (C_out,) or one row per level."""
    if not isinstance(t, Tensor) or t.dim() not in (1, 2) or t.shape[:-1] not in ((), (levels,)):
        got = shape_of(t) if isinstance(t, Tensor) else type(t).__name__
        raise ValueError(f"{name} must be (C_out,) or ({levels}, C_out), got {got}")


def refuse_gradients(op: str, **arguments: Sequence[Tensor | None]) -> None:
    if torch.is_grad_enabled():
        for name, given in arguments.items():
            if any(t is not None and t.requires_grad for t in given):
                raise ValueError(
                    f"{name} must not require gradients, because {op} has none: call it under "
                    "torch.no_grad() or on detached tensors"
                )
