"""What the instructions on integers, bits and predicates do to a warp."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from benchmarks.gpu_model.machine import Action, Warp
from benchmarks.gpu_model.operands import (
    WORD,
    as_wide,
    integer,
    is_predicate,
    is_register,
    next_register,
    predicate,
    signed,
    wide,
    write_predicate,
    write_register,
)
from benchmarks.gpu_model.sass import Instruction

Parts = tuple[list[str], list[str], list[str]]


def split(instruction: Instruction) -> Parts:
    """Operands as what is written, what is read, and predicates that are read at the end."""
    operands = list(instruction.operands)
    written: list[str] = []
    if operands and (is_register(operands[0]) or is_predicate(operands[0])):
        written.append(operands.pop(0))
        while operands and is_predicate(operands[0]) and not operands[0].startswith("!"):
            # predicates behind the result are written, as long as something to read is left
            if all(is_predicate(o) for o in operands):
                break
            written.append(operands.pop(0))
    asked: list[str] = []
    while operands and is_predicate(operands[-1]):
        asked.insert(0, operands.pop())
    return written, operands, asked


def _word(value: Any) -> Any:
    return value & WORD if isinstance(value, int) else np.asarray(value).astype(np.uint32)


def add(i: Instruction) -> Action:
    """IADD3, VIADD, UIADD3, with carries in and out."""
    written, operands, asked = split(i)
    reads = [integer(o) for o in operands]
    extended = ".X" in i.name
    carries = [predicate(p) for p in asked]
    put, outs = write_register(written[0]), [write_predicate(p) for p in written[1:]]

    def run(w: Warp) -> None:
        if not outs and not extended:
            total: Any = 0
            for read in reads:
                value = read(w)
                total = total + (value if isinstance(value, int) else value.astype(np.uint32))
            put(w, _word(total))
            return
        whole = as_wide(reads[0](w))
        for read in reads[1:]:
            whole = whole + as_wide(read(w))
        if extended:
            for carry in carries:
                whole = whole + np.asarray(carry(w)).astype(np.uint64)
        put(w, _single(whole & np.uint64(WORD)))
        carried = whole >> np.uint64(32)
        for k, out in enumerate(outs):
            out(w, _single_bool(carried > k))

    return run


def _single(value: Any) -> Any:
    """An array of one number as an int: for the uniform datapath."""
    return int(value) if np.ndim(value) == 0 else value.astype(np.uint32)


def _single_bool(value: Any) -> Any:
    return bool(value) if np.ndim(value) == 0 else value


def multiply(i: Instruction) -> Action:
    """IMAD and UIMAD in all their forms."""
    written, operands, asked = split(i)
    modifiers = i.name.split(".")[1:]
    a, b = integer(operands[0]), integer(operands[1])
    put, outs = write_register(written[0]), [write_predicate(p) for p in written[1:]]
    unsigned = "U32" in modifiers
    carries = [predicate(p) for p in asked] if "X" in modifiers else []
    if "WIDE" in modifiers or "HI" in modifiers:
        c64 = wide(operands[2])
        put_high = write_register(next_register(written[0]))

        def run_wide(w: Warp) -> None:
            x, y = a(w), b(w)
            if unsigned:
                product = as_wide(x) * as_wide(y)
            else:
                product = (
                    np.asarray(signed(x)).astype(np.int64) * np.asarray(signed(y)).astype(np.int64)
                ).astype(np.uint64)
            addend = c64(w)
            total = product + addend
            for carry in carries:
                total = total + np.asarray(carry(w)).astype(np.uint64)
            if "HI" in modifiers:
                put(w, _single(total >> np.uint64(32)))
            else:
                put(w, _single(total & np.uint64(WORD)))
                put_high(w, _single(total >> np.uint64(32)))
            for out in outs:
                out(w, _single_bool(total < addend))

        return run_wide
    c = integer(operands[2])

    def run(w: Warp) -> None:
        x, y, z = a(w), b(w), c(w)
        if outs:
            total = as_wide(x) * as_wide(y) + as_wide(z)
            for carry in carries:
                total = total + np.asarray(carry(w)).astype(np.uint64)
            put(w, _single(total & np.uint64(WORD)))
            for out in outs:
                out(w, _single_bool(total >> np.uint64(32) != 0))
            return
        if isinstance(x, int) and isinstance(y, int) and isinstance(z, int):
            value: Any = x * y + z
        else:
            value = np.asarray(as_lanes(x) * as_lanes(y) + as_lanes(z))
        for carry in carries:
            value = value + np.asarray(carry(w)).astype(np.uint32)
        put(w, _word(value))

    return run


def as_lanes(value: Any) -> Any:
    return np.uint32(value & WORD) if isinstance(value, int) else value.astype(np.uint32)


def shift_and_add(i: Instruction) -> Action:
    """LEA: (a << n) + b, or the high word of that."""
    written, operands, asked = split(i)
    modifiers = i.name.split(".")[1:]
    put, outs = write_register(written[0]), [write_predicate(p) for p in written[1:]]
    a, b = integer(operands[0]), integer(operands[1])
    shift = integer(operands[-1])
    high = integer(operands[2]) if len(operands) == 4 else None
    carries = [predicate(p) for p in asked] if "X" in modifiers else []

    def run(w: Warp) -> None:
        low, n = as_wide(a(w)), np.uint64(shift(w))
        if "HI" in modifiers:
            if "SX32" in modifiers:
                whole = np.asarray(signed(a(w))).astype(np.int64).astype(np.uint64)
            else:
                top = as_wide(high(w)) if high else np.uint64(0)
                whole = low | top << np.uint64(32)
            shifted = (whole << n) >> np.uint64(32)
        else:
            shifted = (low << n) & np.uint64(WORD)
        total = (shifted & np.uint64(WORD)) + as_wide(b(w))
        for carry in carries:
            total = total + np.asarray(carry(w)).astype(np.uint64)
        put(w, _single(total & np.uint64(WORD)))
        for out in outs:
            out(w, _single_bool(total >> np.uint64(32) != 0))

    return run


COMPARE: dict[str, Callable[[Any, Any], Any]] = {
    "EQ": lambda a, b: a == b,
    "NE": lambda a, b: a != b,
    "LT": lambda a, b: a < b,
    "LE": lambda a, b: a <= b,
    "GT": lambda a, b: a > b,
    "GE": lambda a, b: a >= b,
}


def join_of(name: str) -> Callable[[Any, Any], Any]:
    joins: dict[str, Callable[[Any, Any], Any]] = {
        "AND": lambda x, y: x & y,
        "OR": lambda x, y: x | y,
        "XOR": lambda x, y: x ^ y,
    }
    return joins[name]


def _not(value: Any) -> Any:
    return not value if isinstance(value, bool) else ~value


def compare_integers(i: Instruction) -> Action:
    """ISETP and UISETP; ``.EX`` compares high words after the low ones."""
    modifiers = i.name.split(".")[1:]
    operands = list(i.operands)
    first, second = write_predicate(operands[0]), write_predicate(operands[1])
    a, b = integer(operands[2]), integer(operands[3])
    asked = [predicate(p) for p in operands[4:]]
    kind, unsigned, extended = modifiers[0], "U32" in modifiers, "EX" in modifiers
    join = join_of(next(m for m in modifiers if m in ("AND", "OR", "XOR")))

    def run(w: Warp) -> None:
        x, y = a(w), b(w)
        if not unsigned:
            x, y = signed(x), signed(y)
        found = COMPARE[kind](x, y)
        if extended:
            low = asked[1](w)
            if kind in ("LT", "LE", "GT", "GE"):
                found = COMPARE[kind[0] + "T"](x, y) | ((x == y) & low)
            else:
                found = found & low if kind == "EQ" else found | low
        if isinstance(found, np.bool_):
            found = bool(found)
        other = asked[0](w) if asked else True
        first(w, join(found, other))
        second(w, join(_not(found), other))

    return run


def _logic(lut: int, values: list[Any], ones: Any) -> Any:
    """The function of three bits that a table gives, on words."""
    result: Any = values[0] & (ones ^ ones)
    for k in range(8):
        if lut >> k & 1:
            term: Any = ones
            for value, bit in zip(values, (k & 4, k & 2, k & 1), strict=True):
                term = term & (value if bit else value ^ ones)
            result = result | term
    return result


def logic_of_words(i: Instruction) -> Action:
    operands = list(i.operands)
    out = write_predicate(operands.pop(0)) if is_predicate(operands[0]) else None
    put = write_register(operands[0])
    a, b, c = (integer(o) for o in operands[1:4])
    lut = int(operands[4], 0)
    asked = predicate(operands[5]) if len(operands) > 5 else None

    def run(w: Warp) -> None:
        values = [a(w), b(w), c(w)]
        if all(isinstance(v, int) for v in values):
            result = _logic(lut, values, WORD)
        else:
            result = _logic(lut, [as_lanes(v) for v in values], np.uint32(WORD))
        put(w, result)
        if out:
            out(w, (result != 0) | (asked(w) if asked else False))

    return run


def logic_of_predicates(i: Instruction) -> Action:
    operands = list(i.operands)
    first, second = write_predicate(operands[0]), write_predicate(operands[1])
    a, b, c = (predicate(o) for o in operands[2:5])
    luts = [int(o, 0) for o in operands[5:]]

    def run(w: Warp) -> None:
        values = [np.asarray(read(w), bool) for read in (a, b, c)]
        uniform = i.op == "UPLOP3"
        for put, lut in zip((first, second), luts, strict=False):
            found = _logic(lut, values, np.True_)
            put(w, bool(found) if uniform else np.broadcast_to(found, (32,)))

    return run


def shift(i: Instruction) -> Action:
    """SHF and USHF: funnel shifts."""
    modifiers = i.name.split(".")[1:]
    written, operands, _ = split(i)
    put = write_register(written[0])
    low, count, high = (integer(o) for o in operands)
    left, upper, is_signed = "L" in modifiers, "HI" in modifiers, "S32" in modifiers
    whole_width = "U64" in modifiers or "S64" in modifiers

    def run(w: Warp) -> None:
        n = np.minimum(as_wide(count(w)), np.uint64(63 if whole_width else 32))
        lo, hi = as_wide(low(w)), as_wide(high(w))
        pair = lo | hi << np.uint64(32)
        if left:
            if upper:
                result = (pair << n) >> np.uint64(32)
            else:
                result = np.where(n > 31, 0, lo << n) if not whole_width else pair << n
        elif upper and not whole_width:
            extended = np.asarray(signed(high(w))).astype(np.int64) if is_signed else hi.astype(
                np.int64)  # fmt: skip
            result = (extended >> n.astype(np.int64)).astype(np.uint64)
        else:
            shifted = (
                pair.astype(np.int64) >> n.astype(np.int64) if "S64" in modifiers else pair >> n
            )
            result = shifted.astype(np.uint64) >> np.uint64(32 if upper else 0)
        put(w, _single(np.asarray(result).astype(np.uint64) & np.uint64(WORD)))

    return run


def permute(i: Instruction) -> Action:
    written, operands, _ = split(i)
    put = write_register(written[0])
    a, selector, b = (integer(o) for o in operands)

    def run(w: Warp) -> None:
        pair = np.broadcast_to(as_wide(a(w)) | as_wide(b(w)) << np.uint64(32), (32,))
        chosen = np.broadcast_to(as_wide(selector(w)), (32,))
        result = np.zeros(32, np.uint64)
        for byte in range(4):
            pick = chosen >> np.uint64(4 * byte) & np.uint64(15)
            value = pair >> (pick & np.uint64(7)) * np.uint64(8) & np.uint64(255)
            sign = (value >> np.uint64(7)) * np.uint64(255)
            value = np.where(pick & np.uint64(8), sign, value)
            result |= value << np.uint64(8 * byte)
        put(w, result.astype(np.uint32))

    return run


def count_bits(i: Instruction) -> Action:
    written, operands, _ = split(i)
    put, read = write_register(written[0]), integer(operands[0])

    def run(w: Warp) -> None:
        value = as_wide(read(w))
        if i.op in ("POPC", "UPOPC"):
            found = np.array([bin(int(v)).count("1") for v in np.atleast_1d(value)])
        elif i.op in ("BREV", "UBREV"):
            found = np.array([int(f"{int(v):032b}"[::-1], 2) for v in np.atleast_1d(value)])
        else:
            found = np.array([int(v).bit_length() - 1 for v in np.atleast_1d(value)])
            if ".SH" in i.name:
                found = 31 - found
        found = found.astype(np.int64).astype(np.uint32)
        put(w, int(found[0]) if np.ndim(value) == 0 else found)

    return run
