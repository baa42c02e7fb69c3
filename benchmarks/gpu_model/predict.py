"""Predicted times of launches: traces of a block, the multiprocessor's replay, bandwidth, launches.

The time of a launch is the largest of what its blocks take on the multiprocessors (instructions
and latencies), and its bytes at the bandwidth of the memory that they come from; then the gap to
the next launch.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.gpu_model import sass, timing
from benchmarks.gpu_model.launches import Call, Extent, Launch
from benchmarks.gpu_model.machine import Block, Stopped, Trace
from benchmarks.gpu_model.operands import WORD
from benchmarks.gpu_model.rates import Gpu
from benchmarks.gpu_model.sass import Kernel
from benchmarks.gpu_model.work import Work

#: Where kernels are, by the name of their function.
SOURCES = {
    "node": "fusion_node", "narrow_node": "narrow_node",
    "multiply": "lateral", "multiply_few": "lateral", "expand": "mbconv",
    "gates": "mbconv", "convolve_depthwise": "depthwise", "convolve": "stem",
    "multiply_pixels": "stem", "fuse": "weighted_fusion", "bifpn": "bifpn",
    "fuse_depthwise": "fused_depthwise", "fuse_depthwise_strips": "fused_depthwise",
    "multiply_large": "gemm", "multiply_rows": "gemm",
    "narrow": "gemm",
    "count": "detect", "collect": "detect", "take_best": "detect",
}  # fmt: skip
#: Parts of a kernel, by the source function that its instructions are of: the first that fits.
PHASES = (
    ("activate", "activation"), ("load_weights", "weights"), ("normalise", "factors"),
    ("fuse_patch", "fuse"), ("sample", "fuse"), ("convolve_patch", "depthwise"),
    ("expand_patch", "expand"), ("load_rows", "rows"), ("mma", "product"),
    ("gates", "gates"), ("reduce_part", "gates"), ("store_product", "epilogue"),
    ("load_narrow_weights", "weights"), ("convolve_row", "depthwise"), ("store_row", "epilogue"),
    ("compute_rows", "product"),
)  # fmt: skip


def _keys(places: Any) -> list[Any]:
    """The keys at places of a list, four words for two keys: all different, and anywhere."""
    at = places.astype(np.uint64) // np.uint64(8)
    words = []
    for number in (at, at + np.uint64(1)):
        key = _LEAST_KEY + number * np.uint64(0x9E3779B97F4A7C15) % np.uint64(1 << 35)
        words += [key & np.uint64(WORD), key >> np.uint64(32)]
    return [word.astype(np.uint32) for word in words]


#: The first key of a list.
_LEAST_KEY = np.uint64(1 << 30)
#: What the memory of kernels holds whose way depends on it, by the bytes of a load: no logit is as
#: large as the one from which on detect lists them; its list has 6000 keys, of boxes without area,
#: so that the first 100 are kept.
LOADED: dict[str, dict[int, Any]] = {
    "collect": {4: 0x3F800000}, "take_best": {4: 6000, 8: int(_LEAST_KEY), 16: _keys},
}  # fmt: skip
#: A launch of more blocks than this many for each multiprocessor is many waves.
_MANY_WAVES = 4
_ENDLESS = 1 << 30


class Kernels:
    """The compiled kernels of one architecture, read when they are asked for."""

    def __init__(self, arch: int, folder: Path, wanted: str = "__half") -> None:
        self.arch, self.folder, self.wanted = arch, folder, wanted
        self._read: dict[str, Kernel] = {}

    def __getitem__(self, name: str) -> Kernel:
        if name not in self._read:
            source = sass.SOURCES / f"{SOURCES[name.split('<')[0]]}.cu"
            # a kernel that is no template is the same for all maps
            wanted = self.wanted if "<" in name else name
            self._read.update(sass.read_kernels(source, self.arch, self.folder, wanted))
        return self._read[name]


@dataclass
class Tile:
    """What one tile, or a block that has no loop of tiles, costs.

    Attributes:
        instructions: that all warps issue.
        cycles: of the blocks of a multiprocessor together, each with one tile.
        phases: instructions of the parts of the kernel.
    """

    instructions: int
    cycles: float
    phases: dict[str, int] = field(default_factory=dict)


@dataclass
class Prediction:
    """One launch, and why it takes as long as it does; times in µs."""

    kernel: str
    grid: Extent
    registers: int
    shared_bytes: int
    resident: int  # blocks that fit a multiprocessor
    waves: float  # of blocks
    tiles: int  # of the block that has the most
    first: Tile
    further: Tile | None  # a tile after the first of its block
    loads_in_flight: int
    chain_us: float  # one warp alone along its path
    issue_us: float  # all instructions, one a cycle on each scheduler
    blocks_us: float  # instructions and latencies: the multiprocessor's replay
    bandwidth_us: float
    memory: str
    gap_us: float  # to the next launch
    time_us: float  # with the gap
    bound: str

    @property
    def floor_us(self) -> float:
        """Bytes at the bandwidth, or products at the peak."""
        return self.bandwidth_us


def phase_of(functions: tuple[str, ...]) -> str:
    """The part of a kernel that an instruction belongs to."""
    return next((phase for name, phase in PHASES if name in functions), "other")


def phases(kernel: Kernel, traces: Iterable[Trace]) -> dict[str, int]:
    """Instructions by part of the kernel."""
    counts: Counter[str] = Counter()
    for trace in traces:
        counts.update(phase_of(kernel.code[i].functions) for i in trace.code)
    return dict(counts.most_common())


def count(traces: list[Trace]) -> int:
    """Instructions of all warps."""
    return sum(len(trace.code) for trace in traces)


def _block(kernel: Kernel, launch: Launch, number: int, blocks: int) -> Block:
    """The block of a number, in a grid that is so many blocks wide."""
    grid = (blocks, *launch.grid[1:])
    index = (number, launch.grid[1] // 2, launch.grid[2] // 2)
    block = Block(kernel, launch.params, grid, launch.block, index)
    # of the blocks that share out a tile's channels, the last, which adds what all have found
    block.atomic_result = launch.grid[2] - 1
    if launch.kernel.startswith("count<"):  # of the blocks that count an image, the last
        block.atomic_result = launch.grid[0] - 1
    block.loaded = LOADED.get(launch.kernel.split("<")[0], {})
    return block


def _has_tile(kernel: Kernel, launch: Launch, number: int, least: int) -> bool:
    """Whether the block of a number has anything to do."""
    try:
        traces = _block(kernel, launch, number, _ENDLESS).run(most=least)
    except Stopped:
        return True
    return len(traces[0].code) > least


def count_tiles(kernel: Kernel, launch: Launch, one: int) -> int:
    """Tiles of a launch whose blocks take every grid-th of them.

    `one` is the instructions of a block that has one; a block that has none may bring its weights.
    """
    none = len(_block(kernel, launch, _ENDLESS - 1, _ENDLESS).run()[0].code)
    least = (none + one) // 2
    low, high = 0, max(launch.grid[0], 1)  # low has a tile
    while _has_tile(kernel, launch, high, least):
        low, high = high, 2 * high
    while high - low > 1:
        middle = (low + high) // 2
        if _has_tile(kernel, launch, middle, least):
            low = middle
        else:
            high = middle
    return high


def _takes_turns(kernel: Kernel) -> bool:
    """Whether a kernel asks how wide the grid is: its blocks then take tiles in turns."""
    return any("c[0x0][0xc]" in operand for at in kernel.code for operand in at.operands)


def trace_tile(kernel: Kernel, launch: Launch) -> list[Trace]:
    """Traces of the block in the middle of a launch that takes one tile and no more."""
    return _block(kernel, launch, launch.grid[0] // 2, _ENDLESS).run()


def after_wait(kernel: Kernel, traces: list[Trace]) -> list[Trace]:
    """The part of traces that waits for the launch before: from ``griddepcontrol.wait`` on.

    Traces of a kernel that does not wait are returned as they are.
    """
    cut = []
    for trace in traces:
        begin = next((n for n, i in enumerate(trace.code) if kernel.code[i].op == "ACQBULK"), 0)
        moved = {n - begin: event for n, event in trace.moved.items() if n >= begin}
        cut.append(Trace(trace.code[begin:], trace.taken[begin:], moved))
    return cut


def trace_launch(kernel: Kernel, launch: Launch) -> tuple[list[Trace], list[Trace] | None, int]:
    """Traces of a block with one tile and of one with two, and the most tiles of a block.

    The second is None where a block is traced as a whole.
    """
    grid = launch.grid[0]
    if not _takes_turns(kernel):
        return _block(kernel, launch, grid // 2, grid).run(), None, 1
    one = trace_tile(kernel, launch)
    longest = max(len(trace.code) for trace in one)
    try:
        return _block(kernel, launch, grid // 2, grid).run(most=longest * 5 // 2), None, 1
    except Stopped:
        pass
    tiles = count_tiles(kernel, launch, len(one[0].code))
    half = -(-tiles // 2)
    two = _block(kernel, launch, max(0, tiles // 4), half).run()
    return one, two, -(-tiles // grid)


def predict(kernels: Kernels, launch: Launch, work: Work, gpu: Gpu,
            overlaps: bool = False) -> Prediction:  # fmt: skip
    """What a launch takes on a GPU.

    Args:
        kernels: compiled.
        launch: with ``pdl`` it may begin before the one before it has ended.
        work: the least it must do.
        gpu: the GPU.
        overlaps: such a launch finds room for its blocks beside those of the launch before, so
            that what comes before its wait takes no time.
    """
    kernel = kernels[launch.kernel]
    one, two, tiles = trace_launch(kernel, launch)
    blocks = launch.grid[0] * launch.grid[1] * launch.grid[2]
    threads = launch.block[0] * launch.block[1] * launch.block[2]
    fit = timing.resident_blocks(kernel, threads, launch.shared_bytes, gpu)
    together = min(fit, -(-blocks // gpu.multiprocessors))
    memory = "dram" if work.bytes > gpu.l2_mb * 1e6 / 2 else "l2"
    first = Tile(count(one), timing.simulate(kernel, [one] * together, gpu, memory),
                 phases(kernel, one))  # fmt: skip
    further = None
    waves = blocks / (gpu.multiprocessors * fit)
    cycles = first.cycles * (math.ceil(waves) if waves <= _MANY_WAVES else waves + 0.5)
    instructions = first.instructions * blocks
    if two is not None:
        more = count(two) - first.instructions
        both = timing.simulate(kernel, [two] * together, gpu, memory)
        further = Tile(more, max(0.0, both - first.cycles))
        cycles = first.cycles + (tiles - 1) * further.cycles
        instructions = (first.instructions + (tiles - 1) * more) * blocks
    overlaps = overlaps and launch.pdl
    if overlaps:
        cycles -= first.cycles - timing.simulate(
            kernel, [after_wait(kernel, one)] * together, gpu, memory)  # fmt: skip
    us = 1e3 * gpu.clock_ghz
    chain = max(timing.replay(kernel, trace, gpu, memory)[-1] for trace in one[:1])
    bandwidth = work.bytes / (1e3 * (gpu.dram_gb_s if memory == "dram" else gpu.l2_gb_s))
    bandwidth = max(bandwidth, work.operations / (1e6 * gpu.tflops))
    blocks_us = cycles / us
    issue = instructions / (gpu.multiprocessors * timing.SCHEDULERS) / us
    busiest = max(blocks_us, bandwidth)
    gap = gpu.pdl_us if overlaps else gpu.launch_us
    return Prediction(
        launch.kernel, launch.grid, kernel.registers, launch.shared_bytes, fit, waves, tiles,
        first, further, max(timing.loads_in_flight(kernel, trace) for trace in one),
        chain / us, issue, blocks_us, bandwidth, memory,
        gap, busiest + gap,
        _bound(blocks_us, bandwidth, issue, blocks, gpu),
    )  # fmt: skip


def _bound(blocks_us: float, bandwidth: float, issue: float, blocks: int, gpu: Gpu) -> str:
    """What the time of a launch is."""
    if bandwidth >= blocks_us:
        return "bandwidth"
    if issue > 0.6 * blocks_us:
        return "instructions"
    return "latency, few blocks" if blocks < gpu.multiprocessors else "latency"


class Predictor:
    """Predicts calls; launches that differ only in addresses are traced once."""

    def __init__(self, gpu: Gpu, folder: Path, wanted: str = "__half") -> None:
        self.gpu = gpu
        self.kernels = Kernels(gpu.capability, folder, wanted)
        self._known: dict[tuple[object, ...], Prediction] = {}

    def launch(self, launch: Launch, work: Work, before: Launch | None = None
               ) -> Prediction | None:  # fmt: skip
        """One launch, which follows another of its call; None for a memset."""
        if not launch.kernel:
            return None
        kernel = self.kernels[launch.kernel]
        fit = self.gpu.multiprocessors * timing.resident_blocks(
            kernel, math.prod(launch.block), launch.shared_bytes, self.gpu)  # fmt: skip
        overlaps = bool(
            launch.pdl and before and math.prod(before.grid) + math.prod(launch.grid) <= fit
        )
        key = (launch.kernel, launch.grid, launch.shared_bytes, launch.pointers, work, overlaps)
        if key not in self._known:
            self._known[key] = predict(self.kernels, launch, work, self.gpu, overlaps)
        return self._known[key]

    def call(self, call: Call) -> list[Prediction | None]:
        """All launches of a call."""
        before = [None, *call.launches]
        return [self.launch(launch, work, other) for launch, work, other in
                zip(call.launches, call.works, before, strict=False)]  # fmt: skip

    def time_us(self, call: Call) -> float:
        """A call's launches one after the other; a memset costs a gap."""
        return sum(p.time_us if p else self.gpu.launch_us for p in self.call(call))
