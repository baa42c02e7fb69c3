"""Fills the marked block of README.md with one table for each file in benchmarks/results.

The files are what `edet bench --json FILE` and benchmarks/cpu.py write. Run this after adding one;
with --check it changes nothing and fails when the README is not what the files say.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
README = ROOT / "README.md"
RESULTS = ROOT / "benchmarks" / "results"
BEGIN, END = "<!-- bench:begin -->", "<!-- bench:end -->"

sys.path.insert(0, str(ROOT))  # as a program, only this file's own folder is searched
from benchmarks import report  # noqa: E402


def table(bench: dict[str, Any]) -> str:
    """One result file as Markdown: its conditions, then a row per part of the model.

    The last variant is ours; each other one is shown with how many times longer it took.
    """
    if "schema" in bench:  # of benchmarks/cpu.py
        return report.markdown(report.check(bench))
    *baselines, ours = bench["variants"]
    height, width = bench["image_size"]
    lines = [
        f"**{bench['model']}**, {height}×{width}, batch {bench['batch_size']}, {bench['dtype']}, "
        f"{bench['threads']} threads, {bench['machine']}, torch {bench['torch']}; median of "
        f"{bench['rounds']} rounds in one run, ms:",
        "",
        "| | " + " | ".join([*baselines, "edet-kernels"]) + " | largest difference |",
        "|---|" + "---:|" * (len(baselines) + 2),
    ]
    for row in bench["rows"]:
        medians = row["median_ms"]
        cells = [
            "" if medians[v] is None else f"{medians[v]:.1f} ({medians[v] / medians[ours]:.1f}×)"
            for v in baselines
        ]
        cells += [f"**{medians[ours]:.1f}**", f"{row['difference']:.0e}"]
        lines.append(f"| {row['part']} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def updated(readme: str, tables: list[str]) -> str:
    """``readme`` with ``tables`` between its two marks.

    Raises:
        ValueError: a mark is missing or there are several.
    """
    if readme.count(BEGIN) != 1 or readme.count(END) != 1:
        raise ValueError(f"README.md must hold {BEGIN} and {END} once each")
    before, rest = readme.split(BEGIN)
    after = rest.split(END)[1]
    return before + "\n\n".join([BEGIN, *tables, END]) + after


def main() -> None:
    """Updates README.md, or compares it."""
    parser = argparse.ArgumentParser(description="Fills README.md's table from benchmarks/results.")
    parser.add_argument("--check", action="store_true", help="change nothing; fail when stale")
    check = parser.parse_args().check

    files = sorted(RESULTS.glob("*.json"))
    old = README.read_text(encoding="utf-8")
    new = updated(old, [table(json.loads(file.read_text(encoding="utf-8"))) for file in files])
    if new == old:
        return
    if check:
        sys.exit("README.md is stale: run python benchmarks/update_readme.py")
    temporary = README.with_suffix(".md.tmp")
    temporary.write_text(new, encoding="utf-8")
    os.replace(temporary, README)


if __name__ == "__main__":
    main()
