"""The table of one benchmark: its rows, and what it is printed, drawn and written as."""

from __future__ import annotations

import datetime
import os
import platform
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from ..extras import require
from ..files import replacing
from .result import NO_RIVALS, OURS, SCHEMA, compare, summary, write

#: The rows of the table. Pre- and post-processing run around the network, which is ``whole``.
PARTS = ("BiFPN", "heads", "backbone", "whole", "pre-processing", "post-processing")

#: Further rows, each compared with another way of ours: all nodes of the BiFPN in one call with a
#: call for each; image to detections with what of it is spent inside operators.
PAIRS = {"BiFPN nodes": "node by node", "predictor": "its kernels"}


@dataclass(frozen=True)
class Row:
    """One part of the model.

    Attributes:
        part: one of :data:`PARTS` or :data:`PAIRS`.
        milliseconds: for each variant the time of every round.
        difference: largest difference of ours from the float64 reference, as a fraction of the
            reference's largest value.
        eager_difference: the same of eager.
        macs, parameters: of the whole batch's convolutions, and of the part.
        bytes: what a call must at least read and write: its inputs, weights and outputs.
    """

    part: str
    milliseconds: dict[str, list[float]]
    difference: float
    eager_difference: float
    macs: int = 0
    parameters: int = 0
    bytes: int = 0

    def median(self, variant: str) -> float | None:
        """Median time in milliseconds; None for a variant that does not apply to this part."""
        times = self.milliseconds.get(variant)
        return statistics.median(times) if times else None


@dataclass(frozen=True)
class Bench:
    """A table and what is needed to read it: the conditions under which it was measured."""

    model: str
    image_size: tuple[int, int]
    batch_size: int
    dtype: str
    device: str
    threads: int
    rounds: int
    machine: str
    python: str
    torch: str
    edet_kernels: str
    backends: dict[str, str]
    variants: list[str]
    rows: list[Row]
    peak_gflops: float = 0.0
    bandwidth_gbs: float = 0.0

    def result(self) -> dict[str, Any]:
        """This table as a result of :mod:`edet.bench.report`."""
        return result([self])

    def __str__(self) -> str:
        return format_table(self)


def result(tables: Sequence[Bench]) -> dict[str, Any]:
    """Tables of one machine as one result of :mod:`edet.bench.report`."""
    first = tables[0]
    rows = []
    for table in tables:
        for row in table.rows:
            times = {name: summary(samples) for name, samples in row.milliseconds.items()}
            errors = {v: row.eager_difference for v in times} | {OURS: row.difference}
            for name in times:
                times[name]["error"] = errors[name]
            best, ratios = compare(times)
            peak = table.peak_gflops
            rows.append(
                {
                    "model": table.model,
                    "image_size": list(table.image_size),
                    "batch_size": table.batch_size,
                    "dtype": table.dtype,
                    "device": table.device,
                    "stage": "network" if row.part == "whole" else row.part,
                    "macs": row.macs,
                    "parameters": row.parameters,
                    "bytes": row.bytes,
                    "rounds": table.rounds,
                    "times": times,
                    "unavailable": {},
                    "best_rival": best,
                    "ratios": ratios,
                    "peak_fraction": {
                        name: 2e-6 * row.macs / t["median_ms"] / peak
                        for name, t in times.items()
                        if row.macs and peak
                    },
                }
            )
    return {
        "schema": SCHEMA,
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "revision": None,
        "machine": {"cpu": first.machine, "system": platform.platform()},
        "versions": {
            "python": first.python,
            "torch": first.torch,
            "edet_kernels": first.edet_kernels,
        },
        "threads": first.threads,
        "settings": {
            "backends": first.backends,
            "peak": "fastest of torch.mm and the pointwise product",
            "bandwidth_gbs": max(table.bandwidth_gbs for table in tables),
        },
        "peak_gflops": {t.dtype: max(u.peak_gflops for u in tables if u.dtype == t.dtype)
                        for t in tables if t.peak_gflops},
        "rows": rows,
        "scaling": [],
        "memory": [],
        "fusion": [],
    }  # fmt: skip


def format_table(bench: Bench) -> str:
    """``bench`` as plain text for a terminal of 80 columns."""
    baselines = bench.variants[:-1]
    header = ["part", *bench.variants, *(f"vs {v.split()[1]}" for v in baselines), "difference"]
    lines = [header]
    for row in (row for row in bench.rows if row.part in PARTS):
        ours = row.median("ours")
        medians = [row.median(v) for v in bench.variants]
        assert ours is not None
        lines.append(
            [
                row.part.removesuffix("ing"),  # 80 columns
                *("same" if m is None else f"{m:.2f}" for m in medians),
                *("" if m is None else f"{m / ours:.1f}x" for m in medians[:-1]),
                f"{row.difference:.0e}",
            ]
        )
    widths = [max(len(line[i]) for line in lines) for i in range(len(header))]
    table = "\n".join(
        "  ".join(
            cell.ljust(w) if i == 0 else cell.rjust(w)
            for i, (cell, w) in enumerate(zip(line, widths, strict=True))
        ).rstrip()
        for line in lines
    )
    height, width = bench.image_size
    pairs = []
    for row in (row for row in bench.rows if row.part in PAIRS):
        mine, other = row.median("ours"), row.median(PAIRS[row.part])
        assert mine is not None
        against = ""
        if other is not None:
            share = f"{other / mine:.0%} of it" if row.part in NO_RIVALS else f"{other / mine:.2f}x"
            against = f"; {PAIRS[row.part]} {other:.2f} ({share})"
        pairs.append(f"{row.part}: {mine:.2f}{against}")
    return (
        f"{bench.model}, {height}x{width}, batch {bench.batch_size}, {bench.dtype}, "
        f"{bench.device}, {bench.threads} threads\n{bench.machine}; torch {bench.torch}\n\n"
        f"{table}\n\n" + "\n".join(pairs) + "\n\n"
        f"Times are medians of {bench.rounds} rounds in ms. eager: the model's PyTorch layers,\n"
        "eval mode, no gradients, channels_last. difference: of ours from a float64\n"
        "reference, as a fraction of its largest value."
    )


def write_json(bench: Bench, path: str | os.PathLike[str]) -> None:
    """Writes the table as a result file of :mod:`edet.bench.report`.

    Raises:
        OSError: the folder does not exist or cannot be written; nothing is left behind.
    """
    write(bench.result(), path)


def plot_table(bench: Bench, path: str | os.PathLike[str]) -> None:
    """Draws the table as bars, one group per part, to ``path`` (PNG, SVG or PDF).

    Raises:
        ImportError: matplotlib (extra ``plot``) is not installed.
        OSError: the folder does not exist or cannot be written; nothing is left behind.
    """
    figure = require("matplotlib.figure", "plot").Figure(figsize=(9, 4.5), layout="constrained")
    axes = figure.add_subplot()
    colours = ("#b8b8b8", "#7d7d7d", "#d1495b")[-len(bench.variants) :]
    thickness = 0.8 / len(bench.variants)
    rows = [row for row in bench.rows if row.macs]
    for k, (variant, fill) in enumerate(zip(bench.variants, colours, strict=True)):
        for i, row in enumerate(rows):
            value = row.median(variant)
            if value is None:
                continue
            # a part without this variant has its other bars centred
            shift = k - (len(bench.variants) - 1) / 2 - (len(row.milliseconds) < 3) / 2
            y = i + thickness * shift
            axes.barh(y, value, thickness * 0.92, color=fill, label=variant if i == 0 else None)
            baseline = row.median(bench.variants[-2])
            note = f" {value:.1f}"
            if variant == "ours" and baseline is not None:
                note += f"  ({baseline / value:.1f}x)"
            axes.text(value, y, note, va="center", fontsize=9)
    axes.set_yticks(range(len(rows)), [row.part for row in rows])
    axes.invert_yaxis()
    axes.margins(x=0.15)
    axes.set_xlabel("milliseconds (median)")
    height, width = bench.image_size
    axes.set_title(
        f"{bench.model}, {height}x{width}, batch {bench.batch_size}, {bench.dtype}\n"
        f"{bench.machine}, {bench.threads} threads",
        fontsize=10,
        loc="left",
    )
    axes.legend(frameon=False)
    axes.spines[["top", "right"]].set_visible(False)
    with replacing(path) as temporary:
        figure.savefig(temporary, dpi=150)
