"""A result as Markdown and as one HTML page."""

from __future__ import annotations

import base64
import html as escape
import io
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ..files import replacing
from .plots import PLOTS
from .result import (
    NO_RIVALS,
    OURS,
    PUBLISHED,
    short,
    throughput,
)


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


def _table(header: Sequence[str], rows: Sequence[Sequence[str]], words: int = 1) -> list[str]:
    """Lines of a Markdown table whose first ``words`` columns are text, the others numbers."""
    marks = ["---"] * words + ["---:"] * (len(header) - words)
    return [f"| {' | '.join(cells)} |" for cells in (header, marks, *rows)]


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
                if note and row["stage"] in NO_RIVALS:
                    note = f" ({NO_RIVALS[row['stage']]})"
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
        known = f"{peak:.0f} GFLOP/s (fastest product of the same run)" if peak else ""
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
