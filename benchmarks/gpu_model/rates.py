"""Latencies and rates of GPUs, from rates.json, where each has its source."""

from __future__ import annotations

import functools
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.gpu_model import launches

_FILE = Path(__file__).with_name("rates.json")


@functools.cache
def table() -> dict[str, Any]:
    """The file's content."""
    return json.loads(_FILE.read_text(encoding="utf-8"))


@dataclass(frozen=True)
class Gpu:
    """A GPU: sizes in what their names say, bandwidths in GB/s."""

    name: str
    capability: int
    multiprocessors: int
    clock_ghz: float
    dram_gb_s: float
    l2_gb_s: float
    l2_mb: float
    tflops: float
    shared_kb: float
    block_shared_kb: float
    registers: int
    warps: int
    blocks: int
    launch_us: float
    pdl_us: float

    @property
    def device(self) -> launches.Device:
        """As launchers see it."""
        return launches.Device(
            self.capability, self.multiprocessors, int(self.block_shared_kb * 1024)
        )


def gpu(name: str) -> Gpu:
    """One of the devices of the file: H100 or A100."""
    return Gpu(name, **{key: value for key, (value, _) in table()["devices"][name].items()})


def latency(op: str, memory: str) -> int:
    """Cycles until the result of an instruction is there; ``memory`` is l2 or dram."""
    rows = table()["latency"]
    if op in ("LDG", "LD", "LDGSTS"):
        op = memory
    return int(rows[op if op in rows else "other"][0])


def interval(op: str, capability: int) -> float:
    """Cycles between two warps' instructions on one scheduler, or on the multiprocessor's port."""
    rows = table()["interval"]
    return float(rows[op if op in rows else "other"][0]["90" if capability >= 90 else "80"])
