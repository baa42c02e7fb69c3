"""Fills the marked blocks of README.md and docs from the files in benchmarks/results.

The files are what `edet bench --json FILE`, benchmarks/cpu.py and benchmarks/dropin.py write. The
README gets the main table of some, docs/benchmarks.md all that they hold; docs/cuda.md gets what
benchmarks/gpu.py wrote to gpu.json. Run this after adding a
file; with --check it changes nothing and fails when a page is not what the files say.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
README, PAGE = ROOT / "README.md", ROOT / "docs" / "benchmarks.md"
#: Files whose main tables the README shows.
MAIN = ("cpu-d0-fp32", "dropin-d0-fp32")
RESULTS = ROOT / "benchmarks" / "results"
BEGIN, END = "<!-- bench:begin -->", "<!-- bench:end -->"
#: The page of what was measured on a GPU, its marks, and its file; and what the gauge predicts.
GPU_PAGE = ROOT / "docs" / "cuda.md"
GPU_BEGIN, GPU_END = "<!-- gpu:begin -->", "<!-- gpu:end -->"
GPU, PREDICTED = RESULTS / "gpu.json", RESULTS / "gpu-model.json"

sys.path[:0] = [
    str(ROOT),
    str(ROOT / "python"),
]  # as a program, only its own folder is searched
from benchmarks import gpu_tables  # noqa: E402
from edet.bench import report  # noqa: E402
from edet.files import replacing  # noqa: E402


def table(file: Path, page: Path, *, whole: bool) -> str:
    """One result file as Markdown for ``page``, with its picture when there is one.

    Args:
        whole: everything the file holds; otherwise its conditions and first table.
    """
    result = report.check(json.loads(file.read_text(encoding="utf-8")))
    first, *blocks = report.markdown(result).split("\n\n")
    picture = file.with_suffix(".png")
    if picture.exists():
        link = os.path.relpath(picture, page.parent)
        blocks.insert(0, f"![Times longer than edet-kernels]({Path(link).as_posix()})")
    return "\n\n".join([first, *(blocks if whole else blocks[: 2 + picture.exists()])])


def updated(text: str, tables: list[str], begin: str = BEGIN, end: str = END) -> str:
    """``text`` with ``tables`` between its two marks.

    Raises:
        ValueError: a mark is missing or there are several.
    """
    if text.count(begin) != 1 or text.count(end) != 1:
        raise ValueError(f"a page must hold {begin} and {end} once each")
    before, rest = text.split(begin)
    after = rest.split(end)[1]
    return before + "\n\n".join([begin, *tables, end]) + after


def write(page: Path, blocks: list[str], marks: tuple[str, str], *, check: bool = False) -> None:
    """Puts ``blocks`` between the marks of ``page``.

    Raises:
        SystemExit: with ``check``, instead of changing the page.
    """
    old = page.read_text(encoding="utf-8")
    new = updated(old, blocks, *marks)
    if new == old:
        return
    if check:
        sys.exit(f"{page.name} is stale: run python benchmarks/update_readme.py")
    with replacing(page) as temporary:
        temporary.write_text(new, encoding="utf-8")


def update_gpu(file: Path = GPU, page: Path = GPU_PAGE, *, check: bool = False) -> None:
    """Fills the page from a result of benchmarks/gpu.py; where there is none it stays."""
    if not file.exists():
        return
    result, predicted = (json.loads(f.read_text(encoding="utf-8")) for f in (file, PREDICTED))
    write(page, gpu_tables.page(result, predicted), (GPU_BEGIN, GPU_END), check=check)


def main() -> None:
    """Updates the pages, or compares them."""
    parser = argparse.ArgumentParser(description="Fills the pages' tables from benchmarks/results.")
    parser.add_argument("--check", action="store_true", help="change nothing; fail when stale")
    check = parser.parse_args().check

    # benchmarks/gpu.py has a format of its own
    files = [f for f in sorted(RESULTS.glob("*.json")) if report.SCHEMA in f.read_text("utf-8")]
    for page, shown in ((README, [f for f in files if f.stem in MAIN]), (PAGE, files)):
        tables = [table(file, page, whole=page == PAGE) for file in shown]
        write(page, tables, (BEGIN, END), check=check)
    update_gpu(check=check)


if __name__ == "__main__":
    main()
