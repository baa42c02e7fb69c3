"""``edet bench``: time a model against PyTorch; compare and report results."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated, Any

import torch
import typer

from ..bench import Bench, plot_table, result, run_bench
from ..bench import report as reports
from ..extras import require
from ..models.factory import model_config
from .common import (
    Device,
    Dtype,
    DtypeOption,
    app,
    check_picture,
    check_target,
    check_writable,
    checked_device,
    fail,
    one_line_errors,
    print_table,
    progress_bar,
    say,
)


class BenchGroup(typer.core.TyperGroup):
    """``edet bench MODEL …`` is short for ``edet bench run MODEL …``."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        if not args or args[0] not in (*self.commands, "-h", "--help"):
            args = ["run", *args]
        return super().parse_args(ctx, args)


bench_app = typer.Typer(
    cls=BenchGroup, rich_markup_mode=None, context_settings=app.info.context_settings
)
app.add_typer(
    bench_app, name="bench", help="Time a model against PyTorch; compare and report results."
)


@bench_app.command(epilog="Example: edet bench tf_efficientdet_d3 --dtype bfloat16 --plot d3.png")
def run(
    models: Annotated[
        list[str] | None,
        typer.Argument(help="Names that 'edet models' lists.", metavar="[MODEL]..."),
    ] = None,
    batch_size: Annotated[
        list[int] | None,
        typer.Option(help="Images at once; may be given several times.", min=1, metavar="N"),
    ] = None,
    rounds: Annotated[int, typer.Option(help="Timed rounds.", min=1, metavar="N")] = 20,
    dtype: DtypeOption = Dtype.float32,
    device: Device = "cpu",
    threads: Annotated[
        int | None,
        typer.Option(help="CPU threads; PyTorch's choice by default.", min=1, metavar="N"),
    ] = None,
    json_file: Annotated[
        Path | None,
        typer.Option("--json", help="Write the result with all times.", metavar="FILE"),
    ] = None,
    plot_file: Annotated[
        Path | None,
        typer.Option("--plot", help="Draw the last table to .png, .svg or .pdf.", metavar="FILE"),
    ] = None,
) -> None:
    """Time every stage of models against PyTorch: the default of 'edet bench'.

    Every part is first compared with a float64 reference; if one is wrong, nothing is timed. The
    variants then take turns in one process. Weights are random.
    """
    with one_line_errors():
        place = checked_device(device)
        names = models or ["tf_efficientdet_d0"]
        for name in names:
            model_config(name)
        if json_file is not None:
            check_target(json_file, "--json")
        if plot_file is not None:
            check_picture(plot_file)
            if json_file is not None and os.path.realpath(json_file) == os.path.realpath(plot_file):
                raise ValueError(f"--plot: {plot_file} would replace {json_file}")
            require("matplotlib.figure", "plot")
        if threads is not None:
            torch.set_num_threads(threads)
        tables: list[Bench] = []
        for name in names:
            for size in batch_size or [1]:
                with progress_bar() as progress:
                    task = progress.add_task("checking, then timing", total=rounds)
                    table = run_bench(
                        name,
                        batch_size=size,
                        dtype=dtype.torch,
                        device=place,
                        rounds=rounds,
                        progress=lambda done, _, p=progress, t=task: p.update(t, completed=done),  # type: ignore[misc]
                    )
                say(f"\n\n{table}" if tables else str(table))
                tables.append(table)
        if json_file is not None:
            reports.write(result(tables), json_file)
            typer.echo(f"Results: {json_file}", err=True)
        if plot_file is not None:
            plot_table(tables[-1], plot_file)
            typer.echo(f"Plot: {plot_file}", err=True)


ResultFile = Annotated[
    Path, typer.Argument(help="A result of 'edet bench --json'.", exists=True, dir_okay=False)
]


@bench_app.command(epilog="Example: edet bench compare before.json after.json")
def compare(
    before: ResultFile,
    after: ResultFile,
    tolerance: Annotated[
        float, typer.Option(help="Changes smaller than this are none.", min=0, metavar="FRACTION")
    ] = 0.02,
) -> None:
    """Compare two results; the exit status is 1 when a row became slower.

    A row is faster or slower only when the 95 % interval of the ratio of medians says so; what
    PyTorch's own variants lost or gained from one run to the other is the machine's and is divided
    out. Rows whose samples are too noisy to tell are 'unclear'.
    """
    with one_line_errors():
        found = reports.verdicts(reports.read(before), reports.read(after), tolerance)
        rows = [["", "before, ms", "after, ms", "ratio", "95 % interval", "machine", ""]]
        for v in found:
            numbers = [f"{v.before:.2f}", f"{v.after:.2f}", f"{v.ratio:.3f}"]
            rows.append([v.row, *numbers, f"{v.low:.3f}-{v.high:.3f}", f"{v.drift:.3f}", v.word])
        print_table(rows)
        slower = sum(v.word == "slower" for v in found)
    if slower:
        fail(f"{slower} of {len(found)} rows became slower", code=1)


@bench_app.command("report", epilog="Example: edet bench report d0.json --output report/")
def bench_report(
    result_file: ResultFile,
    output: Annotated[
        Path, typer.Option("--output", "-o", help="Folder to write to.", metavar="FOLDER")
    ] = Path("bench"),
) -> None:
    """Write a result as Markdown, plots and one self-contained HTML page."""
    with one_line_errors():
        check_writable(output, "--output", create=True)
        for path in reports.write_report(reports.read(result_file), output):
            typer.echo(path)
