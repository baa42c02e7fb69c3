"""Operands of machine code as functions of a warp: how they are read and written.

A register holds 32 lanes of 32 bits; a uniform register one number. Everything is read as an array
of 32 unsigned numbers, or as Python's numbers for the uniform datapath.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

if TYPE_CHECKING:
    from benchmarks.gpu_model.machine import Warp

Lanes = npt.NDArray[Any]
Read = Callable[["Warp"], Any]
Write = Callable[["Warp", Any], None]

WORD = 0xFFFFFFFF
_CONSTANT = re.compile(r"c\[0x([0-9a-f]+)\]\s*\[(?:(U?R\w+)\+?)?(-?0x[0-9a-f]+)?\]")
_REGISTER = re.compile(r"(U?)R(\d+|Z)")
_FLOATS = {"+INF": np.inf, "-INF": -np.inf, "+QNAN": np.nan, "-QNAN": np.nan, "INF": np.inf}


def is_predicate(text: str) -> bool:
    """Whether an operand is a predicate."""
    return re.fullmatch(r"!?U?P(\d|T)", text) is not None


def is_register(text: str) -> bool:
    """Whether an operand is a register that is written."""
    return re.fullmatch(r"U?R(\d+|Z)", text) is not None or text == "SRZ"


def predicate(text: str) -> Read:
    """Reads a predicate: lanes of bool, or a bool."""
    inverted, name = text.startswith("!"), text.lstrip("!")
    if name in ("PT", "UPT"):
        return lambda w: not inverted
    number = int(name[-1])
    if name.startswith("U"):
        return lambda w: bool(w.uniform_predicates[number]) != inverted
    if inverted:
        return lambda w: ~w.predicates[number]
    return lambda w: w.predicates[number]


def write_predicate(text: str) -> Write:
    """Writes a predicate."""
    if text in ("PT", "UPT"):
        return lambda w, value: None
    number = int(text[-1])
    if text.startswith("U"):

        def write_uniform(w: Warp, value: Any) -> None:
            w.uniform_predicates[number] = bool(value)

        return write_uniform

    def write(w: Warp, value: Any) -> None:
        if w.all:
            w.predicates[number] = value
        else:
            np.copyto(w.predicates[number], value, where=w.mask)

    return write


def write_register(text: str) -> Write:
    """Writes a register of the active lanes, or a uniform register."""
    match = _REGISTER.fullmatch(text)
    if match is None or match[2] == "Z":
        return lambda w, value: None
    number = int(match[2])
    if match[1]:

        def write_uniform(w: Warp, value: Any) -> None:
            # what a register of the lanes holds there is the same in all that run
            lanes = np.broadcast_to(np.asarray(value), (32,))
            w.uniform[number] = int(lanes[int(w.mask.argmax())]) & WORD

        return write_uniform

    def write(w: Warp, value: Any) -> None:
        if isinstance(value, int):
            value &= WORD
        if w.all:
            w.registers[number] = value
        else:
            np.copyto(w.registers[number], value, where=w.mask, casting="unsafe")

    return write


def next_register(text: str, step: int = 1) -> str:
    """The register after one, zero after the zero register."""
    match = _REGISTER.search(text)
    if match is None or match[2] == "Z":
        return text
    return text.replace(match[0], f"{match[1]}R{int(match[2]) + step}")


def _constant(match: re.Match[str], size: int) -> Read:
    bank, offset = int(match[1], 16), int(match[3] or "0x0", 16)
    if match[2] is None or match[2] in ("RZ", "URZ"):
        # the same for all warps of a launch, and read often
        return lambda w: w.block.constant(bank, offset, size)
    index = integer(match[2])

    def read(w: Warp) -> Any:
        at = index(w)
        if isinstance(at, int):
            return w.block.constant(bank, at + offset, size)
        found = np.zeros(32, np.uint32)
        for place in np.unique(at[w.mask]):
            found[at == place] = w.block.constant(bank, (int(place) + offset) & WORD, size)
        return found

    return read


def constant(text: str, size: int = 4) -> Read:
    """Reads ``c[bank][register + offset]``."""
    match = _CONSTANT.search(text)
    assert match, text
    return _constant(match, size)


def integer(text: str) -> Read:
    """Reads an operand as unsigned words; ``-``, ``~`` and ``|…|`` in front are applied."""
    if text.startswith("-") and not text.startswith("-0x"):
        inner = integer(text[1:])
        return lambda w: _negate(inner(w))
    if text.startswith("~"):
        inner = integer(text[1:])
        return lambda w: inner(w) ^ WORD if isinstance(inner(w), int) else ~inner(w)
    if text.startswith("|"):
        inner = integer(text.strip("|"))
        return lambda w: np.abs(np.asarray(inner(w)).astype(np.uint32).view(np.int32)).view(
            np.uint32
        )
    if match := _CONSTANT.fullmatch(text):
        return _constant(match, 4)
    text = text.split(".")[0] if text.startswith(("R", "U", "SR")) else text
    if match := _REGISTER.fullmatch(text):
        if match[2] == "Z":
            return lambda w: 0
        number = int(match[2])
        if match[1]:
            return lambda w: w.uniform[number]
        return lambda w: w.registers[number]
    if text == "SRZ":
        return lambda w: 0
    value = int(text, 0) & WORD
    return lambda w: value


def _negate(value: Any) -> Any:
    return -value & WORD if isinstance(value, int) else (0 - value.astype(np.uint32))


def wide(text: str) -> Read:
    """Reads a pair of registers as unsigned numbers of 64 bits."""
    inverted, name = text.startswith("~"), text.lstrip("~-")
    if match := _CONSTANT.fullmatch(name):
        low, high = _constant(match, 4), constant(_shifted(name))
    elif _REGISTER.fullmatch(name):
        low, high = integer(name), integer(next_register(name))
    else:
        low, high = integer(name), integer("RZ")

    def read(w: Warp) -> Any:
        value = as_wide(low(w)) | as_wide(high(w)) << np.uint64(32)
        return ~value if inverted else value

    negated = text.startswith("-") and not text.startswith("-0x")
    return (lambda w: np.uint64(0) - read(w)) if negated else read


def _shifted(text: str) -> str:
    """The word after a constant."""
    match = _CONSTANT.fullmatch(text)
    assert match
    return text.replace(f"{match[3]}]", f"{int(match[3], 16) + 4:#x}]")


def as_wide(value: Any) -> Any:
    """Words as numbers of 64 bits."""
    return np.asarray(value, np.int64 if isinstance(value, int) else None).astype(np.uint64)


def real(text: str) -> Read:
    """Reads an operand as float32."""
    if text.startswith("-") and not re.match(r"-[\d.IQ]", text):
        inner = real(text[1:])
        return lambda w: -inner(w)
    if text.startswith("|"):
        inner = real(text.strip("|"))
        return lambda w: np.abs(inner(w))
    text = text.strip()
    if text in _FLOATS:
        value = np.float32(_FLOATS[text])
        return lambda w: value
    if ".H0_H0" in text or ".H1_H1" in text:
        high, half = ".H1_H1" in text, integer(text.split(".")[0])

        def read_half(w: Warp) -> Any:
            bits = np.broadcast_to(np.asarray(half(w), np.uint32), (32,))
            return (
                (bits >> 16 if high else bits).astype(np.uint16).view(np.float16).astype(np.float32)
            )

        return read_half
    if re.fullmatch(r"-?[\d.]+(e[+-]?\d+)?", text) and not text.startswith("0x"):
        number = np.float32(text)
        return lambda w: number
    bits = integer(text)
    return lambda w: as_real(bits(w))


def as_real(bits: Any) -> Any:
    """The float32 that words are."""
    return (
        np.asarray(bits, np.int64 if isinstance(bits, int) else None)
        .astype(np.uint32)
        .view(np.float32)
    )


def signed(value: Any) -> Any:
    """Words as signed numbers."""
    if isinstance(value, int):
        return value - (1 << 32) if value & 0x80000000 else value
    return value.view(np.int32) if value.dtype == np.uint32 else value.astype(np.int32)
