"""Instructions that move data, and what they move: sectors of global, turns of shared memory.

Global memory reads as zero or as the block says, and keeps nothing; shared memory is real.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Callable
from typing import Any

import numpy as np

from benchmarks.gpu_model.machine import Action, Warp
from benchmarks.gpu_model.operands import (
    WORD,
    as_wide,
    integer,
    is_predicate,
    next_register,
    predicate,
    wide,
    write_predicate,
    write_register,
)
from benchmarks.gpu_model.sass import Instruction

_SIZES = {"64": 8, "128": 16, "U8": 1, "S8": 1, "U16": 2, "S16": 2, "8": 1, "16": 2}


def _size(name: str) -> int:
    for part in name.split(".")[1:]:
        if part in _SIZES:
            return _SIZES[part]
    return 4


def _scaled(base: Callable[[Warp], Any], factor: int) -> Callable[[Warp], Any]:
    return lambda w: as_wide(base(w)) * np.uint64(factor)


def _address(text: str) -> tuple[Callable[[Warp], Any], Callable[[Warp], Any] | None, int]:
    """Register, uniform register and offset of ``[R1.64+UR2+0x10]``."""
    inner = text[text.rindex("[") + 1 : text.rindex("]")]
    register: Callable[[Warp], Any] = lambda w: 0  # noqa: E731
    uniform: Callable[[Warp], Any] | None = None
    offset = 0
    for part in inner.split("+"):
        if part.startswith(("0x", "-0x")):
            offset += int(part, 16)
        elif part.startswith("UR"):
            uniform = wide(part.split(".")[0]) if ".64" in inner else integer(part)
        elif part.startswith("R"):
            scaled = re.search(r"\.X(\d+)", part)
            name = part.split(".")[0]
            base = wide(name) if ".64" in part else integer(name)
            register = _scaled(base, int(scaled[1])) if scaled else base
    return register, uniform, offset


def _places(w: Warp, parts: tuple[Any, Any, int], width: int) -> Any:
    register, uniform, offset = parts
    at = as_wide(register(w)).astype(np.int64)
    if uniform:
        at = at + as_wide(uniform(w)).astype(np.int64)
    at = np.broadcast_to(at + offset, (32,))
    return at & WORD if width == 32 else at


def _sectors(at: Any, size: int) -> tuple[int, ...]:
    """Different sectors of 32 bytes that the lanes touch."""
    if not len(at):
        return ()
    first = int(at[0]) // 32 * 32
    return tuple(first // 32 + s for s in _sectors_from((at - first).tobytes(), size))


@functools.lru_cache(1 << 16)
def _sectors_from(places: bytes, size: int) -> tuple[int, ...]:
    """Sectors of int64 places; a loop's accesses are alike, each further on in memory."""
    at = np.frombuffer(places, np.int64)
    return tuple(sorted({*(at // 32).tolist(), *((at + size - 1) // 32).tolist()}))


def _turns(at: Any, size: int) -> int:
    """Turns of the shared memory's 32 banks: lanes of a word are served together."""
    if not len(at):
        return 1
    return _turns_from((at - int(at[0]) // 128 * 128).tobytes(), size)


@functools.lru_cache(1 << 16)
def _turns_from(places: bytes, size: int) -> int:
    at = np.frombuffer(places, np.int64)
    lanes_at_once = 32 * 4 // max(size, 4)
    turns = 0
    for first in range(0, len(at), lanes_at_once):
        part = at[first : first + lanes_at_once]
        words = np.unique(np.concatenate([part // 4 + k for k in range(max(1, size // 4))]))
        turns += int(np.bincount(words % 32).max())
    return turns


def _load_global(i: Instruction) -> Action:
    out = write_predicate(i.operands[0]) if is_predicate(i.operands[0]) else None
    operands = i.operands[1:] if out else i.operands
    size = _size(i.name)
    puts = [write_register(next_register(operands[0], k)) for k in range(max(1, size // 4))]
    parts = _address(operands[1])

    def run(w: Warp) -> None:
        at = _places(w, parts, 64)[w.mask]
        w.record(sectors=_sectors(at, size), size=size)
        found = w.block.loaded.get(size, 0)
        if callable(found):
            words = found(_places(w, parts, 64))
            for put, word in zip(puts, words, strict=True):
                put(w, word)
        else:
            for k, put in enumerate(puts):
                put(w, found >> 32 * k & WORD)
        if out:
            out(w, True)

    return run


def _store_global(i: Instruction) -> Action:
    size, parts = _size(i.name), _address(i.operands[0])
    return lambda w: w.record(sectors=_sectors(_places(w, parts, 64)[w.mask], size), size=size)


def _atomic_global(i: Instruction) -> Action:
    registers = [o for o in i.operands if re.fullmatch(r"R(\d+|Z)", o)]
    put = write_register(registers[0]) if i.op != "RED" and registers else None

    def run(w: Warp) -> None:
        w.record(sectors=(-1,))
        if put:
            put(w, w.block.atomic_result)

    return run


def _load_shared(i: Instruction) -> Action:
    size, parts = _size(i.name), _address(i.operands[1])
    puts = [write_register(next_register(i.operands[0], k)) for k in range(max(1, size // 4))]

    def run(w: Warp) -> None:
        at = _places(w, parts, 32)
        w.record(turns=_turns(at[w.mask], size))
        at = np.where(w.mask, at, 0)
        if size >= 4:  # aligned
            words, first = w.block.shared_words, at >> 2
            for k, put in enumerate(puts):
                put(w, words[first + k])
            return
        for k, put in enumerate(puts):
            word = np.zeros(32, np.uint32)
            for byte in range(min(size, 4)):
                word |= w.block.shared[at + 4 * k + byte].astype(np.uint32) << np.uint32(8 * byte)
            if "S8" in i.name:
                word = word.astype(np.int8).astype(np.uint32)
            put(w, word)

    return run


def _store_shared(i: Instruction) -> Action:
    size, parts = _size(i.name), _address(i.operands[0])
    reads = [integer(next_register(i.operands[1], k)) for k in range(max(1, size // 4))]

    def run(w: Warp) -> None:
        at = _places(w, parts, 32)[w.mask]
        w.record(turns=_turns(at, size))
        if size >= 4:
            words, first = w.block.shared_words, at >> 2
            for k, read in enumerate(reads):
                value = read(w)
                words[first + k] = value if isinstance(value, int) else value[w.mask]
            return
        for k, read in enumerate(reads):
            word = np.broadcast_to(np.asarray(read(w), np.uint32), (32,))[w.mask]
            for byte in range(min(size, 4)):
                w.block.shared[at + 4 * k + byte] = word >> np.uint32(8 * byte) & np.uint32(255)

    return run


def _atomic_shared(i: Instruction) -> Action:
    registers = [o for o in i.operands if re.fullmatch(r"R(\d+|Z)", o)]
    put = write_register(registers[0])

    # a sum that nobody reads is added once for all lanes of a word
    together, size = ".POPC" in i.name, _size(i.name)
    known = together or (".ADD" in i.name and size == 4)
    parts = _address(next(o for o in i.operands if "[" in o))
    added = None if together or not known else integer(i.operands[-1])

    def run(w: Warp) -> None:
        if not known:
            raise RuntimeError(f"{w.block.kernel.name} {i.address:#x}: {i.name} is not followed")
        places = _places(w, parts, 32)
        w.record(turns=_turns(places[w.mask], size) if together else int(w.mask.sum()))
        words, first = w.block.shared_words, places >> 2
        sums = np.broadcast_to(np.asarray(added(w) if added else 1, np.uint32), (32,))
        found = np.zeros(32, np.uint32)
        for lane in np.flatnonzero(w.mask):
            found[lane] = words[first[lane]]
            words[first[lane]] += sums[lane]
        put(w, found)

    return run


def _load_matrices(i: Instruction) -> Action:
    count = 4 if i.name.endswith(".4") else 2 if i.name.endswith(".2") else 1
    puts = [write_register(next_register(i.operands[0], k)) for k in range(count)]
    parts = _address(i.operands[1])

    def run(w: Warp) -> None:
        at = _places(w, parts, 32)[: 8 * count]
        w.record(turns=sum(_turns(at[8 * k : 8 * k + 8], 16) for k in range(count)))
        for put in puts:
            put(w, 0)

    return run


def _copy_async(i: Instruction) -> Action:
    size, to, source = _size(i.name), _address(i.operands[0]), _address(i.operands[1])
    asked = predicate(i.operands[2]) if len(i.operands) > 2 else None

    def run(w: Warp) -> None:
        real = np.broadcast_to(asked(w) if asked else True, (32,)) & w.mask
        place = _places(w, to, 32)
        w.record(sectors=_sectors(_places(w, source, 64)[real], size),
                 turns=_turns(place[w.mask], size))  # fmt: skip
        for byte in range(size):
            w.block.shared[place[w.mask] + byte] = 0

    return run


def no_product(i: Instruction) -> Action:
    """A product on tensor cores, which is zero."""
    puts = [write_register(next_register(i.operands[0], k)) for k in range(4)]

    def run(w: Warp) -> None:
        for put in puts:
            put(w, 0)

    return run


TABLE: dict[str, Callable[[Instruction], Action]] = {
    **dict.fromkeys(("LDG", "LD"), _load_global),
    **dict.fromkeys(("STG", "ST"), _store_global),
    **dict.fromkeys(("ATOMG", "ATOM", "RED"), _atomic_global),
    "LDS": _load_shared,
    "STS": _store_shared,
    "ATOMS": _atomic_shared,
    "LDSM": _load_matrices,
    "LDGSTS": _copy_async,
}
