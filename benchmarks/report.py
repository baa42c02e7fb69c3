"""What becomes of the times: statistics, the result file, the Markdown table and the plot."""

from __future__ import annotations

import json
import os
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from edet.extras import require
from edet.files import replacing

#: Names the result file's format; a file of another one is refused.
SCHEMA = "edet-bench-cpu/1"

#: What a result file holds, and each of its rows.
KEYS = ("schema", "date", "revision", "machine", "versions", "threads", "settings", "peak_gflops",
        "rows", "scaling", "memory", "fusion")  # fmt: skip
ROW_KEYS = ("model", "image_size", "dtype", "stage", "macs", "rounds", "times", "unavailable",
            "best_rival", "ratios", "peak_fraction")  # fmt: skip

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


def markdown(result: dict[str, Any]) -> str:
    """A result as Markdown: the conditions, one table per dtype, and what else was measured."""
    machine, versions = result["machine"], result["versions"]
    packages = ", ".join(
        f"{name} {versions[name]}" for name in ("torch", "onnxruntime", "openvino")
    )
    blocks = [
        f"**CPU**: {machine['cpu']}, {machine['cores']} cores, {machine['isa']}; "
        f"{result['threads']} threads, batch 1; {packages}; {result['date'][:10]}. "
        f"Medians of at least {min((r['rounds'] for r in result['rows']), default=0)} rounds in "
        "which all take turns, ms (and how many times longer than ours); "
        "best: the fastest of the others against ours."
    ]
    for dtype in dict.fromkeys(row["dtype"] for row in result["rows"]):
        rows = [row for row in result["rows"] if row["dtype"] == dtype]
        names = list(dict.fromkeys(name for row in rows for name in row["times"] if name != OURS))
        body = []
        for row in rows:
            times, best = row["times"], row["best_rival"]
            height, width = row["image_size"]
            cells = [f"{row['model'].removeprefix('tf_efficientdet_').upper()} {height}×{width}"]
            cells.append(row["stage"])
            for name in names:
                ratio = row["ratios"].get(name)
                note = f" ({ratio['of_medians']:.1f}×)" if ratio else ""
                cells.append(f"{times[name]['median_ms']:.1f}{note}" if name in times else "")
            cells.append(f"**{times[OURS]['median_ms']:.2f}**" if OURS in times else "")
            cells.append(f"**{row['ratios'][best]['of_medians']:.2f}×**" if best else "")
            fraction = row["peak_fraction"].get(OURS)
            cells.append(f"{fraction:.0%}" if fraction else "")
            body.append(cells)
        header = ["", "", *names, "edet-kernels", "best", "of FMA peak"]
        peak = f"{result['peak_gflops'][dtype]:.0f} GFLOP/s"
        blocks.append(f"{dtype}, FMA peak {peak} (largest matrix product of the same run):")
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


def plot(result: dict[str, Any], path: str | os.PathLike[str]) -> None:
    """Draws how many times longer than ours each rival took, one panel per model and dtype.

    Raises:
        ImportError: matplotlib (extra ``plot``) is not installed.
        OSError: the folder does not exist or cannot be written; nothing is left behind.
    """
    panels: dict[tuple[str, str], list[dict[str, Any]]] = {}
    for row in result["rows"]:
        if row["ratios"]:
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
