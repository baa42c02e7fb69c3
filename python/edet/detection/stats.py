"""What a predictor has done and what it takes: counts, latency percentiles, memory."""

from __future__ import annotations

import resource
import threading
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch

from ..fused import cuda_graph

#: What is timed; pre-processing includes reading a file.
STAGES = ("pre-processing", "network", "post-processing", "total")

#: Batches whose times are kept for the percentiles.
MAX_TIMES = 1000


class Latency(NamedTuple):
    """Percentiles of milliseconds."""

    p50: float
    p90: float
    p99: float


@dataclass(frozen=True)
class Stats:
    """What a :class:`edet.Predictor` has done and what it takes.

    Attributes:
        images, batches: that were predicted.
        plans: shapes that are planned at present.
        latency: of a batch, for each of :data:`STAGES`, over the last 1000 batches that ran
            planned; empty before the first.
        memory_mib, peak_memory_mib: of the process; on a GPU, what PyTorch has allocated there.
    """

    images: int
    batches: int
    plans: int
    latency: dict[str, Latency]
    memory_mib: float
    peak_memory_mib: float

    def __str__(self) -> str:
        lines = [
            f"{self.images} images in {self.batches} batches, {self.plans} shapes planned, "
            f"{self.memory_mib:.0f} MiB (peak {self.peak_memory_mib:.0f} MiB)"
        ]
        if self.latency:
            lines.append(f"{'ms per batch':<16}{'p50':>9}{'p90':>9}{'p99':>9}")
        lines += [
            f"{stage:<16}" + "".join(f"{value:9.2f}" for value in latency)
            for stage, latency in self.latency.items()
        ]
        return "\n".join(lines)


class Recorder:
    """Counts images and batches and keeps the last times; several threads may share it."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._times: deque[Sequence[float]] = deque(maxlen=MAX_TIMES)
        self._images = self._batches = 0

    def add(self, images: int, seconds: Sequence[float]) -> None:
        """One batch, and the seconds of each of :data:`STAGES`; none for one that ran unplanned."""
        with self._lock:
            if seconds:
                self._times.append(seconds)
            self._images += images
            self._batches += 1

    def stats(self, plans: int, device: torch.device) -> Stats:
        """What there is so far, with ``plans`` shapes planned on ``device``."""
        with self._lock:
            milliseconds = 1e3 * np.array(self._times).reshape(-1, len(STAGES))
        latency = {}
        if len(milliseconds):
            rows = np.percentile(milliseconds, (50, 90, 99), axis=0).T.tolist()
            latency = {s: Latency(*row) for s, row in zip(STAGES, rows, strict=True)}
        memory, peak = memory_bytes(device)
        return Stats(
            self._images, self._batches, plans, latency, memory / 2**20, max(peak, memory) / 2**20
        )


def memory_bytes(device: torch.device) -> tuple[int, int]:
    """Memory in use and its peak: of the process, or what PyTorch has allocated on a GPU."""
    if cuda_graph.captures(device):
        return (
            cuda_graph.cuda.memory_allocated(device),
            cuda_graph.cuda.max_memory_allocated(device),
        )
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    peak = 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return pages * resource.getpagesize(), peak
