"""What becomes of measured times: the one result file, comparison, Markdown, plots and HTML.

Every benchmark of the project writes this file: ``edet bench --json`` and ``benchmarks/cpu.py``.
"""

from __future__ import annotations

import base64
import html as escape
import io
import json
import os
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ..extras import require
from ..files import replacing

#: Names the result file's format; a file of another one is refused.
SCHEMA = "edet-bench/1"

#: What a result file holds, and each of its rows. Rows may also hold ``batch_size`` (1),
#: ``parameters`` and ``bytes``: what one call must at least read and write.
KEYS = ("schema", "date", "revision", "machine", "versions", "threads", "settings", "peak_gflops",
        "rows", "scaling", "memory", "fusion")  # fmt: skip
ROW_KEYS = ("model", "image_size", "dtype", "stage", "macs", "rounds", "times", "unavailable",
            "best_rival", "ratios", "peak_fraction")  # fmt: skip

#: Stages in the order they run; the whole network last.
STAGE_ORDER = ("pre-processing", "backbone", "BiFPN", "heads", "post-processing", "network",
               "network + post-processing")  # fmt: skip

#: Stages whose other variant is our own reference, which is written to be read.
NO_RIVALS = ("post-processing",)

#: Latencies published elsewhere, ms, as context and not as a comparison: batch 1, whole detector.
PUBLISHED: dict[str, dict[str, float]] = {
    "Titan V, FP32, TensorFlow 2.1, with pre- and post-processing (paper, table 2)": {
        "d0": 12, "d1": 16, "d2": 23, "d3": 37, "d4": 65, "d5": 128, "d6": 169, "d7": 232,
        "d7x": 285,
    },
    "V100, FP16, TensorFlow 2.1, with pre- and post-processing (paper, table 2)": {
        "d0": 10.2, "d1": 13.5, "d2": 17.7, "d3": 29.0, "d4": 42.8, "d5": 72.5, "d6": 92.8,
        "d7": 122, "d7x": 153,
    },
    "GPU not named, FP16, TensorRT (NVIDIA's sample, D0 only)": {"d0": 2.27},
    "A100, FP16, TensorFlow 2 (NVIDIA DeepLearningExamples, D0 only)": {"d0": 26.31},
}  # fmt: skip

#: Name of our own column.
OURS = "ours"


def summary(samples: Sequence[float]) -> dict[str, Any]:
    """Median and quartiles of ``samples``, which are kept.

    Raises:
        ValueError: there are none.
    """
    if not samples:
        raise ValueError("samples must hold at least one time, got none")
    q1, q3 = samples[0], samples[0]
    if len(samples) > 1:
        q1, _, q3 = statistics.quantiles(samples, n=4, method="inclusive")
    return {
        "median_ms": statistics.median(samples),
        "q1_ms": q1,
        "q3_ms": q3,
        "samples_ms": list(samples),
    }


def ratios(theirs: Sequence[float], ours: Sequence[float]) -> dict[str, float]:
    """How many times longer theirs took: ratio of the medians, and median of each round's ratio.

    Raises:
        ValueError: not the same number of rounds.
    """
    if len(theirs) != len(ours):
        raise ValueError(f"rounds must be as many for both, got {len(theirs)} and {len(ours)}")
    return {
        "of_medians": statistics.median(theirs) / statistics.median(ours),
        "paired": statistics.median(t / o for t, o in zip(theirs, ours, strict=True)),
    }


def compare(times: dict[str, dict[str, Any]]) -> tuple[str | None, dict[str, dict[str, float]]]:
    """The fastest rival of a row (None without any) and the ratios of each to ours."""
    rivals = [name for name in times if name != OURS]
    if OURS not in times or not rivals:
        return None, {}
    best = min(rivals, key=lambda name: times[name]["median_ms"])
    ours = times[OURS]["samples_ms"]
    return best, {name: ratios(times[name]["samples_ms"], ours) for name in rivals}


def check(result: Any) -> dict[str, Any]:
    """``result`` when it is a result of this format.

    Raises:
        ValueError: naming what is missing.
    """
    if not isinstance(result, dict) or result.get("schema") != SCHEMA:
        raise ValueError(f"result must have the schema {SCHEMA!r}")
    missing = [key for key in KEYS if key not in result]
    missing += [f"rows[{i}].{k}" for i, row in enumerate(result["rows"] if not missing else [])
                for k in ROW_KEYS if k not in row]  # fmt: skip
    if missing:
        raise ValueError(f"result must hold {', '.join(missing)}")
    return result


def write(result: dict[str, Any], path: str | os.PathLike[str]) -> None:
    """Writes a result file; it appears whole or not at all.

    Raises:
        ValueError: ``result`` is not of the format.
        OSError: the folder does not exist or cannot be written.
    """
    text = json.dumps(check(result), indent=1, ensure_ascii=False, allow_nan=False)
    with replacing(path) as temporary:
        temporary.write_text(text + "\n", encoding="utf-8")


def read(path: str | os.PathLike[str]) -> dict[str, Any]:
    """Reads a result file.

    Raises:
        ValueError: it is not of the format.
    """
    return check(json.loads(Path(path).read_text(encoding="utf-8")))


def _table(header: Sequence[str], rows: Sequence[Sequence[str]], words: int = 1) -> list[str]:
    """Lines of a Markdown table whose first ``words`` columns are text, the others numbers."""
    marks = ["---"] * words + ["---:"] * (len(header) - words)
    return [f"| {' | '.join(cells)} |" for cells in (header, marks, *rows)]


def short(model: str) -> str:
    """The model's name without its family."""
    return model.removeprefix("tf_").removeprefix("efficientdet_")


def conditions(result: dict[str, Any]) -> str:
    """The machine and the software of a result on one line."""
    machine, versions = result["machine"], result["versions"]
    names = ("torch", "onnxruntime", "openvino", "effdet", "timm")
    packages = [f"{name} {versions[name]}" for name in names if name in versions]
    cores = f", {machine['cores']} cores" if machine.get("cores") else ""
    isa = f", {machine['isa']}" if machine.get("isa") else ""
    return (
        f"**{machine['cpu']}**{cores}{isa}; {result['threads']} threads; {', '.join(packages)}; "
        f"{result['date'][:10]}"
    )


def throughput(row: dict[str, Any], name: str) -> float:
    """Images per second of a variant."""
    return float(1e3 * row.get("batch_size", 1) / row["times"][name]["median_ms"])


def markdown(result: dict[str, Any]) -> str:
    """A result as Markdown: the conditions, one table per dtype, and what else was measured."""
    blocks = [
        f"{conditions(result)}. "
        f"Medians of at least {min((r['rounds'] for r in result['rows']), default=0)} rounds in "
        "which all take turns, ms (and how many times longer than ours); "
        "best: the fastest of the others against ours. " + result["settings"].get("note", "")
    ]
    blocks[0] = blocks[0].rstrip()
    for dtype in dict.fromkeys(row["dtype"] for row in result["rows"]):
        rows = [row for row in result["rows"] if row["dtype"] == dtype]
        names = list(dict.fromkeys(name for row in rows for name in row["times"] if name != OURS))
        batches = any(row.get("batch_size", 1) > 1 for row in rows)
        body = []
        for row in rows:
            times, best = row["times"], row["best_rival"]
            height, width = row["image_size"]
            batch = row.get("batch_size", 1)
            many = f", batch {batch}" if batch > 1 else ""
            cells = [f"{short(row['model']).upper()} {height}×{width}{many}"]
            cells.append(row["stage"])
            for name in names:
                ratio = row["ratios"].get(name)
                note = f" ({ratio['of_medians']:.1f}×)" if ratio else ""
                note = " (the reference)" if note and row["stage"] in NO_RIVALS else note
                cells.append(f"{times[name]['median_ms']:.1f}{note}" if name in times else "")
            cells.append(f"**{times[OURS]['median_ms']:.2f}**" if OURS in times else "")
            if batches:
                cells.append(f"{throughput(row, OURS):.1f}" if OURS in times else "")
            rival = best and row["stage"] not in NO_RIVALS
            cells.append(f"**{row['ratios'][best]['of_medians']:.2f}×**" if rival else "")
            fraction = row["peak_fraction"].get(OURS)
            cells.append(f"{fraction:.0%}" if fraction else "")
            body.append(cells)
        images = ["images/s"] if batches else []
        header = ["", "", *names, "edet-kernels", *images, "best", "of FMA peak"]
        peak = result["peak_gflops"].get(dtype)
        known = f"{peak:.0f} GFLOP/s (largest matrix product of the same run)" if peak else ""
        blocks.append(f"{dtype}, FMA peak {known}:" if known else f"{dtype}:")
        blocks.append("\n".join(_table(header, body, words=2)))
        reasons: dict[str, list[str]] = {}
        for row in rows:
            for name, reason in row["unavailable"].items():
                reasons.setdefault(f"{name}: {' '.join(reason.split())}", []).append(row["stage"])
        blocks += [f"Not in this table, {reason}" for reason in reasons]
    blocks += _extras(result)
    return "\n\n".join(blocks)


def _extras(result: dict[str, Any]) -> list[str]:
    blocks = []
    if result["scaling"]:
        body = [
            [
                s["model"],
                s["dtype"],
                s["name"],
                *(f"{s[k]:.2f}" for k in ("one_ms", "all_ms")),
                f"{s['one_ms'] / s['all_ms']:.2f}×",
            ]
            for s in result["scaling"]
        ]
        header = ["network", "", "", "1 thread, ms", f"{result['threads']} threads, ms", "speedup"]
        blocks.append("\n".join(_table(header, body, words=3)))
    if result["memory"]:
        body = [
            [m["model"], m["dtype"], m["name"]]
            + [f"{m[k]:.0f}" for k in ("imports_mib", "once_mib", "ten_times_mib")]
            for m in result["memory"]
        ]
        header = ["resident memory, MiB", "", "", "after its imports", "peak, 1 run", "10 runs"]
        blocks.append("\n".join(_table(header, body, words=3)))
    if result["fusion"]:
        body = [
            [
                f["model"],
                f["name"],
                f"{f['fast']['median_ms']:.2f}",
                f"{f['softmax']['median_ms']:.2f}",
                f"{f['ratio']['of_medians']:.3f}×",
                f"{f['ratio']['paired']:.3f}×",
            ]
            for f in result["fusion"]
        ]
        header = ["BiFPN", "", "fast, ms", "softmax, ms", "softmax / fast", "paired"]
        blocks.append("\n".join(_table(header, body, words=2)))
    return blocks


# --- comparing two results ------------------------------------------------------------------------


@dataclass(frozen=True)
class Verdict:
    """One row of two results.

    Attributes:
        row: the model, batch, dtype and stage.
        before, after: medians of ours, ms.
        ratio: after / before, divided by ``drift``.
        low, high: its 95 % interval.
        drift: how much slower the variants that are not ours became: the machine, not the code.
        word: ``faster``, ``slower``, ``same`` or ``unclear``.
    """

    row: str
    before: float
    after: float
    ratio: float
    low: float
    high: float
    drift: float
    word: str


def _medians(samples: Sequence[float], generator: np.random.Generator) -> np.ndarray[Any, Any]:
    """Medians of 2000 resamplings of ``samples`` (bootstrap, Efron 1979)."""
    values = np.asarray(samples, np.float64)
    picks = generator.integers(0, len(values), (2000, len(values)))
    medians: np.ndarray[Any, Any] = np.median(values[picks], axis=1)
    return medians


def verdicts(
    before: dict[str, Any], after: dict[str, Any], tolerance: float = 0.02
) -> list[Verdict]:
    """Compares our times in two results, row by row.

    A row is faster (slower) only when the whole 95 % interval of the ratio of medians is below
    1 − ``tolerance`` (above 1 + ``tolerance``); the same when all of it is inside; otherwise the
    samples are too noisy to tell. Variants that are not ours, such as PyTorch's eager layers, run
    the same code in both results: what they lost or gained is the machine's and is divided out.

    Raises:
        ValueError: no row is in both.
    """

    def keyed(result: dict[str, Any]) -> dict[tuple[Any, ...], dict[str, Any]]:
        return {
            (r["model"], *r["image_size"], r.get("batch_size", 1), r["dtype"], r["stage"]): r
            for r in result["rows"]
            if OURS in r["times"]
        }

    olds, news = keyed(before), keyed(after)
    generator = np.random.default_rng(0)
    found = []
    for key in (key for key in olds if key in news):
        old, new = olds[key]["times"], news[key]["times"]
        ratio = _medians(new[OURS]["samples_ms"], generator) / _medians(
            old[OURS]["samples_ms"], generator
        )
        controls = [name for name in old if name != OURS and name in new]
        drifts = np.ones_like(ratio)
        if controls:
            each = [
                _medians(new[n]["samples_ms"], generator)
                / _medians(old[n]["samples_ms"], generator)
                for n in controls
            ]
            drifts = np.exp(np.mean(np.log(each), axis=0))
        low, middle, high = np.quantile(ratio / drifts, (0.025, 0.5, 0.975))
        word = "unclear"
        if high < 1 - tolerance:
            word = "faster"
        elif low > 1 + tolerance:
            word = "slower"
        elif low >= 1 - tolerance and high <= 1 + tolerance:
            word = "same"
        model, height, width, batch, dtype, stage = key
        name = f"{short(model)} {height}x{width} batch {batch} {dtype} {stage}"
        found.append(
            Verdict(
                name,
                statistics.median(old[OURS]["samples_ms"]),
                statistics.median(new[OURS]["samples_ms"]),
                float(middle),
                float(low),
                float(high),
                float(np.median(drifts)),
                word,
            )
        )
    if not found:
        raise ValueError("results must have a row in common: model, size, batch, dtype and stage")
    return found


# --- pictures -------------------------------------------------------------------------------------


def _figure(width: float, height: float) -> Any:
    return require("matplotlib.figure", "plot").Figure(
        figsize=(width, height), layout="constrained"
    )


def _variants(result: dict[str, Any]) -> list[str]:
    """Names of all variants of a result, ours last: one order, and so one colour, everywhere."""
    names = {name for row in result["rows"] for name in row["times"]}
    return [*sorted(names - {OURS}), *sorted(names & {OURS})]


def _colour(name: str, names: Sequence[str]) -> str:
    """Ours is red in every picture; the others are greys and blues."""
    others = [n for n in names if n != OURS]
    return (
        "#d1495b"
        if name == OURS
        else ("#7d7d7d", "#2e86ab", "#b8b8b8", "#1b4965", "#62b6cb")[others.index(name) % 5]
    )


def _clean(axes: Any) -> None:
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(axis="y", alpha=0.25)


def _rows(result: dict[str, Any], stage: str) -> list[dict[str, Any]]:
    """The rows of a stage at the smallest batch, in the first dtype."""
    rows = [row for row in result["rows"] if row["stage"] == stage]
    smallest = min((row.get("batch_size", 1) for row in rows), default=1)
    return [
        row
        for row in rows
        if row.get("batch_size", 1) == smallest and row["dtype"] == rows[0]["dtype"]
    ]


def plot_size(result: dict[str, Any]) -> Any:
    """Latency of the network against parameters and multiply-adds (as the paper's figure 4)."""
    rows = [row for row in _rows(result, "network") if row.get("parameters")]
    if not rows:
        return None
    figure = _figure(10.5, 5)
    names = [name for name in _variants(result) if any(name in row["times"] for row in rows)]
    for axes, key, scale, label in zip(
        figure.subplots(1, 2, sharey=True),
        ("parameters", "macs"),
        (1e6, 1e9),
        ("parameters, millions", "multiply-adds of the convolutions, billions"),
        strict=True,
    ):
        for name in names:
            mine = sorted(
                (row for row in rows if name in row["times"]), key=lambda row: row["macs"]
            )
            axes.plot(
                [row[key] / scale for row in mine],
                [row["times"][name]["median_ms"] for row in mine],
                marker="o",
                color=_colour(name, names),
                linewidth=2 if name == OURS else 1.2,
                label="edet-kernels" if name == OURS else name,
            )
        labelled: list[float] = []
        for row in sorted(rows, key=lambda row: row["macs"]):
            if OURS in row["times"]:
                point = row[key] / scale, row["times"][OURS]["median_ms"]
                # of two models of one size the smaller is named below, the larger beside its point
                beside = any(0.95 < point[0] / x < 1.05 for x in labelled)
                labelled.append(point[0])
                axes.annotate(
                    short(row["model"]).upper(),
                    point,
                    (8, -3) if beside else (0, -13),
                    textcoords="offset points",
                    ha="left" if beside else "center",
                    fontsize=8,
                )
        for published, marker in zip(PUBLISHED, "^v<>", strict=True):
            points = [
                (row[key] / scale, PUBLISHED[published][short(row["model"])])
                for row in rows
                if short(row["model"]) in PUBLISHED[published]
            ]
            if points:
                axes.plot(
                    *zip(*points, strict=True), marker, color="0.6", markersize=5, label=published
                )
        axes.set_xscale("log")
        axes.set_yscale("log")
        values = sorted({float(f"{row[key] / scale:.3g}") for row in rows})
        apart = (values[-1] / values[0]) ** 0.06  # labels that are nearer would overlap
        ticks = values[:1]
        for value in values[1:]:
            if value > apart * ticks[-1]:
                ticks.append(value)
        axes.set_xticks(ticks, [f"{tick:g}" for tick in ticks], fontsize=8)
        axes.minorticks_off()
        axes.set_xlabel(label)
        _clean(axes)
    figure.axes[0].set_ylabel("milliseconds")
    handles, labels = figure.axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=2, frameon=False, fontsize=8)
    title = "Network latency; grey: published on other hardware, for context"
    figure.suptitle(title, x=0.01, ha="left", fontsize=11)
    return figure


def plot_stages(result: dict[str, Any]) -> Any:
    """Time of each stage, stacked, one bar per model and variant."""
    stages = [s for s in STAGE_ORDER[:5] if _rows(result, s)]
    models = list(dict.fromkeys(row["model"] for s in stages for row in _rows(result, s)))
    if not models:
        return None
    bars: list[tuple[str, list[float], float]] = []  # label, stages, the model's longest bar
    for model in models:
        rows = {s: next((r for r in _rows(result, s) if r["model"] == model), None) for s in stages}
        mine: list[tuple[str, list[float]]] = []
        for name in _variants(result):
            if not any(row and name in row["times"] for row in rows.values()):
                continue
            if any(row and name not in row["times"] and len(row["times"]) > 1
                   for row in rows.values()):  # fmt: skip
                continue  # a variant of some stages only
            heights = []
            for row in rows.values():
                times = row["times"] if row else {}
                # a stage with one variant is the same for all
                chosen = times.get(name) or next(iter(times.values()), {"median_ms": 0.0})
                heights.append(chosen["median_ms"])
            label = "edet-kernels" if name == OURS else name
            mine.append((f"{short(model).upper()}  {label}", heights))
        longest = max(sum(heights) for _, heights in mine)
        bars += [(label, heights, longest) for label, heights in mine]
    figure = _figure(9, 1.4 + 0.36 * len(bars))
    axes = figure.add_subplot()
    left = [0.0] * len(bars)
    for k, stage in enumerate(stages):
        widths = [heights[k] / longest for _, heights, longest in bars]
        axes.barh(range(len(bars)), widths, 0.8, left, color=f"C{k}", label=stage)
        left = [a + b for a, b in zip(left, widths, strict=True)]
    for i, (_, heights, _) in enumerate(bars):
        axes.text(left[i], i, f" {sum(heights):.1f} ms", va="center", fontsize=9)
    axes.set_yticks(range(len(bars)), [label for label, _, _ in bars])
    axes.margins(x=0.14, y=0.01)
    axes.invert_yaxis()
    axes.set_xlabel("sum of the stages' medians, as a part of the model's longest")
    axes.spines[["top", "right"]].set_visible(False)
    figure.legend(loc="outside lower center", ncols=5, frameon=False, fontsize=9)
    return figure


def plot_throughput(result: dict[str, Any]) -> Any:
    """Images per second of the network against the batch size, one panel per model."""
    panels: dict[str, list[dict[str, Any]]] = {}
    for row in result["rows"]:
        if row["stage"] == "network" and row["dtype"] == result["rows"][0]["dtype"]:
            panels.setdefault(row["model"], []).append(row)
    panels = {
        model: sorted(rows, key=lambda row: row.get("batch_size", 1))
        for model, rows in panels.items()
        if len({row.get("batch_size", 1) for row in rows}) > 1
    }
    if not panels:
        return None
    columns = min(len(panels), 3)
    lines = -(-len(panels) // columns)
    figure = _figure(max(3.6 * columns, 5), 3.4 * lines)
    names = _variants(result)
    for axes, (model, rows) in zip(
        figure.subplots(lines, columns, squeeze=False).flat, panels.items(), strict=False
    ):
        for name in names:
            mine = [row for row in rows if name in row["times"]]
            if not mine:
                continue
            axes.plot(
                [row.get("batch_size", 1) for row in mine],
                [throughput(row, name) for row in mine],
                marker="o",
                color=_colour(name, names),
                label="edet-kernels" if name == OURS else name,
            )
        sizes = [row.get("batch_size", 1) for row in rows]
        axes.set_xscale("log", base=2)
        axes.set_xticks(sizes, [str(size) for size in sizes])
        axes.minorticks_off()
        axes.set_ylim(bottom=0)
        axes.set_title(short(model).upper(), fontsize=10, loc="left")
        axes.set_xlabel("batch")
        axes.set_ylabel("images per second")
        _clean(axes)
    for unused in figure.axes[len(panels) :]:
        unused.set_visible(False)
    handles, labels = figure.axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=3, frameon=False, fontsize=9)
    return figure


def plot_roofline(result: dict[str, Any]) -> Any:
    """Attained GFLOP/s of each stage against its arithmetic intensity, under the measured roofs."""
    bandwidth = result["settings"].get("bandwidth_gbs")
    rows = [r for s in STAGE_ORDER for r in _rows(result, s) if r.get("bytes") and r["macs"]]
    peak = result["peak_gflops"].get(rows[0]["dtype"]) if rows else None
    if not (rows and bandwidth and peak):
        return None
    figure = _figure(8, 5)
    axes = figure.add_subplot()
    intensities = [2 * row["macs"] / row["bytes"] for row in rows]
    reach = np.geomspace(min(*intensities, peak / bandwidth) / 3, max(intensities) * 3, 100)
    axes.plot(reach, np.minimum(peak, bandwidth * reach), color="0.3", linewidth=1.5)
    axes.text(reach[-1], peak, f"{peak:.0f} GFLOP/s ", ha="right", va="bottom", fontsize=9)
    at = reach[0] * 1.3, bandwidth * reach[0] * 1.2
    axes.text(*at, f"{bandwidth:.0f} GB/s", va="top", fontsize=9)
    names = _variants(result)
    stages = [stage for stage in STAGE_ORDER if any(row["stage"] == stage for row in rows)]
    for x, row in zip(intensities, rows, strict=True):
        marker = "osD^vP*"[stages.index(row["stage"])]
        for name, times in row["times"].items():
            point = x, 2e-6 * row["macs"] / times["median_ms"]
            axes.plot(*point, marker, color=_colour(name, names), markersize=6)
            if name == OURS:
                text = short(row["model"]).upper()
                axes.annotate(text, point, (5, 4), textcoords="offset points", fontsize=7)
    for name in names:
        label = "edet-kernels" if name == OURS else name
        axes.plot([], [], "s", color=_colour(name, names), markersize=9, label=label)
    for stage in stages:
        axes.plot([], [], "osD^vP*"[stages.index(stage)], color="0.3", label=stage)
    ticker = require("matplotlib.ticker", "plot")
    for axis, scale in ((axes.xaxis, axes.set_xscale), (axes.yaxis, axes.set_yscale)):
        scale("log")
        axis.set_major_locator(ticker.LogLocator(subs=(1, 2, 5)))
        axis.set_major_formatter("{x:g}")
        axis.set_minor_locator(ticker.NullLocator())
    axes.set_xlabel("operations per byte that must move")
    axes.set_ylabel("GFLOP/s")
    figure.legend(loc="outside lower center", ncols=4, frameon=False, fontsize=9)
    _clean(axes)
    return figure


def plot_fusion(result: dict[str, Any]) -> Any:
    """The BiFPN with softmax and with fast fusion, per variant."""
    groups: list[tuple[str, float, float]] = [
        (f"{short(f['model']).upper()}\n{f['name']}", f["softmax"]["median_ms"],
         f["fast"]["median_ms"])
        for f in result["fusion"]
    ]  # fmt: skip
    for row in _rows(result, "BiFPN") if not groups else []:
        times = {name: t["median_ms"] for name, t in row["times"].items()}
        if "eager softmax" in times and "eager fast" in times:
            name = short(row["model"]).upper()
            groups.append((f"{name}\neager", times["eager softmax"], times["eager fast"]))
    if not groups:
        return None
    figure = _figure(max(5, 1.3 * len(groups) + 1), 4)
    axes = figure.add_subplot()
    for k, name in enumerate(("softmax", "fast")):
        places = [i + 0.4 * k - 0.2 for i in range(len(groups))]
        heights = [(softmax, fast)[k] / max(softmax, fast) for _, softmax, fast in groups]
        axes.bar(places, heights, 0.38, color=f"C{k}", label=name)
        for place, height, group in zip(places, heights, groups, strict=True):
            text = f"{group[k + 1]:.1f}"
            axes.text(place, height, text, ha="center", va="bottom", fontsize=8)
    axes.set_xticks(range(len(groups)), [name for name, _, _ in groups], fontsize=8)
    axes.set_ylabel("BiFPN, part of the slower; ms above")
    figure.legend(loc="outside lower center", ncols=2, frameon=False, fontsize=9)
    _clean(axes)
    return figure


#: The pictures of a report: file name, title, what draws it.
PLOTS = (
    ("latency", "Latency against size", plot_size),
    ("stages", "Where the time goes", plot_stages),
    ("throughput", "Throughput over batch sizes", plot_throughput),
    ("roofline", "Roofline", plot_roofline),
    ("fusion", "Softmax against fast fusion", plot_fusion),
)


def published_table(models: Sequence[str]) -> list[str]:
    """Lines of a Markdown table of the published latencies of ``models``."""
    names = [
        m for m in dict.fromkeys(map(short, models)) if any(m in p for p in PUBLISHED.values())
    ]
    if not names:
        return []
    rows = [
        [where, *(str(times.get(name, "")) for name in names)] for where, times in PUBLISHED.items()
    ]
    return _table(["milliseconds, batch 1", *(n.upper() for n in names)], rows)


def _html_table(lines: Sequence[str]) -> str:
    cells = [[c.strip() for c in line.split("|")[1:-1]] for line in (lines[0], *lines[2:])]
    rows = [[escape.escape(c.replace("**", "")) for c in row] for row in cells]
    body = "".join(
        "<tr>" + "".join(f"<{tag}>{cell}</{tag}>" for cell in row) + "</tr>\n"
        for tag, row in zip(["th", *["td"] * (len(rows) - 1)], rows, strict=True)
    )
    return f"<div class=table><table>\n{body}</table></div>"


_STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; max-width: 62rem; margin: 2rem auto; padding: 0 1rem;
  color: #222; background: #fff }
h1, h2 { line-height: 1.2 } img { max-width: 100%; height: auto }
table { border-collapse: collapse; font-size: 13px; font-variant-numeric: tabular-nums }
td, th { padding: .25rem .6rem; border-bottom: 1px solid #ddd; text-align: right }
td:first-child, th:first-child, td:nth-child(2) { text-align: left }
tr:hover { background: #f5f5f5 } .table { overflow-x: auto } p.note { color: #666 }
"""


def html(result: dict[str, Any], pictures: Sequence[tuple[str, bytes]]) -> str:
    """A result as one page that needs no other file; ``pictures`` are titles and PNG bytes."""
    first, *blocks = markdown(result).split("\n\n")
    parts = ["<h1>edet-kernels: benchmark</h1>", f"<p>{escape.escape(first.replace('**', ''))}</p>"]
    for title, png in pictures:
        data = base64.b64encode(png).decode()
        name = escape.escape(title)
        parts.append(f'<h2>{name}</h2>\n<img alt="{name}" src="data:image/png;base64,{data}">')
    parts.append("<h2>All times</h2>")
    for block in blocks:
        if block.startswith("|"):
            parts.append(_html_table(block.splitlines()))
        else:
            parts.append(f"<p>{escape.escape(block.replace('**', ''))}</p>")
    table = published_table([row["model"] for row in result["rows"]])
    if table:
        parts.append("<h2>Published elsewhere, on other hardware</h2>")
        parts.append("<p class=note>Context, not a comparison.</p>" + _html_table(table))
    head = (
        '<!doctype html>\n<html lang="en">\n<head><meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width">\n'
        f"<title>edet-kernels: benchmark</title>\n<style>{_STYLE}</style></head>\n<body>\n"
    )
    return head + "\n".join(parts) + "\n</body>\n</html>\n"


def write_report(result: dict[str, Any], folder: str | os.PathLike[str]) -> list[Path]:
    """Writes report.md, report.html and the plots that ``result`` has data for; their paths.

    Raises:
        ImportError: matplotlib (extra ``plot``) is not installed.
        OSError: the folder cannot be made or written.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    pictures: list[tuple[str, bytes]] = []
    blocks = ["# edet-kernels: benchmark", markdown(result)]
    written = []
    for name, title, draw in PLOTS:
        figure = draw(result)
        if figure is None:
            continue
        buffer = io.BytesIO()
        figure.savefig(buffer, dpi=150, format="png")
        pictures.append((title, buffer.getvalue()))
        blocks.append(f"## {title}\n\n![{title}]({name}.png)")
        written.append(folder / f"{name}.png")
        with replacing(written[-1]) as temporary:
            temporary.write_bytes(buffer.getvalue())
    table = published_table([row["model"] for row in result["rows"]])
    if table:
        note = "## Published elsewhere, on other hardware\n\nContext, not a comparison.\n\n"
        blocks.append(note + "\n".join(table))
    texts = {"report.md": "\n\n".join(blocks) + "\n", "report.html": html(result, pictures)}
    for file, text in texts.items():
        written.append(folder / file)
        with replacing(written[-1]) as temporary:
            temporary.write_text(text, encoding="utf-8")
    return written


def plot(result: dict[str, Any], path: str | os.PathLike[str]) -> None:
    """Draws how many times longer than ours each rival took, one panel per model and dtype.

    Raises:
        ImportError: matplotlib (extra ``plot``) is not installed.
        OSError: the folder does not exist or cannot be written; nothing is left behind.
    """
    panels: dict[tuple[str, str], list[dict[str, Any]]] = {}
    for row in result["rows"]:
        if row["ratios"] and row["stage"] not in NO_RIVALS:
            panels.setdefault((row["dtype"], row["model"]), []).append(row)
    if not panels:
        return
    names = list(dict.fromkeys(n for rows in panels.values() for r in rows for n in r["ratios"]))
    figure = require("matplotlib.figure", "plot").Figure(
        figsize=(max(4.5 * len(panels), 6), 5), layout="constrained"
    )
    for axes, ((dtype, model), rows) in zip(
        figure.subplots(1, len(panels), squeeze=False)[0], panels.items(), strict=True
    ):
        thickness = 0.8 / len(names)
        for k, name in enumerate(names):
            ys = [
                i - 0.4 + thickness * (k + 0.5) for i, r in enumerate(rows) if name in r["ratios"]
            ]
            values = [r["ratios"][name]["of_medians"] for r in rows if name in r["ratios"]]
            axes.barh(ys, values, thickness * 0.9, color=f"C{k}", label=name)
            for y, value in zip(ys, values, strict=True):
                axes.text(value, y, f" {value:.1f}", va="center", fontsize=8)
        axes.axvline(1, color="black", linewidth=1)
        axes.set_yticks(
            range(len(rows)),
            [f"{r['stage']}\n{r['times'][OURS]['median_ms']:.1f} ms" for r in rows],
        )
        axes.invert_yaxis()
        axes.margins(x=0.15)
        axes.set_title(f"{model}, {dtype}", fontsize=10, loc="left")
        axes.set_xlabel("times longer than edet-kernels")
        axes.spines[["top", "right"]].set_visible(False)
    figure.axes[0].legend(frameon=False, fontsize=8)
    machine = result["machine"]
    figure.suptitle(
        f"{machine['cpu']}, {result['threads']} threads, {machine['isa']}", fontsize=10, x=0.01,
        ha="left",
    )  # fmt: skip
    with replacing(path) as temporary:
        figure.savefig(temporary, dpi=150)
