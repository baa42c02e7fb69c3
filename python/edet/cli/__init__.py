"""The sub-commands of ``edet``: predict, info, bench, schedule, models."""

from __future__ import annotations

import glob
import json
import sys
import tempfile
import time
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from enum import Enum
from functools import partial
from itertools import groupby
from pathlib import Path
from typing import IO, TYPE_CHECKING, Annotated, Any, NoReturn

import torch
import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from torch import Tensor

import edet_kernels
from edet_kernels.testing.numeric import CheckFailed

from ..bench import report as reports
from ..bench.stages import Bench, count_operations, eager_copy, plot, result, run_bench
from ..detection import video
from ..detection.draw import draw_detections
from ..detection.predictor import Prediction, Predictor
from ..detection.results import Detections
from ..extras import require
from ..files import replacing
from ..models.configs import get_config, list_models
from ..models.counts import Counts, count_macs, count_parameters
from ..models.factory import create_model
from . import schedule as schedules

if TYPE_CHECKING:
    from PIL.Image import Image

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


class Nms(str, Enum):
    """Ways to suppress overlapping boxes."""

    hard = "hard"
    gaussian = "gaussian"


ModelName = typer.Argument(help="A name that 'edet models' lists.", metavar="MODEL")
NumClasses = Annotated[
    int, typer.Option(help="Number of classes of the model.", min=1, metavar="N")
]
DtypeOption = Annotated[Dtype, typer.Option(help="Precision to compute in.")]
Device = Annotated[str, typer.Option(help="Where to run: cpu, cuda, cuda:1 ...", metavar="DEVICE")]


@app.callback(invoke_without_command=True)
def common(
    version: Annotated[bool, typer.Option("--version", help="Show the version and exit.")] = False,
) -> None:
    """EfficientDet on fused kernels."""
    if version:
        typer.echo(f"edet-kernels {edet_kernels.__version__}, torch {torch.__version__}")
        raise typer.Exit


def main() -> None:
    """Runs the command line."""
    app(prog_name="edet")


def fail(message: object, code: int = 2) -> NoReturn:
    """Ends the command with one line on standard error."""
    typer.echo(f"Error: {message}", err=True)
    raise typer.Exit(code)


@contextmanager
def one_line_errors() -> Iterator[None]:
    """Shows errors that the user can act on as one line, without a traceback."""
    try:
        yield
    except CheckFailed as error:
        fail(error, code=1)
    except OSError as error:
        fail(f"{error.filename}: {error.strerror}" if error.filename else error)
    except (ValueError, ImportError, edet_kernels.BackendError) as error:
        fail(error)


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


# --- predict --------------------------------------------------------------------------------------


def is_video(path: Path) -> bool:
    """Whether the file is taken for a video."""
    return path.suffix.lower() in video.SUFFIXES


def find_files(arguments: Sequence[str]) -> list[Path]:
    """The image and video files that files, folders and patterns name, in order, each once.

    Raises:
        ValueError: an argument names nothing.
    """
    suffixes = (*require("PIL.Image", "image").registered_extensions(), *video.SUFFIXES)
    found: dict[Path, None] = {}
    for argument in arguments:
        path = Path(argument)
        if path.is_dir():
            inside = sorted(p for p in path.iterdir() if p.suffix.lower() in suffixes)
            if not inside:
                raise ValueError(
                    f"the folder {argument} holds no images or videos (.jpg, .png, .mp4, ...)"
                )
            found.update(dict.fromkeys(inside))
        elif path.exists():
            found[path] = None
        else:
            matches = sorted(Path(p) for p in glob.glob(argument, recursive=True))
            matches = [p for p in matches if p.is_file()]
            if not matches:
                pattern = glob.has_magic(argument)
                raise ValueError(
                    f"no file matches {argument}" if pattern else f"{argument} does not exist"
                )
            found.update(dict.fromkeys(matches))
    if any(map(is_video, found)):
        require("av", "video")
    return list(found)


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


def annotated_names(files: Sequence[Path], folder: Path) -> dict[Path, Path]:
    """Where the annotated copy of each file goes; files of one name get numbers.

    Raises:
        ValueError: a copy would overwrite its original.
    """
    names: dict[Path, Path] = {}
    taken: set[str] = set()
    for path in files:
        suffix = (
            path.suffix if path.suffix.lower() in (".jpg", ".jpeg", ".png", ".webp") else ".png"
        )
        suffix = ".mp4" if is_video(path) else suffix
        name, number = path.stem + suffix, 2
        while name in taken:
            name, number = f"{path.stem}-{number}{suffix}", number + 1
        taken.add(name)
        names[path] = folder / name
        if names[path].exists() and names[path].samefile(path):
            raise ValueError(
                "--output must not be the folder of the images: they would be replaced"
            )
    return names


def load_predictor(
    model: str, checkpoint: Path | None, random_weights: bool, num_classes: int, **options: Any
) -> Predictor:
    """The predictor that the options of ``edet predict`` ask for.

    Raises:
        ValueError: neither or both of a checkpoint and random weights.
    """
    get_config(model)
    if random_weights == (checkpoint is not None):
        raise ValueError(
            "--checkpoint and --random-weights exclude each other"
            if random_weights
            else "--checkpoint FILE is required (or --random-weights, to try things out: "
            "the boxes then mean nothing)"
        )
    network = create_model(model, num_classes=num_classes, checkpoint=checkpoint)
    return Predictor(network, **options)


class Writer:
    """Writes what 'edet predict' finds, each result as it comes.

    The JSON file is one array; annotated images are drawn and written by a thread of their own,
    which is never more than a few images behind.
    """

    def __init__(self, json_stream: IO[str] | None) -> None:
        self._json = json_stream
        self._entries = 0
        self._drawer = ThreadPoolExecutor(1, "edet-draw")
        self._drawing: deque[Future[None]] = deque()

    def __enter__(self) -> Writer:
        self._put("[")
        return self

    def __exit__(self, *_: object) -> None:
        self._drawer.shutdown()
        self.wait()
        self._put("\n]\n")

    def _put(self, text: str) -> None:
        if self._json is not None:
            self._json.write(text)

    def entry(self, **values: Any) -> None:
        """Appends an entry to the JSON file."""
        text = json.dumps(values, allow_nan=False)
        self._put((",\n" if self._entries else "\n") + text)
        self._entries += 1

    def draw(self, pixels: Tensor, objects: Detections, save: Callable[[Image], None]) -> None:
        """Draws the objects and saves the drawing, in the background."""
        self.wait(4)
        self._drawing.append(self._drawer.submit(lambda: save(draw_detections(pixels, objects))))

    def wait(self, most: int = 0) -> None:
        """Waits until no more than ``most`` drawings are to be done.

        Raises:
            OSError: a drawing could not be written.
        """
        while len(self._drawing) > most:
            self._drawing.popleft().result()


def save_copy(path: Path, picture: Image) -> None:
    """Writes an annotated image; it appears whole or not at all."""
    with replacing(path) as temporary:
        picture.save(temporary, quality=95)


@dataclass
class Counted:
    """What became of the files."""

    images: int = 0
    broken: int = 0

    def skip(self, error: Exception) -> None:
        """Reports a file that could not be read."""
        self.broken += 1
        typer.echo(f"Skipped: {error}", err=True)


def predict_images(
    found: Iterable[Prediction], copies: dict[Path, Path], writer: Writer, counted: Counted
) -> Iterator[None]:
    """Reports and writes what was found in image files, yielding after each."""
    for path, pixels, objects, error in found:
        if error is not None:
            counted.skip(error)
        else:
            assert pixels is not None and objects is not None
            counted.images += 1
            typer.echo(f"{path}: {listed(Counter(objects.names))}")
            writer.entry(file=str(path), **objects.to_plain())
            if path in copies:
                writer.draw(pixels, objects, partial(save_copy, copies[path]))
        yield


def predict_video(
    found: Iterable[Prediction],
    reader: video.VideoReader,
    copy: Path | None,
    writer: Writer,
    counted: Counted,
) -> Iterator[None]:
    """Reports and writes what was found in the frames of a video, yielding after each.

    What follows a frame that cannot be decoded is left out.
    """
    names: Counter[str] = Counter()
    frames = 0
    with ExitStack() as stack:
        try:
            for _, pixels, objects, error in found:
                assert pixels is not None and objects is not None, error
                if copy is not None and frames == 0:
                    temporary = stack.enter_context(replacing(copy))
                    drawn = stack.enter_context(video.VideoWriter(temporary, reader.rate))
                    stack.callback(writer.wait)
                if copy is not None:
                    writer.draw(pixels, objects, drawn.write)
                writer.entry(file=str(reader.path), frame=frames, **objects.to_plain())
                names.update(objects.names)
                counted.images += 1
                frames += 1
                yield
        except video.VideoError as error:
            counted.skip(error)
    if frames:
        typer.echo(f"{reader.path}: {frames} frames, {listed(names)}")


def listed(counts: Counter[str]) -> str:
    """Names and how often each was found, the most frequent first."""
    return ", ".join(f"{count} {name}" for name, count in counts.most_common()) or "nothing"


@app.command(epilog="Example: edet predict photos/ -c tf_efficientdet_d0.pth -o found/")
def predict(
    images: Annotated[
        list[str],
        typer.Argument(
            help="Images, videos, folders, or quoted patterns such as 'in/**/*.jpg'.",
            metavar="FILE",
        ),
    ],
    model: Annotated[
        str, typer.Option("--model", "-m", help="A name that 'edet models' lists.", metavar="MODEL")
    ] = "tf_efficientdet_d0",
    checkpoint: Annotated[
        Path | None,
        typer.Option(
            "--checkpoint",
            "-c",
            help="The model's weights: effdet's .pth, or .safetensors.",
            metavar="FILE",
        ),
    ] = None,
    random_weights: Annotated[
        bool, typer.Option("--random-weights", help="Run without a checkpoint; boxes mean nothing.")
    ] = False,
    json_file: Annotated[
        Path | None,
        typer.Option("--json", help="Write all detections to this file.", metavar="FILE"),
    ] = None,
    output: Annotated[
        Path | None,
        typer.Option(
            "--output", "-o", help="Write annotated copies to this folder.", metavar="FOLDER"
        ),
    ] = None,
    score_threshold: Annotated[
        float,
        typer.Option(help="Leave out objects scored at or below this.", min=0, max=1, metavar="P"),
    ] = 0.3,
    nms: Annotated[Nms, typer.Option(help="Suppression: hard, or gaussian (soft-NMS).")] = Nms.hard,
    batch_size: Annotated[int, typer.Option(help="Images at once.", min=1, metavar="N")] = 1,
    num_classes: NumClasses = 90,
    class_names: Annotated[
        Path | None,
        typer.Option(help="Text file with the name of each class on a line.", metavar="FILE"),
    ] = None,
    workers: Annotated[
        int, typer.Option(help="Threads that read images ahead.", min=1, metavar="N")
    ] = 2,
    stats: Annotated[
        bool, typer.Option("--stats", help="Show latency percentiles and memory at the end.")
    ] = False,
    dtype: DtypeOption = Dtype.float32,
    device: Device = "cpu",
) -> None:
    """Find objects in images and videos.

    Prints what is found in each file, in the order given, while the next ones are read. A file that
    cannot be read is reported and skipped; the exit status is then 1. When interrupted, what was
    found so far is kept.
    """
    with one_line_errors():
        files = find_files(images)
        if json_file is not None:
            check_writable(json_file.parent, "--json")
        copies = annotated_names(files, output) if output is not None else {}
        predictor = load_predictor(
            model,
            checkpoint,
            random_weights,
            num_classes,
            score_threshold=score_threshold,
            nms=nms.value,
            batch_size=batch_size,
            class_names=None if class_names is None else class_names.read_text().splitlines(),
            device=checked_device(device),
            dtype=dtype.torch,
        )
        if output is not None:
            check_writable(output, "--output", create=True)
        if random_weights:
            typer.echo("Note: the weights are random, the boxes mean nothing.", err=True)
        counted = Counted()
        interrupted = False
        start = time.perf_counter()
        with ExitStack() as stack:
            stream = None
            if json_file is not None:
                temporary = stack.enter_context(replacing(json_file))
                stream = stack.enter_context(temporary.open("w", encoding="utf-8"))
            writer = stack.enter_context(Writer(stream))
            try:
                predict_files(files, copies, predictor, workers, writer, counted)
            except KeyboardInterrupt:
                interrupted = True
        seconds = time.perf_counter() - start
        if json_file is not None:
            typer.echo(f"Detections: {json_file}", err=True)
        if output is not None:
            typer.echo(f"Annotated copies: {output}", err=True)
        typer.echo(f"{counted.images} images in {seconds:.1f} s", err=True)
        if stats:
            typer.echo(predictor.stats(), err=True)
        if interrupted:
            fail(f"interrupted; {counted.broken} of {len(files)} files could not be read", code=130)
        if counted.broken:
            fail(f"{counted.broken} of {len(files)} files could not be read", code=1)


def predict_files(
    files: Sequence[Path],
    copies: dict[Path, Path],
    predictor: Predictor,
    workers: int,
    writer: Writer,
    counted: Counted,
) -> None:
    """Goes through the files in order, under a progress bar."""
    with progress_bar() as progress:
        task = progress.add_task("predicting", total=len(files))
        for videos, group in groupby(files, is_video):
            paths = list(group)
            if not videos:
                found = predictor.stream(paths, workers=workers)
                for _ in predict_images(found, copies, writer, counted):
                    progress.advance(task)
                continue
            for path in paths:
                try:
                    reader = video.VideoReader(path)
                except (OSError, video.VideoError) as error:
                    counted.skip(error)
                else:
                    part = progress.add_task(path.name, total=reader.frames)
                    found = predictor.stream(reader, workers=workers)
                    for _ in predict_video(found, reader, copies.get(path), writer, counted):
                        progress.advance(part)
                    progress.remove_task(part)
                progress.advance(task)


# --- info, bench, models --------------------------------------------------------------------------


def print_table(rows: Sequence[Sequence[str]]) -> None:
    """Prints rows of cells, the first column flush left, the others flush right."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for row in rows:
        cells = [row[0].ljust(widths[0])]
        cells += [cell.rjust(width) for cell, width in zip(row[1:], widths[1:], strict=True)]
        typer.echo("  ".join(cells).rstrip())


@app.command()
def info(
    model: Annotated[str, ModelName] = "tf_efficientdet_d0",
    num_classes: NumClasses = 90,
    dtype: DtypeOption = Dtype.float32,
    device: Device = "cpu",
) -> None:
    """Show a model's size, and which kernels it will run on and why.

    For each part: parameters, multiply-adds of the convolutions for one image, and operations per
    image (on a GPU, kernel launches) in PyTorch's layers and in the fused ops.
    """
    with one_line_errors():
        place = checked_device(device)
        network = create_model(model, num_classes=num_classes).eval().to(place, dtype.torch)
        config = network.config
        height, width = config.image_size
        typer.echo(
            f"{model}: {config.backbone}, BiFPN of {config.cells} cells x {config.width} channels, "
            f"{config.fusion} fusion\ninput {height}x{width}, levels P{config.min_level} to "
            f"P{config.max_level}, {config.num_classes} classes\n"
        )
        parameters, macs = count_parameters(network), count_macs(network)
        eager, ours = count_operations(eager_copy(network)), count_operations(network)
        names = {"backbone": "backbone", "fpn": "BiFPN", "class_net": "class head"}
        rows = [["", "parameters", "multiply-adds", "operations: PyTorch", "fused"]]
        for part in Counts._fields:
            rows.append(
                [
                    names.get(part, "box head"),
                    f"{getattr(parameters, part):,}",
                    f"{getattr(macs, part) / 1e9:.3f} G",
                    str(eager[part]),
                    str(ours[part]),
                ]
            )
        rows.append(
            [
                "total",
                f"{parameters.total:,}",
                f"{macs.total / 1e9:.3f} G",
                str(sum(eager.values())),
                str(sum(ours.values())),
            ]
        )
        print_table(rows)
        typer.echo(f"\nop, its backend on {device} in {dtype.value}, and why")
        choices = edet_kernels.explain(place, dtype.torch)
        widths = [max(len(c[i]) for c in ((c.op, c.backend) for c in choices)) for i in (0, 1)]
        for choice in choices:
            typer.echo(f"{choice.op:{widths[0]}}  {choice.backend:{widths[1]}}  {choice.reason}")


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
            get_config(name)
        for path, option in ((json_file, "--json"), (plot_file, "--plot")):
            if path is not None:
                check_writable(path.parent, option)
        if plot_file is not None:
            if plot_file.suffix not in (".png", ".svg", ".pdf"):
                raise ValueError(f"--plot must end in .png, .svg or .pdf, got {plot_file}")
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
                typer.echo(f"\n\n{table}" if tables else str(table))
                tables.append(table)
        if json_file is not None:
            reports.write(result(tables), json_file)
            typer.echo(f"Results: {json_file}", err=True)
        if plot_file is not None:
            plot(tables[-1], plot_file)
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


@app.command()
def schedule(
    model: Annotated[str, ModelName] = "tf_efficientdet_d0",
    batch: Annotated[int, typer.Option(help="Images.", min=1, metavar="N")] = 1,
    blocks: Annotated[
        int, typer.Option(help="Blocks that a GPU runs at once.", min=1, metavar="N")
    ] = 264,
    tile_rows: Annotated[
        int, typer.Option(help="Rows of a tile of 8 columns: 8, or 4 for small maps.", metavar="N")
    ] = 8,
    plot: Annotated[
        Path | None, typer.Option(help="Also draw the schedule to this file (PNG, SVG or PDF).")
    ] = None,
) -> None:
    """Show how CUDA computes a model's BiFPN in one launch: its tiles and what they wait for.

    A step is the time of one tile, the same for all: begin and end say when the first tile of a
    node begins and the last one ends on that many blocks.
    """
    with one_line_errors():
        if tile_rows not in (4, 8):
            raise ValueError(f"--tile-rows must be 4 or 8, got {tile_rows}")
        if plot is not None:
            check_writable(plot.parent, "--plot")
        config = get_config(model)
        pyramid = schedules.of_model(config, batch=batch, tile_rows=tile_rows)
        print_table(schedules.table(pyramid, config.min_level, config.levels, blocks))
        typer.echo(
            f"\n{len(pyramid.tiles)} tiles of {tile_rows}x8 pixels; the longest chain is "
            f"{pyramid.steps()} tiles, {blocks} blocks take {pyramid.steps(blocks)} steps"
        )
        if plot is not None:
            schedules.draw(pyramid, plot, blocks, f"{model}, batch {batch}")
            typer.echo(plot)


@app.command()
def models() -> None:
    """List the models."""
    rows = [["name", "input", "BiFPN", "fusion", "levels", "backbone"]]
    for name in list_models():
        c = get_config(name)
        rows.append(
            [
                name,
                "x".join(map(str, c.image_size)),
                f"{c.cells}x{c.width}",
                c.fusion,
                f"P{c.min_level}-P{c.max_level}",
                c.backbone,
            ]
        )
    print_table(rows)
