"""Runs one block of a kernel's machine code on the host, to learn what its warps issue.

Integers, predicates, branches, shared memory and barriers are computed as the GPU does; global
memory reads as zero, or as what it is said to hold, and takes no writes, and products on tensor
cores are zero: no branch of the kernels' tile loops depends on the numbers of a map. A division
takes the fast path of its code.
Threads that diverge meet again at BSYNC, as on a GPU.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from benchmarks.gpu_model.operands import Read, integer, predicate
from benchmarks.gpu_model.sass import Instruction, Kernel

#: Where constant bank 0 has the first parameter.
PARAMETERS = {75: 0x160, 80: 0x160, 86: 0x160, 89: 0x160, 90: 0x210}
SHARED_WINDOW = 256 * 1024
MOST_STEPS = 3_000_000

Action = Callable[["Warp"], None]


class Stopped(RuntimeError):
    """A warp issued more instructions than it was allowed."""


@dataclass
class Event:
    """What a memory instruction of a warp moved.

    Attributes:
        sectors: the 32-byte sectors of global memory.
        turns: of the shared memory.
        bytes: of global memory that its threads ask for.
    """

    sectors: tuple[int, ...] = ()
    turns: int = 1
    bytes: int = 0


@dataclass
class Trace:
    """What a warp issued: indices into the kernel's code, with what each memory access moved."""

    code: list[int] = field(default_factory=list)
    taken: list[bool] = field(default_factory=list)
    moved: dict[int, Event] = field(default_factory=dict)  # by position in the trace


@dataclass
class Group:
    """Lanes that run together."""

    at: int  # index of the next instruction
    mask: Any
    waits: str = ""  # for what: "B0" …, "warp", "block"


class Block:
    """A block: shared memory, constant banks, warps."""

    def __init__(self, kernel: Kernel, params: bytes, grid: tuple[int, int, int],
                 block: tuple[int, int, int], index: tuple[int, int, int]) -> None:  # fmt: skip
        self.kernel = kernel
        self.index = index
        self.size = block
        self.most = MOST_STEPS
        self.atomic_result = 0  # what an atomic of global memory finds
        # what loads of so many bytes find, if not zero: always the same, or words by their places
        self.loaded: dict[int, int | Callable[[Any], list[Any]]] = {}
        bank = bytearray(PARAMETERS[kernel.arch] + len(params) + 64)
        for i, extent in enumerate((*block, *grid)):
            bank[4 * i : 4 * i + 4] = extent.to_bytes(4, "little")
        bank[PARAMETERS[kernel.arch] : PARAMETERS[kernel.arch] + len(params)] = params
        self.banks = {0: bytes(bank), 2: kernel.jump_table, 4: bytes(1024)}
        self._constants: dict[tuple[int, int, int], int] = {}
        self.shared = np.zeros(SHARED_WINDOW, np.uint8)
        self.shared_words = self.shared.view(np.uint32)
        threads = block[0] * block[1] * block[2]
        self.warps = [Warp(self, first) for first in range(0, threads, 32)]
        if not kernel.actions:
            kernel.actions = [None] * len(kernel.code)
        self.actions: list[Action | None] = kernel.actions

    def constant(self, bank: int, offset: int, size: int) -> int:
        """A number of a constant bank."""
        key = (bank, offset, size)
        if key not in self._constants:
            part = self.banks[bank][offset : offset + size]
            if len(part) < size:
                raise RuntimeError(f"{self.kernel.name} reads c[{bank:#x}][{offset:#x}]")
            self._constants[key] = int.from_bytes(part, "little")
        return self._constants[key]

    def action(self, i: int) -> Action:
        """What instruction i does."""
        found = self.actions[i]
        if found is None:
            from benchmarks.gpu_model.semantics import action_of

            found = self.actions[i] = action_of(self.kernel.code[i])
        return found

    def run(self, most: int = MOST_STEPS) -> list[Trace]:
        """Runs all warps to their end; what each issued.

        Raises:
            Stopped: a warp issued more than ``most`` instructions.
        """
        self.most = most
        with np.errstate(all="ignore"):
            while any(warp.groups for warp in self.warps):
                moved = [warp.run() for warp in self.warps]
                waiting = [w for w in self.warps if w.groups]
                if waiting and all(w.at_barrier() for w in waiting):
                    for warp in waiting:
                        warp.leave_barrier()
                elif not any(moved):
                    raise RuntimeError(f"{self.kernel.name}: warps wait for each other")
        return [warp.trace for warp in self.warps]


class Warp:
    """32 lanes: registers, predicates and what they issued."""

    def __init__(self, block: Block, first: int) -> None:
        self.block = block
        self.registers = np.zeros((256, 32), np.uint32)
        self.predicates = np.zeros((8, 32), bool)
        self.uniform = [0] * 64
        self.uniform_predicates = [False] * 8
        self.threads = np.arange(first, first + 32, dtype=np.uint32)
        size = block.size
        live = self.threads < size[0] * size[1] * size[2]
        self.groups = [Group(0, live)]
        self.barriers: dict[str, Any] = {}
        self.trace = Trace()
        self.mask = live  # of the instruction that runs
        self.all = bool(live.all())
        self.next = 0
        self._group = self.groups[0]
        self._apart = False  # whether the group that runs was cut, or ended

    # ---- for the meaning of instructions ----

    def record(self, sectors: tuple[int, ...] = (), turns: int = 1, size: int = 0) -> None:
        """Notes what the instruction that runs moves."""
        self.trace.moved[len(self.trace.code) - 1] = Event(
            sectors, turns, size * int(self.mask.sum())
        )

    def branch(self, target: int, taken: Any) -> None:
        """Lanes of the mask for which `taken` holds go on at an instruction's index."""
        going = self.mask & taken
        if not going.any():
            return
        self.trace.taken[-1] = True
        group = self._group
        staying = group.mask & ~going
        if not staying.any():
            self.next = target
            return
        group.mask = going
        self.groups.append(Group(self.next, staying))
        self.next = target
        self._apart = True

    def exit(self) -> None:
        """Ends the lanes of the mask."""
        group = self._group
        group.mask = group.mask & ~self.mask
        for name in self.barriers:
            self.barriers[name] = self.barriers[name] & ~self.mask
        if not group.mask.any():
            self.groups.remove(group)
            self._apart = True

    def wait(self, what: str) -> None:
        """The group waits for the others: of a convergence barrier, of the warp or of the block."""
        self._group.waits = what

    # ---- running ----

    def at_barrier(self) -> bool:
        """Whether all lanes wait for the block."""
        return all(group.waits == "block" for group in self.groups)

    def leave_barrier(self) -> None:
        for group in self.groups:
            group.waits = ""
        self._merge()

    def _merge(self) -> None:
        """Makes one group of those that are at one place."""
        by_place: dict[tuple[int, str], Group] = {}
        for group in self.groups:
            same = by_place.setdefault((group.at, group.waits), group)
            if same is not group:
                same.mask = same.mask | group.mask
        self.groups = list(by_place.values())

    def _release(self) -> bool:
        """Lets go on who has met; whether anybody has."""
        released = False
        live = np.logical_or.reduce([group.mask for group in self.groups])
        for name in {group.waits for group in self.groups} - {"", "block"}:
            waiting = [group for group in self.groups if group.waits == name]
            here = np.logical_or.reduce([group.mask for group in waiting])
            wanted = live if name == "warp" else self.barriers[name] & live
            if not (wanted & ~here).any():
                for group in waiting:
                    group.waits = ""
                released = True
        if released:
            self._merge()
        return released

    def run(self) -> bool:
        """Runs until all lanes wait for the block or have ended; whether anything ran."""
        ran = False
        code, trace, block = self.block.kernel.code, self.trace, self.block
        while self.groups:
            ready = [group for group in self.groups if not group.waits]
            if not ready:
                if self._release():
                    continue
                return ran
            group = self._group = min(ready, key=lambda g: g.at)
            ran = True
            # until it branches apart, waits or ends
            while not group.waits:
                i = group.at
                trace.code.append(i)
                trace.taken.append(False)
                self.next = i + 1
                action = block.actions[i]
                if action is None:
                    action = block.action(i)
                self.mask = group.mask
                self.all = bool(group.mask.all())
                action(self)
                group.at = self.next
                if len(trace.code) > block.most:
                    raise Stopped(f"{block.kernel.name}: no end at {code[i].address:#x}")
                if self._apart:
                    self._apart = False
                    break
        return ran


def guarded(instruction: Instruction, action: Action) -> Action:
    """An action under the instruction's own predicate."""
    if not instruction.guard:
        return action
    guard: Read = predicate(instruction.guard)

    def run(w: Warp) -> None:
        allowed = guard(w)
        mask = w.mask & allowed
        if not mask.any():
            return
        w.mask = mask
        w.all = bool(mask.all())
        action(w)

    return run


__all__ = ["Block", "Event", "Trace", "Warp", "guarded", "integer"]
