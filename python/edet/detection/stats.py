"""What a predictor has done and what it takes: counts, latency percentiles, memory."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

#: What is timed; pre-processing includes reading a file.
STAGES = ("pre-processing", "network", "post-processing", "total")


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
