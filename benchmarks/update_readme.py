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

sys.path[:0] = [
    str(ROOT),
    str(ROOT / "python"),
]  # as a program, only its own folder is searched
from edet import report  # noqa: E402


def table(result: dict[str, Any], picture: Path | None = None) -> str:
    """One result file as Markdown, with its picture when there is one."""
    text = report.markdown(report.check(result))
    if picture is None or not picture.exists():
        return text
    first, *blocks = text.split("\n\n")
    link = f"![Times longer than edet-kernels]({picture.relative_to(ROOT).as_posix()})"
    return "\n\n".join([first, link, *blocks])


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
    tables = [
        table(json.loads(file.read_text(encoding="utf-8")), file.with_suffix(".png"))
        for file in files
    ]
    new = updated(old, tables)
    if new == old:
        return
    if check:
        sys.exit("README.md is stale: run python benchmarks/update_readme.py")
    temporary = README.with_suffix(".md.tmp")
    temporary.write_text(new, encoding="utf-8")
    os.replace(temporary, README)


if __name__ == "__main__":
    main()
