"""How long traces take: one warp alone, and the warps of a multiprocessor together.

A warp issues in order. Before an instruction it waits for the scoreboards that the compiler names,
after it as long as the compiler says; each of four schedulers issues one instruction a cycle, and
each kind of instruction takes its pipe for a while. A sector that a block has loaded before comes
from the first-level cache, which forgets none. Not modelled: the instruction cache, conflicts of
register banks.
"""

from __future__ import annotations

import heapq
from collections import Counter
from dataclasses import dataclass

from benchmarks.gpu_model.machine import Event, Trace
from benchmarks.gpu_model.rates import Gpu, interval, latency, table
from benchmarks.gpu_model.sass import Instruction, Kernel

SCHEDULERS = 4
GLOBAL_LOADS = ("LDG", "LD", "LDGSTS")
GLOBAL = (*GLOBAL_LOADS, "STG", "ST", "RED", "ATOMG", "ATOM")
SHARED = ("LDS", "STS", "LDSM", "ATOMS", "LDGSTS")
_PIPES = {
    "FFMA": "fma", "FADD": "fma", "FMUL": "fma", "IMAD": "fma int", "HADD2": "half",
    "HFMA2": "half", "HMUL2": "half", "MUFU": "special", "I2F": "special", "F2I": "special",
    "HMMA": "tensor", "F2FP": "int",
}  # fmt: skip
_FREE = {"NOP", "BSSY", "BSYNC", "WARPSYNC", "EXIT", "BAR", "YIELD", "DEPBAR", "LDGDEPBAR"}


@dataclass(frozen=True)
class Decoded:
    """What the replay needs of an instruction."""

    op: str
    stall: int
    sets: int
    read_sets: int
    waits: tuple[int, ...]
    latency: int
    pipe: str
    interval: float
    is_global: bool
    is_cached: bool  # a load that goes through the first-level cache
    is_shared: bool
    is_barrier: bool
    awaits_copies: bool


def decode(kernel: Kernel, gpu: Gpu, memory: str) -> list[Decoded]:
    """A kernel's instructions for :func:`simulate` and :func:`replay`."""
    return [_decode(at, gpu, memory) for at in kernel.code]


def _decode(at: Instruction, gpu: Gpu, memory: str) -> Decoded:
    op = at.op
    pipe = _PIPES.get(op, "" if op in _FREE or op in GLOBAL + SHARED else "int")
    return Decoded(
        op,
        max(1, at.stall),
        at.sets,
        at.read_sets,
        tuple(b for b in range(6) if at.waits >> b & 1),
        latency(op, memory),
        pipe,
        interval(op, gpu.capability) if pipe else 0.0,
        op in GLOBAL,
        op in ("LDG", "LD") and ".STRONG" not in at.name,
        op in SHARED,
        op == "BAR",
        op == "DEPBAR" and at.name == "DEPBAR.LE",
    )


class _State:
    """Where a warp is in its trace, and when it can go on."""

    __slots__ = ("block", "boards", "copies", "position", "ready", "scheduler", "trace")

    def __init__(self, trace: Trace, scheduler: int, block: int) -> None:
        self.trace, self.scheduler, self.block = trace, scheduler, block
        self.position, self.ready = 0, 0.0
        self.boards = [0.0] * 8
        self.copies = 0.0  # when the last asynchronous copy is there


_NO_EVENT = Event()


def replay(kernel: Kernel, trace: Trace, gpu: Gpu, memory: str = "l2") -> list[float]:
    """When each instruction of a warp that runs alone is issued, and, last, when it ends."""
    code = decode(kernel, gpu, memory)
    state, times = _State(trace, 0, 0), list[float]()
    seen: set[int] = set()
    rows = table()["latency"]
    branch, read = rows["branch"][0], rows["read"][0]
    for position, i in enumerate(trace.code):
        at = code[i]
        time = max([state.ready, *(state.boards[b] for b in at.waits)])
        if at.awaits_copies:
            time = max(time, state.copies)
        times.append(time)
        done = time + at.latency
        if at.is_cached:
            sectors = trace.moved.get(position, _NO_EVENT).sectors
            if seen.issuperset(sectors):
                done = time + rows["l1"][0]
            seen.update(sectors)
        _issue(state, at, time, done, branch * trace.taken[position], read)
    times.append(max(state.ready, *state.boards[:6]))
    return times


def _issue(state: _State, at: Decoded, time: float, done: float, branch: int, read: int) -> None:
    """Notes what an instruction issued at `time` sets, whose result is there at `done`."""
    boards = state.boards
    if at.sets < 6 and done > boards[at.sets]:
        boards[at.sets] = done
    if at.read_sets < 6 and time + read > boards[at.read_sets]:
        boards[at.read_sets] = time + read
    if at.op == "LDGSTS":
        state.copies = max(state.copies, done)
    state.ready = time + at.stall + branch


# Long: one clock, whose state its steps share.
def simulate(kernel: Kernel, blocks: list[list[Trace]], gpu: Gpu, memory: str = "l2") -> float:
    """Cycles until the blocks that begin together on one multiprocessor have ended.

    Args:
        kernel: whose traces they are.
        blocks: for each block what each warp issues.
        gpu: the GPU.
        memory: where loads come from, ``l2`` or ``dram``.
    """
    code = decode(kernel, gpu, memory)
    rows = table()["latency"]
    branch, read, meet = rows["branch"][0], rows["read"][0], rows["barrier"][0]
    near = rows["l1"][0]
    port = interval("memory", gpu.capability)
    per_sector = interval("sector", gpu.capability)
    states = [
        _State(trace, number % SCHEDULERS, b)
        for b, traces in enumerate(blocks)
        for number, trace in enumerate(traces)
    ]
    free = [0.0] * SCHEDULERS
    pipes: dict[tuple[int, str], float] = {}
    memory_free = shared_free = end = 0.0
    l1: list[dict[int, float]] = [{} for _ in blocks]  # when a sector is in the first-level cache
    waiting: list[list[_State]] = [[] for _ in blocks]
    left = [sum(1 for s in states if s.block == b and s.trace.code) for b in range(len(blocks))]
    queue = [(0.0, n) for n, s in enumerate(states) if s.trace.code]
    heapq.heapify(queue)
    numbers = {id(s): n for n, s in enumerate(states)}

    def release(block: int) -> None:
        """Lets a block go on whose warps have all met."""
        if waiting[block] and len(waiting[block]) == left[block]:
            time = max(s.ready for s in waiting[block]) + meet
            for s in waiting[block]:
                s.ready = time
                heapq.heappush(queue, (_next(s, code), numbers[id(s)]))
            waiting[block] = []

    while queue:
        ready, n = heapq.heappop(queue)
        s = states[n]
        at = code[s.trace.code[s.position]]
        time = max(ready, free[s.scheduler])
        if at.pipe:
            time = max(time, pipes.get((s.scheduler, at.pipe), 0.0))
        if at.is_shared or at.is_global:
            time = max(time, shared_free)
        if time > ready:
            heapq.heappush(queue, (time, n))
            continue
        event = s.trace.moved.get(s.position, _NO_EVENT)
        done = time + at.latency
        free[s.scheduler] = time + 1
        if at.pipe:
            pipes[s.scheduler, at.pipe] = time + at.interval
        if at.is_shared:
            shared_free = time + max(port, event.turns)
            done += event.turns - 1
        elif at.is_global:
            shared_free = time + port
        if at.is_global:
            cached = at.is_cached and l1[s.block]
            if cached is not False and all(sector in cached for sector in event.sectors):
                done = max([time + near, *(cached[sector] for sector in event.sectors)])
            else:
                memory_free = max(memory_free, time) + len(event.sectors) * per_sector
                done = max(done, memory_free + at.latency)
                if cached is not False:
                    for sector in event.sectors:
                        cached.setdefault(sector, done)
        taken = s.trace.taken[s.position]
        _issue(s, at, time, done, branch if taken else 0, read)
        s.position += 1
        if s.position == len(s.trace.code):
            end = max(end, s.ready, *s.boards[:6])
            left[s.block] -= 1
            release(s.block)
        elif at.is_barrier:
            waiting[s.block].append(s)
            release(s.block)
        else:
            heapq.heappush(queue, (_next(s, code), n))
    return end


def _next(s: _State, code: list[Decoded]) -> float:
    """When a warp's next instruction may be issued as far as the warp itself is concerned."""
    at = code[s.trace.code[s.position]]
    time = s.ready
    for b in at.waits:
        if s.boards[b] > time:
            time = s.boards[b]
    return max(time, s.copies) if at.awaits_copies else time


def loads_in_flight(kernel: Kernel, trace: Trace, function: str = "") -> int:
    """The most 16-byte loads of global memory that a thread has sent before it waits for one.

    Args:
        kernel, trace: of one warp.
        function: only loads of this source function.
    """
    out: Counter[int] = Counter()
    most = 0
    for i in trace.code:
        at = kernel.code[i]
        for board in range(6):
            if at.waits >> board & 1:
                out[board] = 0
        if at.op == "DEPBAR":
            out[6] = 0
        if (
            at.op in GLOBAL_LOADS
            and ".128" in at.name
            and (not function or function in at.functions)
        ):
            out[6 if at.op == "LDGSTS" else at.sets] += 1
            most = max(most, sum(out.values()))
    return most


def resident_blocks(kernel: Kernel, threads: int, shared_bytes: int, gpu: Gpu) -> int:
    """Blocks that fit a multiprocessor: by registers, shared memory and warps."""
    warps = -(-threads // 32)
    per_warp = -(-kernel.registers * 32 // 256) * 256
    by_registers = int(gpu.registers // per_warp // 4 * 4 // warps)
    by_shared = int(gpu.shared_kb * 1024 // (shared_bytes + 1024))
    return max(1, min(by_registers, by_shared, gpu.warps // warps, gpu.blocks))
