"""How calls are timed on a GPU: as they are, as CUDA graphs, and compiled within a limit."""

from __future__ import annotations

import contextlib
import math
import signal
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from types import FrameType
from typing import Any

import torch

from edet.bench import report
from edet.bench.result import OURS
from edet_kernels.testing import timing

#: Where the arguments are and the backend of ours.
DEVICE = "cuda"
#: Bytes of inputs that rotate when the second-level cache is to be cold: more than any GPU has.
COLD_BYTES = 512 * 2**20
#: Samples of a figure at least, and of one whose calls take long.
SAMPLES, FEW_SAMPLES = 20, 5

Function = Callable[[], Any]


@dataclass(frozen=True)
class Effort:
    """What a row may take.

    Attributes:
        seconds: of each figure.
        compile_seconds: of each compilation.
        launches: whether the launches of ours are profiled.
    """

    seconds: float
    compile_seconds: float = math.inf
    launches: bool = True


class Graph:
    """A call as a CUDA graph; a replay's result is where the captured one was."""

    def __init__(self, call: Function) -> None:
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(3):
                call()
        stream.synchronize()
        self._graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self._graph):
            self._result = call()

    def __call__(self) -> Any:
        """Replays the call."""
        self._graph.replay()
        return self._result


def measure(
    calls: Sequence[Function], seconds: float, clock: timing.Clock = timing.event_clock
) -> dict[str, Any]:
    """Times ``calls`` in turn; several when the cache is to be cold.

    Args:
        calls: what is timed.
        seconds: of all samples; of which there are at least :data:`SAMPLES`, or
            :data:`FEW_SAMPLES` where so many would take ten times as long.
        clock: device events, unless the host's work counts too.

    Returns:
        median and quartiles of a call in ms, and how many samples they are of.
    """

    def turn() -> None:
        for call in calls:
            call()

    turn()
    torch.cuda.synchronize()
    once = max(1e-3 * clock(turn), 1e-9)
    least = SAMPLES if SAMPLES * once < 10 * seconds else FEW_SAMPLES
    rounds = min(1000, max(least, math.ceil(seconds / once)))
    times = timing.measure({OURS: turn}, clock, rounds=rounds)[OURS]
    found = report.summary([ms / len(calls) for ms in times])
    return {name: round(found[name], 6) for name in ("median_ms", "q1_ms", "q3_ms")} | {
        "samples": len(times)
    }


def ceilings(dtype: torch.dtype) -> dict[str, float]:
    """Measured bytes per second of a large copy and operations per second of a large product."""
    return {
        "bytes_per_second": timing.copy_bandwidth(torch.device(DEVICE)),
        "operations_per_second": timing.matrix_peak(torch.device(DEVICE), dtype),
    }


def first_line(error: BaseException) -> str:
    """An exception in one line."""
    return str(error).strip().splitlines()[0] if str(error).strip() else repr(error)


@contextlib.contextmanager
def within(seconds: float) -> Iterator[None]:
    """Ends what is inside, a compiler for example, after so many seconds of the main thread.

    Raises:
        TimeoutError: it took longer. It is raised again every few seconds, as compilers catch
            errors of their candidates.
    """

    def late(number: int, frame: FrameType | None) -> None:
        raise TimeoutError(f"takes longer than {seconds:.0f} s")

    if math.isinf(seconds):
        yield
        return
    before = signal.signal(signal.SIGALRM, late)
    signal.setitimer(signal.ITIMER_REAL, max(seconds, 1e-3), 3)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def usable() -> bool:
    """Whether the GPU still answers: after an illegal access it does not."""
    try:
        torch.cuda.synchronize()
        torch.cuda.empty_cache()
    except RuntimeError:
        return False
    return True
