"""``python -m benchmarks.gpu_model``: the predicted table, its file and its part of the page."""

from __future__ import annotations

import argparse
import datetime
import hashlib
import json
import subprocess
import sys
from collections.abc import Iterable
from dataclasses import asdict
from pathlib import Path
from typing import Any

from benchmarks.gpu_model import launches, rates
from benchmarks.gpu_model.predict import SOURCES as KERNEL_SOURCES
from benchmarks.gpu_model.predict import Prediction, Predictor
from benchmarks.gpu_model.sass import ROOT, SOURCES

SCHEMA = "edet-gpu-model/1"
MODELS = ("tf_efficientdet_d0", "tf_efficientdet_d3", "tf_efficientdet_d7")
PAGE = ROOT / "docs" / "gpu-model.md"
RESULT = ROOT / "benchmarks" / "results" / "gpu-model.json"
BEGIN, END = "<!-- gpu-model:begin -->", "<!-- gpu-model:end -->"
PARTS = ("stem", "mbconv", "lateral", "bifpn", "head", "detect")


def _launch_row(p: Prediction, count: int) -> dict[str, Any]:
    """A launch as JSON."""
    row = asdict(p)
    row["floor_us"] = p.floor_us
    row["launches"] = count
    return {key: round(v, 3) if isinstance(v, float) else v for key, v in row.items()}


def rows_of(predictor: Predictor, model: str, batch: int, parts: tuple[str, ...], launch: str
            ) -> list[dict[str, Any]]:  # fmt: skip
    """A row for each op of a model, with its launches; times in µs.

    Args:
        predictor: for a GPU.
        model: a model's name.
        batch: images.
        parts: names of ops.
        launch: how graphs of nodes are launched, as ``EDET_CUDA_LAUNCH``.
    """
    gpu, rows = predictor.gpu, []
    calls = launches.of_model(model, batch, gpu.device, launch)
    for op in parts:
        mine = [call for call in calls if call.op == op]
        predictions = [p for call in mine for p in predictor.call(call)]
        kernels = [p for p in predictions if p]
        different: dict[int, tuple[Prediction, int]] = {}
        for p in kernels:
            different[id(p)] = (p, different.get(id(p), (p, 0))[1] + 1)
        by_bound: dict[str, float] = {}
        for p in kernels:
            by_bound[p.bound] = by_bound.get(p.bound, 0.0) + p.time_us
        works = [work for call in mine for work in call.works]
        rows.append({
            "model": model, "batch": batch, "gpu": gpu.name, "op": op,
            "code": code(p.kernel for p in kernels), "launch": launch, "calls": len(mine),
            "launches": len(predictions),
            "predicted_us": round(sum(predictor.time_us(call) for call in mine), 1),
            "floor_us": round(sum(p.floor_us for p in kernels), 1),
            "gaps_us": round(sum(p.gap_us if p else gpu.launch_us for p in predictions), 1),
            "mbytes": round(sum(work.bytes for work in works) / 1e6, 2),
            "bound": max(by_bound, key=lambda bound: by_bound[bound]) if by_bound else "",
            "kernels": [_launch_row(p, n) for p, n in different.values()],
        })  # fmt: skip
        print(_line(rows[-1]), file=sys.stderr)
    return rows


def _line(row: dict[str, Any]) -> str:
    return (
        f"{row['gpu']} {row['model']} batch {row['batch']:2} {row['op']:8} "
        f"{row['predicted_us']:9.1f} µs, floor {row['floor_us']:7.1f}, {row['bound']}"
    )


def _short(model: str) -> str:
    return model.rsplit("_", 1)[-1].upper()


def tables(result: dict[str, Any]) -> str:
    """The rows as Markdown: ops, then the launches of the ops whose time is the largest."""
    lines = [
        f"Compiled by {result['compiler']}, {result['dtype']}. "
        "**Predicted from the machine code; not measured on a GPU.** Rows of older code were not "
        "computed again when the kernels changed.",
        "",
        "| GPU | model | batch | op | launches | as | predicted µs | floor µs | of it gaps | MB | "
        "bound by | code |",
        "|---|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    for row in result["rows"]:
        now = code(k["kernel"] for k in row["kernels"])
        lines.append(
            f"| {row['gpu']} | {_short(row['model'])} | {row['batch']} | {row['op']} | "
            f"{row['launches']} | `{row['launch']}` | {row['predicted_us']:.0f} | "
            f"{row['floor_us']:.1f} | {row['gaps_us']:.0f} | {row['mbytes']:.1f} | "
            f"{row['bound']} | {'as it is' if row['code'] == now else 'older'} |"
        )
    lines += _wholes(result["rows"])
    lines += [
        "",
        "The launches of D0's BiFPN on an H100; instructions are those of a block's warps "
        "together, for its first tile and for each further one.",
        "",
        "| batch | kernel | × | blocks | a multiprocessor holds | tiles of a block | "
        "instructions | cycles | loads in flight | chain µs | issue µs | blocks µs | bytes µs | "
        "bound by |",
        "|---|---|---|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    for row in result["rows"]:
        if (row["gpu"], row["op"], _short(row["model"])) != ("H100", "bifpn", "D0"):
            continue
        for k in row["kernels"]:
            more = k["further"] or {"instructions": "–", "cycles": None}
            cycles = f"{k['first']['cycles']:.0f}"
            if more["cycles"] is not None:
                cycles += f", {more['cycles']:.0f}"
            lines.append(
                f"| {row['batch']} | `{k['kernel']}` | {k['launches']} | "
                f"{'×'.join(str(e) for e in k['grid'][:2])} | {k['resident']} | {k['tiles']} | "
                f"{k['first']['instructions']}, {more['instructions']} | {cycles} | "
                f"{k['loads_in_flight']} | {k['chain_us']:.1f} | {k['issue_us']:.1f} | "
                f"{k['blocks_us']:.1f} | {k['bandwidth_us']:.1f} | {k['bound']} |"
            )
    return "\n".join(lines)


def _wholes(rows: list[dict[str, Any]]) -> list[str]:
    """From pixels to detections: the sums of the models of which all ops have a row."""
    sums: dict[tuple[str, str, int], dict[str, dict[str, Any]]] = {}
    for row in rows:
        sums.setdefault((row["gpu"], row["model"], row["batch"]), {})[row["op"]] = row
    lines = []
    for (gpu, model, batch), ops in sums.items():
        if set(ops) != set(PARTS):
            continue
        us, launches = (
            sum(row[key] for row in ops.values()) for key in ("predicted_us", "launches")
        )
        parts = ", ".join(f"{op} {ops[op]['predicted_us']:.0f}" for op in PARTS)
        lines.append(f"| {gpu} | {_short(model)} | {batch} | {launches} | **{us:.0f}** | {parts} |")
    if not lines:
        return []
    head = [
        "",
        "From pixels in the GPU's memory to detections, as one CUDA graph: the sum of the ops, one "
        "after the other.",
        "",
        "| GPU | model | batch | launches | predicted µs | of it |",
        "|---|---|---|---|---|---|",
    ]
    return head + lines


def code(kernels: Iterable[str]) -> str:
    """Names the sources of kernels by their content."""
    content = hashlib.sha256()
    names = sorted({f"{KERNEL_SOURCES[kernel.split('<')[0]]}.cu" for kernel in kernels})
    for path in [*sorted(SOURCES.glob("*.*h")), *(SOURCES / name for name in names)]:
        content.update(path.read_bytes())
    return content.hexdigest()[:12]


def merged(rows: list[dict[str, Any]], before: dict[str, Any]) -> list[dict[str, Any]]:
    """New rows in the place of a result's rows of the same GPU, model, batch and op."""

    def key(row: dict[str, Any]) -> tuple[Any, ...]:
        return row["gpu"], row["model"], row["batch"], PARTS.index(row["op"])

    given = {"code": "", "launch": before.get("launch", "")}
    known = {key(row): {**given, **row} for row in before.get("rows", [])}
    known.update({key(row): row for row in rows})
    return [known[k] for k in sorted(known, key=lambda k: (k[0] != "H100", *k))]


def write_page(text: str) -> None:
    """Puts the tables between the page's marks."""
    before, rest = PAGE.read_text(encoding="utf-8").split(BEGIN)
    PAGE.write_text(f"{before}{BEGIN}\n\n{text}\n\n{END}{rest.split(END)[1]}", encoding="utf-8")


def _compiler() -> str:
    from benchmarks.gpu_model.sass import find_compiler

    nvcc = find_compiler()
    if nvcc is None:
        sys.exit("needs nvcc: set CUDA_HOME to the folder of a CUDA toolkit from 12.0 on")
    said = subprocess.run([nvcc, "--version"], capture_output=True, text=True, check=True).stdout
    return "nvcc " + said.split("release ")[1].split(",")[0]


def main() -> None:
    """Predicts, prints and writes."""
    parser = argparse.ArgumentParser(description="Predicts the CUDA kernels' times without a GPU.")
    parser.add_argument("--models", nargs="+", default=MODELS)
    parser.add_argument("--batches", nargs="+", type=int, default=(1, 64))
    parser.add_argument("--gpus", nargs="+", default=("H100", "A100"))
    parser.add_argument("--ops", nargs="+", default=PARTS, choices=PARTS)
    parser.add_argument("--launch", default="auto", choices=("auto", "nodes", "pdl"))
    parser.add_argument("--json", type=Path, help="writes the result, too")
    parser.add_argument("--update", action="store_true", help="writes the project's file and page")
    parser.add_argument("--folder", type=Path, default=ROOT / "build" / "gpu-model")
    options = parser.parse_args()
    rows = []
    for name in options.gpus:
        predictor = Predictor(rates.gpu(name), options.folder)
        for model in options.models:
            for batch in options.batches:
                rows += rows_of(predictor, model, batch, tuple(options.ops), options.launch)
    if options.update and RESULT.is_file():
        rows = merged(rows, json.loads(RESULT.read_text(encoding="utf-8")))
    result = {
        "schema": SCHEMA,
        "date": datetime.date.today().isoformat(),
        "compiler": _compiler(),
        "dtype": "float16",
        "launch": options.launch,
        "measured": False,
        "rows": rows,
    }
    text = tables(result)
    print(text)
    for path in [options.json, RESULT if options.update else None]:
        if path:
            path.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    if options.update:
        write_page(text)


if __name__ == "__main__":
    main()
