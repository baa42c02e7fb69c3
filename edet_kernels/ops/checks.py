"""What the ops check of their arguments before any memory is touched."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypeGuard

import torch
from torch import Tensor

from ..names import WORDS, Size
from ..packing import PANEL

#: Sizes of maps are numbers of 32 bits in the kernels.
MOST = 2**31 - 1


def check_word(argument: str, word: str, words: Sequence[str]) -> int:
    """Checks that ``word`` is one of ``words``; its number."""
    try:
        return words.index(word)
    except ValueError:
        raise ValueError(f"{argument} must be one of {', '.join(words)}, got {word!r}") from None


def numbers_of(**arguments: str) -> tuple[int, ...]:
    """The numbers by which an operator is given the words of ``arguments``, checked."""
    return tuple(check_word(name, word, WORDS[name]) for name, word in arguments.items())


def shape_of(x: object) -> str:
    """The shape of a tensor as text; the type's name of anything else."""
    return f"{tuple(x.shape)}" if isinstance(x, Tensor) else type(x).__name__


def check_flag(argument: str, value: object) -> None:
    """Checks that ``value`` is True or False."""
    if not isinstance(value, bool):
        raise TypeError(f"{argument} must be True or False, got {_text(value)}")


def is_integer(value: object) -> TypeGuard[int]:
    """Whether ``value`` is a whole number: True and False are none."""
    return isinstance(value, int) and not isinstance(value, bool)


def check_number(argument: str, value: object) -> None:
    """Checks that ``value`` is a number."""
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise TypeError(f"{argument} must be a number, got {_text(value)}")


def check_integer(argument: str, value: object, least: int, most: int) -> None:
    """Checks that ``value`` is a whole number from ``least`` to ``most``."""
    if not is_integer(value) or not least <= value <= most:
        raise ValueError(f"{argument} must be an integer of {least} to {most}, got {_text(value)}")


def check_stride(stride: object) -> None:
    if not is_integer(stride) or stride not in (1, 2):
        raise ValueError(f"stride must be 1 or 2, got {_text(stride)}")


def _text(value: object) -> str:
    return f"a tensor of shape {shape_of(value)}" if isinstance(value, Tensor) else repr(value)


def check_list(argument: str, value: object, content: str, most: int | None = None) -> None:
    """Checks that ``value`` is a list or tuple of 1 to ``most`` entries."""
    if not isinstance(value, (list, tuple)):
        raise ValueError(f"{argument} must be a non-empty list of {content}, got {_text(value)}")
    if not value:
        raise ValueError(f"{argument} must be a non-empty list of {content}, got none")
    if most is not None and len(value) > most:
        raise ValueError(f"{argument} must be at most {most} {content}, got {len(value)}")


def check_parts(name: str, parts: object, content: str) -> None:
    """Checks that ``parts`` are the tensors that ``content`` lists by their names."""
    names = content.split(", ")
    if not isinstance(parts, (list, tuple)) or len(parts) != len(names):
        got = f"{len(parts)} tensors" if isinstance(parts, (list, tuple)) else _text(parts)
        raise ValueError(f"{name} must be ({content}), got {got}")
    for part, t in zip(names, parts, strict=True):
        if not isinstance(t, Tensor):
            raise TypeError(f"{part} of {name} must be a tensor, got {type(t).__name__}")


def check_map(name: str, x: object, dtype: torch.dtype | None = None) -> None:
    """Checks that ``x`` is a map (N, C, H, W) of ``dtype``, of any float dtype when it is None."""
    if not isinstance(x, Tensor):
        raise TypeError(f"{name} must be a tensor, got {type(x).__name__}")
    if x.dim() != 4 or 0 in x.shape[1:]:
        raise ValueError(f"{name} must be (N, C, H, W) with C, H, W ≥ 1, got {shape_of(x)}")
    if x.layout != torch.strided:
        raise ValueError(f"{name} must be a dense (strided) tensor, got layout {x.layout}")
    _check_dtype(name, x, dtype)


def _check_dtype(name: str, x: Tensor, dtype: torch.dtype | None) -> None:
    if dtype is None and not x.is_floating_point():
        raise TypeError(f"{name} must be a float tensor, got {x.dtype}")
    if dtype is not None and x.dtype != dtype:
        raise TypeError(f"{name} must be {dtype}, got {x.dtype}")


def check_maps(argument: str, inputs: Sequence[Tensor], *, same_channels: bool = True) -> None:
    """Checks that ``inputs`` are float NCHW maps of one dtype, device and batch size."""
    check_list(argument, inputs, "maps")
    for i, x in enumerate(inputs):
        check_map(f"{argument}[{i}]", x)
        check_like(argument, i, x, inputs[0], same_channels=same_channels)


def check_like(argument: str, i: int, x: Tensor, first: Tensor, *, same_channels: bool) -> None:
    """Checks that map ``i`` has what all have in common with the first one."""
    name, like = f"{argument}[{i}]", f"like {argument}[0]"
    if x.dtype != first.dtype:
        raise TypeError(f"{name} must be {first.dtype} {like}, got {x.dtype}")
    if x.device != first.device:
        raise ValueError(f"{name} must be on {first.device} {like}, got {x.device}")
    if x.shape[0] != first.shape[0]:
        raise ValueError(f"{name} must have batch {first.shape[0]} {like}, got {x.shape[0]}")
    if same_channels and x.shape[1] != first.shape[1]:
        raise ValueError(f"{name} must have {first.shape[1]} channels {like}, got {x.shape[1]}")


def check_image(image: object) -> None:
    """Checks that ``image`` is (N, 3, H, W) with at least one pixel."""
    if not isinstance(image, Tensor) or image.dim() != 4 or image.shape[1] != 3:
        raise ValueError(f"image must be (N, 3, H, W), got {shape_of(image)}")
    if 0 in image.shape[2:]:
        raise ValueError(f"image must have at least one pixel, got {shape_of(image)}")
    if image.layout != torch.strided:
        raise ValueError(f"image must be a dense (strided) tensor, got layout {image.layout}")


def check_normalisation(
    mean: Tensor | None, std: Tensor | None, image: Tensor, dtype: torch.dtype | None = None
) -> None:
    """Checks that ``mean`` and ``std`` are (3,) of ``dtype`` (None: any float), or both None."""
    if (mean is None) != (std is None):
        raise ValueError("mean and std must be given together")
    for name, t in (("mean", mean), ("std", std)):
        if t is not None:
            check_weight(name, t, [(3,)], image, dtype)


def check_weight(
    name: str,
    w: object,
    shapes: Sequence[tuple[int, ...]],
    x: Tensor,
    dtype: torch.dtype | None = None,
) -> None:
    """Checks a weight's shape, any of ``shapes``, its dtype and that it is with ``x``.

    ``dtype`` None: any float dtype.
    """
    if not isinstance(w, Tensor):
        raise TypeError(f"{name} must be a tensor, got {type(w).__name__}")
    if tuple(w.shape) not in shapes:
        wanted = " or ".join(str(s) for s in shapes)
        raise ValueError(f"{name} must be {wanted}, got {shape_of(w)}")
    _check_dtype(name, w, dtype)
    if w.device != x.device:
        raise ValueError(f"{name} must be on {x.device} like the maps, got {w.device}")


def check_edges(
    edge_weights: Tensor | None, shapes: list[tuple[int, ...]], fusion: str, x: Tensor
) -> None:
    if fusion == "sum":
        if edge_weights is not None:
            raise ValueError(
                f"edge_weights must be None for fusion 'sum', got {_text(edge_weights)}"
            )
    elif edge_weights is None:
        raise ValueError(f"edge_weights must be given for fusion {fusion!r}, got None")
    else:
        check_weight("edge_weights", edge_weights, shapes, x)


def check_size(name: str, size: Sequence[int]) -> Size:
    pair = tuple(size) if isinstance(size, (list, tuple)) else size  # torch.Size is a tuple
    if (
        not isinstance(pair, tuple)
        or len(pair) != 2
        or not all((is_integer(n) or isinstance(n, torch.SymInt)) and n > 0 for n in pair)
        or any(isinstance(n, int) and n > MOST for n in pair)
    ):
        wanted = f"two positive integers (H, W) of at most {MOST}"
        raise ValueError(f"{name} must be {wanted}, got {_text(pair)}")
    return size[0], size[1]


def check_resize(name: str, in_size: Sequence[int], size: Size) -> None:
    h, w = in_size
    if (h < size[0] and w > size[1]) or (h > size[0] and w < size[1]):
        raise ValueError(
            f"{name} must grow or shrink to {size} along both axes, got a map of {(h, w)}"
        )


def dw_shapes(channels: int) -> list[tuple[int, ...]]:
    return [(channels, 1, 3, 3), (9, channels)]


def length_of(name: str, vector: object, length: str = "C_out") -> int:
    """The length of ``vector``, which is checked to be one."""
    if not isinstance(vector, Tensor) or vector.dim() != 1 or len(vector) == 0:
        wanted = f"({length},) with {length} at least 1"
        raise ValueError(f"{name} must be {wanted}, got {shape_of(vector)}")
    return vector.shape[0]


def columns_of(name: str, rows: object, count: int) -> int:
    """The C of ``rows``, which are checked to be (count, C)."""
    if not isinstance(rows, Tensor) or rows.dim() != 2 or len(rows) != count or 0 in rows.shape:
        raise ValueError(f"{name} must be ({count}, C) with C at least 1, got {shape_of(rows)}")
    return rows.shape[1]


def check_out(scale: Tensor, shift: Tensor, pw_weight: Tensor, channels: int, x: Tensor) -> None:
    """Checks a pointwise weight with its folded batch norm, (C_out,) each."""
    c_out = length_of("scale", scale)
    check_weight("scale", scale, [(c_out,)], x)
    check_weight("shift", shift, [(c_out,)], x)
    panels = -(-c_out // PANEL)
    shapes = [(c_out, channels, 1, 1), (panels, channels, PANEL)]
    check_weight("pw_weight", pw_weight, shapes, x)


def check_levels(name: str, t: Tensor, levels: int) -> None:
    """Checks that ``t`` is (C_out,) or one row per level."""
    if not isinstance(t, Tensor) or t.dim() not in (1, 2) or t.shape[:-1] not in ((), (levels,)):
        raise ValueError(f"{name} must be (C_out,) or ({levels}, C_out), got {shape_of(t)}")


def refuse_gradients(op: str, **arguments: Sequence[Tensor | None]) -> None:
    if torch.is_grad_enabled():
        for name, given in arguments.items():
            if any(t is not None and t.requires_grad for t in given):
                raise ValueError(
                    f"{name} must not require gradients, because {op} has none: call it under "
                    "torch.no_grad() or on detached tensors"
                )
