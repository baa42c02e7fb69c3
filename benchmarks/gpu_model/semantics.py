"""What each instruction of the kernels' machine code does to a warp.

Written from what the instructions are seen to compute in the kernels' own code, whose source is
known; one that is missing here is an error that names it.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import numpy as np

from benchmarks.gpu_model import integers, memory, reals
from benchmarks.gpu_model.integers import as_lanes, split
from benchmarks.gpu_model.machine import Action, Warp, guarded
from benchmarks.gpu_model.operands import (
    WORD,
    constant,
    integer,
    is_predicate,
    is_register,
    next_register,
    predicate,
    signed,
    write_predicate,
    write_register,
)
from benchmarks.gpu_model.sass import Instruction

# ---- where to go on ----


def _move(i: Instruction) -> Action:
    written, operands, _ = split(i)
    put, read = write_register(written[0]), integer(operands[0])
    return lambda w: put(w, read(w))


def _clear_pair(i: Instruction) -> Action:
    put, high = write_register(i.operands[0]), write_register(next_register(i.operands[0]))

    def run(w: Warp) -> None:
        put(w, 0)
        if ".32" not in i.name:
            high(w, 0)

    return run


def _special(i: Instruction) -> Action:
    """S2R and S2UR: indices of thread and block."""
    put, name = write_register(i.operands[0]), i.operands[1]

    def run(w: Warp) -> None:
        size = w.block.size
        if name.startswith("SR_TID."):
            x = w.threads % size[0]
            y = w.threads // size[0] % size[1]
            z = w.threads // (size[0] * size[1])
            put(w, {"X": x, "Y": y, "Z": z}[name[-1]].astype(np.uint32))
        elif name.startswith("SR_CTAID."):
            put(w, w.block.index["XYZ".index(name[-1])])
        elif name == "SR_LANEID":
            put(w, np.arange(32, dtype=np.uint32))
        elif name == "SR_LTMASK":
            put(w, ((1 << np.arange(32, dtype=np.uint64)) - 1).astype(np.uint32))
        else:
            put(w, 0)  # the block's place in its cluster, windows of address spaces

    return run


def _load_constant(i: Instruction) -> Action:
    match = re.search(r"\.(64|128|U8|S8|U16|S16)", i.name)
    size = {"64": 8, "128": 16, "U8": 1, "S8": 1, "U16": 2, "S16": 2}[match[1]] if match else 4
    puts = [write_register(next_register(i.operands[0], k)) for k in range(max(1, size // 4))]
    reads = [constant(_advance(i.operands[1], 4 * k), min(size, 4)) for k in range(len(puts))]

    def run(w: Warp) -> None:
        values = [read(w) for read in reads]  # before the address itself is overwritten
        for put, value in zip(puts, values, strict=True):
            put(w, value)

    return run


def _advance(text: str, bytes_: int) -> str:
    """The constant so many bytes behind one."""
    if not bytes_:
        return text
    inner = text[text.index("][") + 2 : -1] if "][" in text else text.split("[")[-1].rstrip("]")
    bank = text[: text.rindex("[")]
    parts = inner.split("+") if "+" in inner else [inner]
    if parts[-1].startswith(("0x", "-0x")):
        parts[-1] = hex(int(parts[-1], 16) + bytes_)
    else:
        parts.append(hex(bytes_))
    return f"{bank}[{'+'.join(parts)}]"


def _vote(i: Instruction) -> Action:
    written, _, asked = split(i)
    register = next((o for o in i.operands if is_register(o)), None)
    put = write_register(register) if register else None
    outs = [write_predicate(p) for p in written if is_predicate(p)]
    ask = predicate(asked[-1]) if asked else predicate("PT")

    def run(w: Warp) -> None:
        votes = np.broadcast_to(np.asarray(ask(w), bool), (32,)) & w.mask
        mask = int((votes.astype(np.uint64) << np.arange(32, dtype=np.uint64)).sum())
        if put:
            put(w, mask)
        found = bool((votes == w.mask).all()) if ".ALL" in i.name else bool(votes.any())
        for out in outs:
            out(w, found)

    return run


def _shuffle(i: Instruction) -> Action:
    out, put = write_predicate(i.operands[0]), write_register(i.operands[1])
    read, lane, clamp = (integer(o) for o in i.operands[2:5])
    mode = i.name.split(".")[1]

    def run(w: Warp) -> None:
        here = np.arange(32, dtype=np.int64)
        by = np.asarray(lane(w)).astype(np.int64)
        limit = np.asarray(clamp(w)).astype(np.int64)
        segment = limit >> 8 & 31
        first = here & segment
        last = first | (limit & 31 & ~segment)
        to = {"IDX": first | (by & ~segment), "BFLY": here ^ by, "DOWN": here + by,
              "UP": here - by}[mode]  # fmt: skip
        inside = to >= last if mode == "UP" else to <= last
        out(w, np.broadcast_to(inside, (32,)))
        value = np.broadcast_to(as_lanes(read(w)), (32,))
        put(w, np.where(inside, value[np.clip(to, 0, 31)], value))

    return run


def _predicates_as_word(i: Instruction) -> Action:
    put, base, mask = write_register(i.operands[0]), integer(i.operands[2]), int(i.operands[3], 0)

    def run(w: Warp) -> None:
        word = np.zeros(32, np.uint32)
        for k in range(7):
            word |= w.predicates[k].astype(np.uint32) << np.uint32(k)
        put(w, (as_lanes(base(w)) & np.uint32(~mask & WORD)) | (word & np.uint32(mask)))

    return run


def _word_as_predicates(i: Instruction) -> Action:
    read, mask = integer(i.operands[1]), int(i.operands[2], 0)
    outs = {k: write_predicate(f"P{k}") for k in range(7) if mask >> k & 1}

    def run(w: Warp) -> None:
        word = np.broadcast_to(np.asarray(as_lanes(read(w))), (32,))
        for k, out in outs.items():
            out(w, (word >> np.uint32(k) & np.uint32(1)).astype(bool))

    return run


def _branch(i: Instruction) -> Action:
    conditions = [predicate(o) for o in i.operands if is_predicate(o)]
    label = next(o for o in i.operands if "(" in o).strip("`()")
    diverged = ".DIV" in i.name  # taken by a warp whose lanes are not together

    def run(w: Warp) -> None:
        kernel = w.block.kernel
        taken: Any = np.full(32, not (diverged and w.mask.all()))
        for condition in conditions:
            taken = taken & condition(w)
        w.branch(kernel.index[kernel.labels[label]], taken)

    return run


def _branch_indirect(i: Instruction) -> Action:
    target = integer(i.operands[0].split()[0])

    def run(w: Warp) -> None:
        kernel = w.block.kernel
        offset = int(i.operands[0].split()[1], 16) + i.address + 16
        for place in np.unique(target(w)[w.mask]):
            where = target(w) == place
            w.branch(kernel.index[(int(place) + offset) & WORD], where)
            if len(np.unique(target(w)[w.mask])) > 1:
                raise RuntimeError(f"{kernel.name} {i.address:#x}: an indirect branch diverges")

    return run


def _set_barrier(i: Instruction) -> Action:
    def run(w: Warp) -> None:
        w.barriers[i.operands[0]] = w.mask.copy()

    return run


def _leave_barrier(i: Instruction) -> Action:
    def run(w: Warp) -> None:
        w.barriers[i.operands[0]] = w.barriers[i.operands[0]] & ~w.mask

    return run


def _call(i: Instruction) -> Action:
    """A jump out of a loop, which the compiler writes so before sm_90; or the slow path of a
    division, which none takes here: execution goes on after it."""
    if any("(.L_" in operand for operand in i.operands):
        return _branch(i)
    return lambda w: None


def _unknown_return(i: Instruction) -> Action:
    def run(w: Warp) -> None:
        raise RuntimeError(f"{w.block.kernel.name} {i.address:#x}: {i.name} is not followed")

    return run


def _nothing(i: Instruction) -> Action:
    return lambda w: None


_TABLE: dict[str, Callable[[Instruction], Action]] = {
    **dict.fromkeys(("IADD3", "VIADD", "UIADD3", "UVIADD"), integers.add),
    **dict.fromkeys(("IMAD", "UIMAD"), integers.multiply),
    **dict.fromkeys(("LEA", "ULEA"), integers.shift_and_add),
    **dict.fromkeys(("ISETP", "UISETP"), integers.compare_integers),
    "FSETP": reals.compare_reals,
    **dict.fromkeys(("LOP3", "ULOP3"), integers.logic_of_words),
    **dict.fromkeys(("PLOP3", "UPLOP3"), integers.logic_of_predicates),
    **dict.fromkeys(("SHF", "USHF"), integers.shift),
    **dict.fromkeys(("SEL", "FSEL", "USEL"), reals.select),
    **dict.fromkeys(("VIMNMX", "VIADDMNMX", "IMNMX", "FMNMX"), reals.extreme),
    **dict.fromkeys(("PRMT", "UPRMT"), integers.permute),
    **dict.fromkeys(("FADD", "FMUL", "FFMA"), reals.real_arithmetic),
    "MUFU": reals.function,
    **dict.fromkeys(("I2F", "I2FP", "F2I"), reals.convert),
    "F2FP": reals.pack_halves,
    **dict.fromkeys(("HFMA2", "HMUL2", "HSETP2", "HMNMX2", "VHMNMX", "HSET2"), reals.halves),
    **dict.fromkeys(("MOV", "UMOV", "R2UR"), _move),
    "CS2R": _clear_pair,
    **dict.fromkeys(("S2R", "S2UR"), _special),
    **dict.fromkeys(("LDC", "ULDC"), _load_constant),
    **dict.fromkeys(("POPC", "UPOPC", "BREV", "UBREV", "FLO", "UFLO"), integers.count_bits),
    **dict.fromkeys(("VOTE", "VOTEU"), _vote),
    "SHFL": _shuffle,
    "P2R": _predicates_as_word,
    "R2P": _word_as_predicates,
    "BRA": _branch,
    "BRX": _branch_indirect,
    "BSSY": _set_barrier,
    "BREAK": _leave_barrier,
    "BSYNC": lambda i: lambda w: w.wait(i.operands[0]),
    "WARPSYNC": lambda i: lambda w: w.wait("warp"),
    "BAR": lambda i: lambda w: w.wait("block"),
    "EXIT": lambda i: lambda w: w.exit(),
    "CALL": _call,
    "RET": _unknown_return,
    "FCHK": lambda i: lambda w: write_predicate(i.operands[0])(w, False),
    "HMMA": memory.no_product,
    **dict.fromkeys(
        ("NOP", "YIELD", "PREEXIT", "ACQBULK", "ERRBAR", "CGAERRBAR", "CCTL", "MEMBAR", "DEPBAR",
         "LDGDEPBAR", "WARPSYNC.ALL", "ENDCOLLECTIVE", "FENCE", "NANOSLEEP"),
        _nothing,
    ),
    **memory.TABLE,
}  # fmt: skip


def action_of(instruction: Instruction) -> Action:
    """What an instruction does, under its predicate."""
    if instruction.op == "IABS":
        put, read = write_register(instruction.operands[0]), integer(instruction.operands[1])
        return guarded(
            instruction, lambda w: put(w, np.abs(signed(as_lanes(read(w)))).view(np.uint32))
        )
    if instruction.op == "HADD2":
        make = reals.real_arithmetic if ".F32" in instruction.name else reals.halves
        return guarded(instruction, make(instruction))
    if instruction.op not in _TABLE:
        raise RuntimeError(f"{instruction.name} {', '.join(instruction.operands)} is not known")
    return guarded(instruction, _TABLE[instruction.op](instruction))
