"""What a call launches on a GPU and how long each launch takes, as torch's profiler sees it."""

from __future__ import annotations

import json
import re
import statistics
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from benchmarks.gpu_model.sass import plain_name
from benchmarks.gpu_timing import first_line

#: Kinds of events of a trace that take time on the device.
KINDS = ("kernel", "gpu_memset", "gpu_memcpy")
#: What is profiled.
ACTIVITY = torch.profiler.ProfilerActivity.CUDA
#: Calls that are profiled.
REPEATS = 8

Event = dict[str, Any]


def short_name(name: str) -> str:
    """A kernel as the gauge names it; of a kernel of others the name without its parameters."""
    if name.startswith(("Memset", "Memcpy")):
        return name.split()[0].lower()
    if "edet::" in name:
        return plain_name(name)
    return re.split(r"[<(]", name.removeprefix("void "), maxsplit=1)[0]


def summarise(events: Sequence[Event], repeats: int) -> list[dict[str, Any]]:
    """The launches of one call, those that are alike together.

    Args:
        events: ``traceEvents`` of a trace of ``repeats`` calls that did the same.
        repeats: calls.

    Returns:
        a row for each kernel, grid and dynamic shared memory, in the order in which they first
        come: how many launches there are, and their µs. ``us`` is from a launch's begin to its end,
        which holds its wait for the launch before where it may begin early; ``step_us`` is from the
        end of the launch before, or, of the first, from its own begin. Both are sums of medians.

    Raises:
        ValueError: the calls did not launch the same, or nothing.
    """
    found = sorted((e for e in events if e.get("cat") in KINDS), key=lambda e: e["ts"])
    count = len(found) // repeats
    if not found or count * repeats != len(found):
        raise ValueError(f"{repeats} calls must launch the same, got {len(found)} launches")
    calls = [found[i : i + count] for i in range(0, len(found), count)]
    rows: dict[tuple[Any, ...], dict[str, Any]] = {}
    for i, same in enumerate(zip(*calls, strict=True)):
        names = {short_name(e["name"]) for e in same}
        if len(names) > 1:
            raise ValueError(f"{repeats} calls must launch the same, got {sorted(names)}")
        [name] = names
        grid, shared = (same[0].get("args", {}).get(k) for k in ("grid", "shared memory"))
        steps = [
            e["dur"] if i == 0 else e["ts"] + e["dur"] - (c[i - 1]["ts"] + c[i - 1]["dur"])
            for e, c in zip(same, calls, strict=True)
        ]
        row = rows.setdefault(
            (name, tuple(grid or ()), shared),
            {"kernel": name, "grid": list(grid or []), "shared_bytes": shared or 0,
             "launches": 0, "us": 0.0, "step_us": 0.0},
        )  # fmt: skip
        row["launches"] += 1
        row["us"] = round(row["us"] + statistics.median(e["dur"] for e in same), 3)
        row["step_us"] = round(row["step_us"] + statistics.median(steps), 3)
    return list(rows.values())


def launches(call: Callable[[], Any]) -> list[dict[str, Any]]:
    """The launches of one call of ``call``: see :func:`summarise`."""
    call()
    torch.cuda.synchronize()
    with torch.profiler.profile(activities=[ACTIVITY], acc_events=True) as profiler:
        for _ in range(REPEATS):
            call()
        torch.cuda.synchronize()
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "trace.json"
        profiler.export_chrome_trace(str(path))
        events = json.loads(path.read_text(encoding="utf-8"))["traceEvents"]
    return summarise(events, REPEATS)


def of_variants(calls: dict[str, Callable[[], Any]]) -> dict[str, Any]:
    """What a result's row says of the launches of ours.

    Args:
        calls: as a CUDA graph, ``graph``, and as it is, ``call``, where there are such. The graph
            is preferred: its launches follow each other without waiting for the host.

    Returns:
        ``launches``, and ``launched_as``, which is one of the names; or ``unseen``, why there are
        none: a profiler that fails costs no row its times.
    """
    unseen: dict[str, Any] = {}
    for name in ("graph", "call"):
        if name in calls:
            try:
                return {"launches": launches(calls[name]), "launched_as": name}
            except Exception as error:  # it does not see into graphs, or there is none
                unseen = {"unseen": first_line(error)}
    return unseen
