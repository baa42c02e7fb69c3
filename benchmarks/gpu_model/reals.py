"""What the instructions on floating-point numbers, selections and conversions do to a warp."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from benchmarks.gpu_model.integers import COMPARE, as_lanes, join_of, split
from benchmarks.gpu_model.machine import Action, Warp
from benchmarks.gpu_model.operands import (
    WORD,
    Read,
    as_wide,
    integer,
    is_predicate,
    next_register,
    predicate,
    real,
    wide,
    write_predicate,
    write_register,
)
from benchmarks.gpu_model.sass import Instruction


def compare_reals(i: Instruction) -> Action:
    modifiers = [m for m in i.name.split(".")[1:] if m != "FTZ"]
    operands = list(i.operands)
    first, second = write_predicate(operands[0]), write_predicate(operands[1])
    a, b, asked = real(operands[2]), real(operands[3]), predicate(operands[4])
    kind, join = modifiers[0], join_of(modifiers[1])

    def run(w: Warp) -> None:
        x, y = a(w), b(w)
        nan = np.isnan(x) | np.isnan(y)
        if kind in ("NAN", "NUM"):
            found = nan if kind == "NAN" else ~nan
        else:
            found = COMPARE[kind[:2]](x, y)
            found = found | nan if kind.endswith("U") else found & ~nan
        found = np.broadcast_to(found, (32,))
        first(w, join(found, asked(w)))
        second(w, join(~found, asked(w)))

    return run


def select(i: Instruction) -> Action:
    written, operands, asked = split(i)
    put = write_register(written[0])
    if i.op == "FSEL":
        x, y, choose = real(operands[0]), real(operands[1]), predicate(asked[0])
        return lambda w: put(
            w, np.broadcast_to(np.where(choose(w), x(w), y(w)), (32,)).astype(np.float32).view(
                np.uint32)
        )  # fmt: skip
    a, b, choose = integer(operands[0]), integer(operands[1]), predicate(asked[0])

    def run(w: Warp) -> None:
        chosen = choose(w)
        if isinstance(chosen, bool):
            put(w, a(w) if chosen else b(w))
        else:
            put(w, np.where(chosen, as_lanes(a(w)), as_lanes(b(w))))

    return run


def extreme(i: Instruction) -> Action:
    """VIMNMX, VIADDMNMX, IMNMX and FMNMX: the smaller where the predicate holds."""
    written, operands, asked = split(i)
    put, smaller = write_register(written[0]), predicate(asked[0])
    if i.op == "FMNMX":
        x, y = real(operands[0]), real(operands[1])
        return lambda w: put(
            w,
            np.broadcast_to(
                np.where(smaller(w), np.minimum(x(w), y(w)), np.maximum(x(w), y(w))), (32,)
            ).astype(np.float32).view(np.uint32),
        )  # fmt: skip
    reads = [integer(o) for o in operands]
    unsigned = "U32" in i.name

    def run(w: Warp) -> None:
        first = as_lanes(reads[0](w))
        if i.op == "VIADDMNMX":
            first = first + as_lanes(reads[1](w))
        last = as_lanes(reads[-1](w))
        if not unsigned:
            first, last = first.view(np.int32), last.view(np.int32)
        result = np.where(smaller(w), np.minimum(first, last), np.maximum(first, last))
        put(w, result.astype(np.uint32) if unsigned else result.view(np.uint32))

    return run


def real_arithmetic(i: Instruction) -> Action:
    written, operands, _ = split(i)
    put, reads = write_register(written[0]), [real(o) for o in operands]
    saturate = ".SAT" in i.name

    def run(w: Warp) -> None:
        values = [read(w) for read in reads]
        if i.op in ("FADD", "HADD2"):
            result = values[0] + values[1]
        elif i.op == "FMUL":
            result = values[0] * values[1]
        else:
            result = values[0] * values[1] + values[2]
        if saturate:
            result = np.clip(np.nan_to_num(result), 0, 1)
        put(w, np.broadcast_to(np.asarray(result, np.float32), (32,)).view(np.uint32))

    return run


_FUNCTIONS: dict[str, Callable[[Any], Any]] = {
    "RCP": lambda x: np.float32(1) / x,
    "EX2": np.exp2,
    "LG2": np.log2,
    "RSQ": lambda x: np.float32(1) / np.sqrt(x),
    "SQRT": np.sqrt,
    "TANH": np.tanh,
    "SIN": np.sin,
    "COS": np.cos,
}


def function(i: Instruction) -> Action:
    written, operands, _ = split(i)
    put, read = write_register(written[0]), real(operands[0])
    function = _FUNCTIONS[i.name.split(".")[1]]
    return lambda w: put(
        w, np.broadcast_to(np.asarray(function(read(w)), np.float32), (32,)).view(np.uint32)
    )


def convert(i: Instruction) -> Action:
    """I2F, I2FP, F2I and their kin; conversions round down or up where division asks for it."""
    written, operands, _ = split(i)
    name = i.name
    put, put_high = write_register(written[0]), write_register(next_register(written[0]))
    if i.op in ("I2F", "I2FP", "UI2F"):
        big = "64" in name
        is_signed = "S64" in name or ("U32" not in name and "U64" not in name)
        read: Read = wide(operands[0]) if big else integer(operands[0])

        def to_real(w: Warp) -> None:
            value = as_wide(read(w))
            number = value.astype(np.int64) if big else value.astype(np.uint32).view(np.int32)
            exact = (number if is_signed else value).astype(np.float64)
            result = exact.astype(np.float32)
            if ".RP" in name:
                low = result.astype(np.float64) < exact
                result = np.where(low, np.nextafter(result, np.float32(np.inf)), result)
            put(w, np.broadcast_to(result.astype(np.float32), (32,)).view(np.uint32))

        return to_real
    source = real(operands[0])

    def to_integer(w: Warp) -> None:
        value = np.broadcast_to(np.nan_to_num(source(w), posinf=2.0**63), (32,)).astype(np.float64)
        value = np.trunc(value) if "TRUNC" in name else np.floor(value) if "FLOOR" in name else (
            np.rint(value))  # fmt: skip
        if "U32" in name:
            put(w, np.clip(value, 0, WORD).astype(np.uint64).astype(np.uint32))
        elif "64" in name:
            whole = np.clip(value, 0, 2.0**63).astype(np.uint64)
            put(w, (whole & np.uint64(WORD)).astype(np.uint32))
            put_high(w, (whole >> np.uint64(32)).astype(np.uint32))
        else:
            put(w, np.clip(value, -(2.0**31), 2.0**31 - 1).astype(np.int32).view(np.uint32))

    return to_integer


def pack_halves(i: Instruction) -> Action:
    written, operands, _ = split(i)
    put, high, low = write_register(written[0]), real(operands[0]), real(operands[1])
    brain = "BF16" in i.name

    def bits(value: Any) -> Any:
        value = np.broadcast_to(np.asarray(value, np.float32), (32,))
        if brain:
            words = value.view(np.uint32)
            return (words + np.uint32(0x7FFF) + (words >> 16 & np.uint32(1))) >> 16
        return value.astype(np.float16).view(np.uint16).astype(np.uint32)

    return lambda w: put(w, bits(high(w)) << np.uint32(16) | bits(low(w)))


def halves(i: Instruction) -> Action:
    """Arithmetic on two halves: no branch depends on it, so that zero will do.

    But ``HFMA2.MMA R1, -RZ, RZ, 0, 5.96e-08`` is how the compiler loads a constant: two halves.
    """
    if i.op == "HFMA2" and i.operands[1] == "-RZ" and i.operands[2] == "RZ":
        high, low = (np.float16(text).view(np.uint16) for text in i.operands[3:5])
        word, put_word = int(high) << 16 | int(low), write_register(i.operands[0])
        return lambda w: put_word(w, word)
    written, _, _ = split(i)
    put = write_predicate(written[0]) if is_predicate(written[0]) else write_register(written[0])
    return lambda w: put(w, False if is_predicate(written[0]) else 0)
