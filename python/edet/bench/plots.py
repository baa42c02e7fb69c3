"""Pictures of a result."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Any

import numpy as np

from ..extras import require
from ..files import replacing
from .result import (
    NO_RIVALS,
    OURS,
    PUBLISHED,
    STAGE_ORDER,
    short,
    throughput,
)


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


def plot_ratios(result: dict[str, Any], path: str | os.PathLike[str]) -> None:
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
    # each bar as high as its number
    most = max(len(row["ratios"]) for rows in panels.values() for row in rows)
    height = 0.17 * most * max(map(len, panels.values())) + 1.5
    figure = require("matplotlib.figure", "plot").Figure(
        figsize=(max(4.5 * len(panels), 6), max(height, 4)), layout="constrained"
    )
    for axes, ((dtype, model), rows) in zip(
        figure.subplots(1, len(panels), squeeze=False)[0], panels.items(), strict=True
    ):
        thickness = 0.8 / most
        for k, name in enumerate(names):
            placed = [(i, list(r["ratios"])) for i, r in enumerate(rows) if name in r["ratios"]]
            # a row's own bars, around its middle
            ys = [i + thickness * (own.index(name) - (len(own) - 1) / 2) for i, own in placed]
            values = [rows[i]["ratios"][name]["of_medians"] for i, _ in placed]
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
