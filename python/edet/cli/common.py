"""What every sub-command shares: the application, types of options, one-line errors, tables."""

from __future__ import annotations

import os
import signal
import sys
import tempfile
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from enum import Enum
from pathlib import Path
from typing import Annotated, NoReturn

import torch
import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

import edet_kernels
from edet_kernels.testing.numeric import CheckFailed

from .. import files

app = typer.Typer(
    name="edet",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,  # plain help: paragraphs are reflowed and lines used whole
    context_settings={"help_option_names": ["-h", "--help"]},
)


class Dtype(str, Enum):
    """Precisions the kernels compute in."""

    float32 = "float32"
    bfloat16 = "bfloat16"
    float16 = "float16"

    @property
    def torch(self) -> torch.dtype:
        """PyTorch's dtype of that name."""
        dtype: torch.dtype = getattr(torch, self.value)
        return dtype


ModelName = typer.Argument(help="A name that 'edet models' lists.", metavar="MODEL")
NumClasses = Annotated[
    int, typer.Option(help="Number of classes of the model.", min=1, metavar="N")
]
DtypeOption = Annotated[Dtype, typer.Option(help="Precision to compute in.")]
Device = Annotated[
    str, typer.Option("--device", help="Where to run: cpu, cuda, cuda:1 ...", metavar="DEVICE")
]


@app.callback(invoke_without_command=True)
def common(
    version: Annotated[bool, typer.Option("--version", help="Show the version and exit.")] = False,
) -> None:
    """EfficientDet on fused kernels."""
    if version:
        typer.echo(f"edet-kernels {edet_kernels.__version__}, torch {torch.__version__}")
        raise typer.Exit


def fail(message: object, code: int = 2) -> NoReturn:
    """Ends the command with one line on standard error."""
    typer.echo(f"Error: {message}", err=True)
    raise typer.Exit(code)


@contextmanager
def _ended_by_signals() -> Iterator[None]:
    """What ends a command from outside does what Ctrl-C does: no temporary file stays behind.

    SIGHUP that is ignored, as under nohup, stays so.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def stop(number: int, frame: object) -> NoReturn:
        raise KeyboardInterrupt

    both = (signal.SIGTERM, signal.SIGHUP)
    before = [number for number in both if signal.getsignal(number) is signal.SIG_DFL]
    for number in before:
        signal.signal(number, stop)
    try:
        yield
    finally:
        for number in before:
            signal.signal(number, signal.SIG_DFL)


@contextmanager
def one_line_errors() -> Iterator[None]:
    """Shows errors that the user can act on as one line, without a traceback."""
    try:
        with _ended_by_signals():
            yield
    except KeyboardInterrupt:
        fail("interrupted", code=130)
    except CheckFailed as error:
        fail(error, code=1)
    except OSError as error:
        if isinstance(error, BrokenPipeError) and not error.filename:
            drop_output()  # whoever read the output has left, as head does: nothing to say
            raise typer.Exit(128 + signal.SIGPIPE) from error
        fail(f"{error.filename}: {error.strerror}" if error.filename else error)
    except (ValueError, ImportError, edet_kernels.BackendError) as error:
        fail(error)


def drop_output() -> None:
    """Sends what is still to be printed nowhere, after its reader has left."""
    with suppress(OSError):  # not a file
        null = os.open(os.devnull, os.O_WRONLY)
        os.dup2(null, sys.stdout.fileno())
        os.close(null)


def say(text: object) -> None:
    """Prints a line; the work goes on in silence when the reader of the output has left."""
    try:
        typer.echo(text)
    except BrokenPipeError:
        drop_output()


def checked_device(name: str) -> torch.device:
    """The device ``name``.

    Raises:
        ValueError: no such device, or not on this machine.
    """
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise ValueError(f"--device must be cpu, cuda, cuda:1 or the like, got {name!r}") from error
    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        reason = str(error).splitlines()[0]
        raise ValueError(f"--device {name} cannot be used: {reason}") from error
    return device


def progress_bar() -> Progress:
    """A progress bar on standard error, which vanishes when it is done."""
    console = Console(stderr=True)
    return Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
        console=console,
        disable=not console.is_terminal,
        transient=True,
        redirect_stdout=sys.stdout.isatty(),  # prints above the bar; a pipe gets them as they are
    )


#: The longest side of the network's input that is taken for meant.
LONGEST_SIDE = 16384


def parse_size(text: str | None) -> tuple[int, int] | None:
    """The (H, W) that ``--image-size`` names; None when it was left out.

    Raises:
        ValueError: it is neither a side nor height x width.
    """
    if text is None:
        return None
    height, cross, width = text.lower().partition("x")
    sides = (height, width if cross else height)
    digits = all(side.isascii() and side.isdigit() and len(side) < 9 for side in sides)
    if not digits or not all(0 < int(side) <= LONGEST_SIDE for side in sides):
        raise ValueError(
            f"--image-size must be N or HxW in pixels, such as 384x640, each 1 to {LONGEST_SIDE}, "
            f"got {text!r}"
        )
    return int(sides[0]), int(sides[1])


def check_target(path: Path, option: str) -> None:
    """Checks that ``path`` can be written, before the work for it is done.

    Raises:
        ValueError: it cannot.
    """
    if path == Path("-"):
        raise ValueError(f"{option} must be the path of a file, got -: only predict --json has -")
    try:
        files.check_target(path)
    except OSError as error:
        raise ValueError(f"{option}: cannot write to {path}: {error.strerror}") from error


def check_picture(path: Path) -> None:
    """Checks that ``--plot`` names a file that can be written, of a format by its suffix.

    Raises:
        ValueError: it does not.
    """
    if path.suffix not in (".png", ".svg", ".pdf"):
        raise ValueError(f"--plot must end in .png, .svg or .pdf, got {path}")
    check_target(path, "--plot")


def check_writable(folder: Path, option: str, *, create: bool = False) -> None:
    """Checks that files can be made in ``folder``, which may be created first.

    Raises:
        ValueError: they cannot.
    """
    try:
        if create:
            folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise ValueError(f"{option}: cannot write to {folder}: {error.strerror}") from error


def print_table(rows: Sequence[Sequence[str]]) -> None:
    """Prints rows of cells, the first column flush left, the others flush right."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for row in rows:
        cells = [row[0].ljust(widths[0])]
        cells += [cell.rjust(width) for cell, width in zip(row[1:], widths[1:], strict=True)]
        typer.echo("  ".join(cells).rstrip())
