"""How calls are timed: in rounds in which each has a turn; and what the machine can do at most."""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, Protocol, TypeVar, runtime_checkable

import torch

from ..ops import lateral
from ..packing import pack_pointwise

Call = Callable[[], Any]

#: Gives the milliseconds of one call.
Clock = Callable[[Call], float]

Name = TypeVar("Name")

#: A turn on a CPU begins with calls that are not timed, and ends after this many seconds.
WARM_SECONDS, TURN_SECONDS = 0.005, 0.05

#: Sides of the square matrices whose fastest product is the peak: one that is quick, and all that
#: some CPU is fastest with.
QUICK_SIDES, CPU_SIDES, GPU_SIDES = (1024,), (1024, 1536, 2048, 3072), (8192,)


@runtime_checkable
class TimesItself(Protocol):
    """A call that knows better what of it is to be measured."""

    def __call__(self) -> Any: ...

    def seconds(self) -> float:
        """The seconds that count of one call."""
        ...


def call_seconds(call: Call) -> float:
    """Seconds of one call, on the host's clock."""
    if isinstance(call, TimesItself):
        return call.seconds()
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


def host_clock(device: torch.device) -> Clock:
    """Times single calls on the host, until their work on ``device`` is done."""

    def timed(call: Call) -> float:
        if device.type == "cpu":
            return 1e3 * call_seconds(call)
        torch.accelerator.synchronize(device)
        start = time.perf_counter()
        call()
        torch.accelerator.synchronize(device)
        return 1e3 * (time.perf_counter() - start)

    return timed


def event_clock(call: Call) -> float:
    """Milliseconds that a call takes on the current CUDA device, by its own events."""
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    call()
    end.record()
    end.synchronize()
    return start.elapsed_time(end)


def _settle() -> None:
    """Waits until no thread of this process works.

    Runtimes let their threads spin for a while after a call, which would slow whoever is next.
    """
    for _ in range(200):
        before = time.process_time()
        time.sleep(0.001)
        if time.process_time() - before < 2e-4:
            return


def turn_clock(call: Call) -> float:
    """Milliseconds of one call on a CPU: the median of the calls of one turn."""
    _settle()
    start = time.perf_counter()
    call()
    while time.perf_counter() - start < WARM_SECONDS:
        call()
    times: list[float] = []
    while not times or sum(times) < TURN_SECONDS:
        times.append(call_seconds(call))
    return 1e3 * statistics.median(times)


def measure(
    calls: Mapping[Name, Call],
    clock: Clock,
    *,
    rounds: int,
    limit: float = math.inf,
    warm_up: int = 1,
    progress: Callable[[int, int], None] | None = None,
) -> dict[Name, list[float]]:
    """Times ``calls`` in rounds in which each has a turn.

    The order changes from round to round, so that whatever slows the machine, or heats it, slows
    all of them.

    Args:
        calls: what is timed, by name.
        clock: what a turn is: :func:`host_clock`, :func:`turn_clock`, :func:`event_clock`.
        rounds: as many, at least one,
        limit: but none is begun after this many seconds once there have been three.
        warm_up: rounds before them that are not counted: weights are packed and caches filled.
        progress: called with the number of finished and of all rounds.

    Returns:
        the milliseconds of each call in every round.
    """
    names = list(calls)
    samples: dict[Name, list[float]] = {name: [] for name in names}
    start = time.perf_counter()
    finished = -warm_up
    while finished < min(rounds, 3) or (finished < rounds and time.perf_counter() - start < limit):
        shift = finished % len(names)
        order = names[shift:] + names[:shift]
        for name in reversed(order) if finished % 2 else order:
            elapsed = clock(calls[name])
            if finished >= 0:
                samples[name].append(elapsed)
        finished += 1
        if progress is not None and finished > 0:
            progress(finished, rounds)
    return samples


def _best(call: Call, device: torch.device) -> float:
    """The fewest milliseconds of a few calls: a roof is not a median."""
    clock, times = (event_clock, 20) if device.type == "cuda" else (host_clock(device), 4)
    return min(clock(call) for _ in range(times))


def matrix_peak(
    device: torch.device, dtype: torch.dtype, sides: Sequence[int] | None = None
) -> float:
    """Operations per second of the fastest square matrix product; a multiply-add is two of them.

    Args:
        sides: of the matrices; :data:`QUICK_SIDES` on a CPU and :data:`GPU_SIDES` else when None.
    """
    best = 0.0
    for side in sides or (QUICK_SIDES if device.type == "cpu" else GPU_SIDES):
        a, b = (torch.randn(side, side, device=device).to(dtype) for _ in range(2))
        out = torch.mm(a, b)
        elapsed = _best(partial(torch.mm, a, b, out=out), device)
        best = max(best, 2e3 * side**3 / elapsed)
        if elapsed > 500:  # emulated arithmetic; larger ones would only take longer
            break
    return best


def product_peak(
    device: torch.device, dtype: torch.dtype, sides: Sequence[int] | None = None
) -> float:
    """:func:`matrix_peak` or, on a CPU, the library's pointwise product where that is faster.

    On AMD's processors PyTorch's products are far from the FMA peak. Reads a map of 288 channels.
    """
    peak = matrix_peak(device, dtype, sides)
    if device.type != "cpu":
        return peak
    pixels, channels = 64, 288
    x = torch.randn(1, channels, pixels, pixels).to(dtype, memory_format=torch.channels_last)
    weight = pack_pointwise(torch.randn(channels, channels, 1, 1)).to(dtype)
    one, zero = torch.ones(channels), torch.zeros(channels)
    with torch.inference_mode():
        elapsed = _best(partial(lateral, x, [weight], [one], [zero]), device)
    return max(peak, 2e3 * pixels**2 * channels**2 / elapsed)


def copy_bandwidth(device: torch.device) -> float:
    """Bytes per second, read and written, of a copy that no cache holds."""
    x = torch.ones(2**26 if device.type == "cpu" else 2**29, device=device, dtype=torch.uint8)
    y = torch.empty_like(x)
    return 2e3 * x.numel() / _best(partial(y.copy_, x), device)
