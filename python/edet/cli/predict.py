"""``edet predict``: objects in images and videos, printed, written as JSON and drawn."""

from __future__ import annotations

import time
import warnings
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, closing, suppress
from dataclasses import dataclass
from enum import Enum
from functools import partial
from itertools import groupby
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import torch
import typer

from edet_kernels import __version__

from ..detection import video
from ..detection.draw import (
    MissingGlyphWarning,
    glyph_hint,
    load_font,
    missing_glyphs,
)
from ..detection.labels import read_class_names
from ..detection.predictor import Prediction, Predictor
from ..detection.stats import Stats
from ..files import replacing
from ..models.configs import get_config
from ..models.described import is_checkpoint, load_described, read_description
from ..models.factory import create_model
from ..models.pretrained import PRETRAINED, pretrained_file
from .common import (
    Device,
    Dtype,
    DtypeOption,
    NumClasses,
    check_writable,
    checked_device,
    fail,
    one_line_errors,
    parse_size,
    progress_bar,
    say,
)
from .inputs import find_files
from .parts import Parts, Place, place, stamp
from .targets import annotated_names, check_targets, is_video
from .writer import ArrayWriter, CopyFailed, PartWriter, VideoCopy, Writer

if TYPE_CHECKING:
    from PIL.Image import Image


class Nms(str, Enum):
    """Ways to suppress overlapping boxes."""

    hard = "hard"
    gaussian = "gaussian"


Files = Annotated[
    list[str],
    typer.Argument(
        help="Images, videos, folders, or quoted patterns such as 'in/**/*.jpg'.", metavar="FILE"
    ),
]
Model = Annotated[
    str | None,
    typer.Option(
        "--model",
        "-m",
        help="A name that 'edet models' lists; tf_efficientdet_d0 when the checkpoint does not "
        "say it, and without a checkpoint edet_lite0_person.",
        metavar="MODEL",
    ),
]
Checkpoint = Annotated[
    Path | None,
    typer.Option(
        "--checkpoint",
        "-c",
        help="The model's weights: those of edet train, effdet's .pth, or .safetensors.",
        metavar="FILE",
    ),
]
RandomWeights = Annotated[
    bool, typer.Option("--random-weights", help="Run without a checkpoint; boxes mean nothing.")
]
JsonFile = Annotated[
    Path | None,
    typer.Option(
        "--json",
        help="Write all detections to this file; - is standard output, and what is printed there "
        "without it goes to standard error.",
        metavar="FILE",
    ),
]
Resume = Annotated[
    bool,
    typer.Option(
        "--resume",
        help="Keep what is done in FILE.parts beside --json FILE until all is, and go on from "
        "there if it was ended on the way; torchrun implies it.",
    ),
]
Output = Annotated[
    Path | None,
    typer.Option("--output", "-o", help="Write annotated copies to this folder.", metavar="FOLDER"),
]
ScoreThreshold = Annotated[
    float,
    typer.Option(help="Leave out objects scored at or below this.", min=0, max=1, metavar="P"),
]
Suppression = Annotated[Nms, typer.Option(help="Suppression: hard, or gaussian (soft-NMS).")]
BatchSize = Annotated[int, typer.Option(help="Images at once.", min=1, metavar="N")]
ClassNames = Annotated[
    Path | None,
    typer.Option(help="Text file with the name of each class on a line.", metavar="FILE"),
]
IouThreshold = Annotated[
    float,
    typer.Option(
        help="With --nms hard: drop boxes that overlap a better one more than this.",
        min=0,
        max=1,
        metavar="P",
    ),
]
ClassAgnostic = Annotated[
    bool,
    typer.Option("--class-agnostic", help="Suppress across classes, not only within each."),
]
MaxDetections = Annotated[int, typer.Option(help="Most objects in an image.", min=1, metavar="N")]
ImageSize = Annotated[
    str | None,
    typer.Option(
        help="Input of the network: a side, or height x width such as 384x640; the model's own "
        "by default.",
        metavar="SIZE",
    ),
]
Font = Annotated[
    Path | None,
    typer.Option(help="TrueType or OpenType file to write class names with.", metavar="FILE"),
]
Workers = Annotated[int, typer.Option(help="Threads that read images ahead.", min=1, metavar="N")]
ShowStats = Annotated[
    bool, typer.Option("--stats", help="Show latency percentiles and memory at the end.")
]


#: What --json - stands for.
STDOUT = Path("/dev/stdout")

#: Of a checkpoint that does not say which model it is of.
DEFAULT_MODEL = "tf_efficientdet_d0"


def load_predictor(
    model: str | None,
    checkpoint: Path | None,
    random_weights: bool,
    num_classes: int,
    *,
    nms: Nms,
    image_size: str | None,
    class_names: Path | None,
    **options: Any,
) -> Predictor:
    """The predictor that the options of a command ask for.

    Args:
        model: a name, a checkpoint or None.
        nms, image_size, class_names: as the options have them.
        options: of the Predictor.

    Raises:
        ValueError: neither or both of a checkpoint and random weights, or a checkpoint of another
            model.
    """
    if model is not None and is_checkpoint(model):
        if checkpoint is not None:
            raise ValueError(f"--checkpoint must be left out when MODEL is one, got {model}")
        checkpoint, model = Path(model), None
    options |= {"nms": nms.value, "image_size": parse_size(image_size)}

    def names(classes: int) -> list[str] | None:
        """Those of the option, as many as the model has classes."""
        return None if class_names is None else read_class_names(class_names, classes)

    if checkpoint is None and not random_weights and (model is None or model in PRETRAINED):
        pretrained = model or next(iter(PRETRAINED))
        if model is None:
            typer.echo(f"No --checkpoint: {pretrained} finds {PRETRAINED[pretrained]}.", err=True)
        weights = pretrained_file(pretrained)
        own = None if weights is None else read_description(weights)
        classes = num_classes if own is None else own.config.num_classes
        return Predictor(pretrained, class_names=names(classes), **options)
    name = get_config(DEFAULT_MODEL if model is None else model).name
    if random_weights == (checkpoint is not None):
        raise ValueError(
            "--checkpoint and --random-weights exclude each other"
            if random_weights
            else "--checkpoint FILE is required (or --random-weights, to try things out: "
            "the boxes then mean nothing)"
        )
    description = None if checkpoint is None else read_description(checkpoint)
    if checkpoint is None or description is None:
        named = names(num_classes)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)  # random weights are the same ones in every run and process
            network = create_model(name, num_classes=num_classes, checkpoint=checkpoint)
        return Predictor(network, class_names=named, **options)
    if model not in (None, description.config.name):
        raise ValueError(f"--model is {model}, {checkpoint} is of {description.config.name}")
    named = names(description.config.num_classes) or description.class_names or None
    return Predictor(load_described(checkpoint)[0], class_names=named, **options)


def save_copy(path: Path, picture: Image) -> None:
    """Writes an annotated image; it appears whole or not at all."""
    with replacing(path, sync=False) as temporary:  # it can be drawn again
        picture.save(temporary, quality=95)


@dataclass
class Counted:
    """What became of the files.

    Attributes:
        needed: whether the work goes on when the reader of the output has left.
        err: whether what is found is told on standard error.
        merged: whether the JSON file is complete; else it is another process that completes it.
    """

    needed: bool
    err: bool = False
    images: int = 0
    broken: int = 0
    interrupted: bool = False
    merged: bool = True

    def skip(self, error: Exception) -> None:
        """Reports a file that could not be read."""
        self.broken += 1
        typer.echo(f"Skipped: {error}", err=True)

    def tell(self, text: str) -> None:
        """Prints what was found in a file.

        Raises:
            BrokenPipeError: the reader of the output has left, and nothing else is wanted.
        """
        if self.err:
            typer.echo(text, err=True)
        elif self.needed:
            say(text)
        else:
            typer.echo(text)


def predict_images(
    found: Iterable[Prediction], copies: dict[Path, Path], writer: Writer, counted: Counted
) -> Iterator[None]:
    """Reports and writes what was found in image files, yielding after each."""
    for path, pixels, objects, error in found:
        if error is not None:
            counted.skip(error)
            writer.done(path, error)
        else:
            assert pixels is not None and objects is not None
            counted.images += 1
            counted.tell(f"{path}: {listed(Counter(objects.names))}")
            writer.entry(file=str(path), **objects.to_plain())
            if path in copies:
                writer.draw(pixels, objects, partial(save_copy, copies[path]))
            writer.done(path)
        yield


def predict_video(
    found: Iterable[Prediction],
    reader: video.VideoReader,
    copy: Path | None,
    writer: Writer,
    counted: Counted,
) -> Iterator[None]:
    """Reports and writes what was found in the frames of a video, yielding after each.

    Copies keep the times of the frames, also where a damaged one is left out.
    """
    names: Counter[str] = Counter()
    frames = 0
    damage = None
    drawn = None
    with suppress(CopyFailed), ExitStack() as stack:
        try:
            for frame, pixels, objects, error in found:
                assert pixels is not None and objects is not None, error
                if copy is not None and frames == 0:
                    temporary = stack.enter_context(replacing(copy))
                    drawn = stack.enter_context(VideoCopy(temporary, reader))
                    stack.callback(writer.wait)
                if drawn is not None:
                    writer.draw(pixels, objects, partial(drawn.write, time=frame.time))
                writer.entry(
                    file=str(reader.path),
                    frame=frames,
                    time=float(frame.time),
                    **objects.to_plain(),
                )
                names.update(objects.names)
                counted.images += 1
                frames += 1
                yield
        except video.VideoError as error:
            damage = error
            counted.skip(error)
    if damage is None and drawn is not None and drawn.error is not None:
        damage = video.VideoError(f"{copy} is not written, {drawn.error}")
        counted.skip(damage)
    writer.done(reader.path, damage)
    if frames:
        counted.tell(f"{reader.path}: {frames} frames, {listed(names)}")


def listed(counts: Counter[str]) -> str:
    """Names and how often each was found, the most frequent first."""
    return ", ".join(f"{count} {name}" for name, count in counts.most_common()) or "nothing"


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
                    writer.done(path, error)
                else:
                    part = progress.add_task(path.name, total=reader.frames)
                    found = predictor.stream(reader, workers=workers)
                    for _ in predict_video(found, reader, copies.get(path), writer, counted):
                        progress.advance(part)
                    progress.remove_task(part)
                progress.advance(task)


def write_found(
    files: Sequence[Path],
    copies: dict[Path, Path],
    predictor: Predictor,
    workers: int,
    target: Path | Parts | None,
    font: Path | None,
) -> Counted:
    """Predicts all files, writing what is found as it comes; an interruption ends it early."""
    counted = Counted(needed=target is not None or bool(copies), err=target == STDOUT)
    with ExitStack() as stack:
        stack.enter_context(warnings.catch_warnings())
        warnings.simplefilter("ignore", MissingGlyphWarning)  # told before, in a note
        if isinstance(target, Parts):
            writer: Writer = PartWriter(target, font)
        elif target is not None:
            temporary = stack.enter_context(replacing(target))
            writer = ArrayWriter(stack.enter_context(temporary.open("w", encoding="utf-8")), font)
        else:
            writer = Writer(font)
        stack.enter_context(writer.open())
        try:
            predict_files(files, copies, predictor, workers, writer, counted)
        except KeyboardInterrupt:
            counted.interrupted = True
    return counted


def write_parts(
    files: Sequence[Path],
    copies: dict[Path, Path],
    predictor: Predictor,
    workers: int,
    parts: Parts,
    where: Place,
    font: Path | None,
) -> Counted:
    """Predicts this process's share of what is not done yet; the last process merges the parts."""
    mine = [path for path in files[where.rank :: where.world] if path not in parts.done]
    if parts.done:
        typer.echo(f"{len(parts.done)} files were done before, {len(mine)} are left", err=True)
    with closing(parts):
        counted = write_found(mine, copies, predictor, workers, parts, font)
        if not counted.interrupted:
            broken = parts.merge(files)
            # one that fails would make torchrun end the others: the last one tells of all
            counted.merged, counted.broken = broken is not None, broken or 0
    return counted


#: Parameters of 'edet predict' on which no entry depends.
_NEUTRAL = {"images", "json_file", "resume", "batch_size", "workers", "stats", "device", "font"}


def result_options(parameters: Mapping[str, Any]) -> dict[str, Any]:
    """What results depend on: options, and the files that they name as they are now."""
    kept = {name: value for name, value in parameters.items() if name not in _NEUTRAL}
    named = {
        f"{name} of": stamp(kept[name]) for name in ("checkpoint", "class_names") if kept[name]
    }
    texts = {name: None if value is None else str(value) for name, value in kept.items()}
    return {"version": __version__, **texts, **named}


def parts_of(json_file: Path | None, resume: bool, options: dict[str, Any]) -> Parts | None:
    """Where several processes, or one that may be killed, keep what is done; else None.

    Raises:
        ValueError: there is no file to keep it beside, or results of other options.
    """
    where = place()
    if where.world == 1 and not resume:
        return None
    asked = "--resume" if resume else "predicting in several processes"
    if json_file is None or json_file == STDOUT or (json_file.exists() and not json_file.is_file()):
        raise ValueError(f"{asked} needs --json FILE: what is done is kept beside that file")
    return Parts(json_file, options, where.rank)


def report(
    counted: Counted,
    seconds: float,
    json_file: Path | None,
    output: Path | None,
    stats: Stats | None,
) -> None:
    """Says on standard error where results are and what it took."""
    if json_file is not None and json_file != STDOUT:
        whose = "" if counted.merged else " is yet to be written: not all files are done"
        typer.echo(f"Detections: {json_file}{whose}", err=True)
    if output is not None:
        typer.echo(f"Annotated copies: {output}", err=True)
    typer.echo(f"{counted.images} images in {seconds:.1f} s", err=True)
    if stats is not None:
        typer.echo(stats, err=True)


# Long: the options, one a line, are half of it
def predict(
    context: typer.Context,
    images: Files,
    model: Model = None,
    checkpoint: Checkpoint = None,
    random_weights: RandomWeights = False,
    json_file: JsonFile = None,
    resume: Resume = False,
    output: Output = None,
    score_threshold: ScoreThreshold = 0.3,
    nms: Suppression = Nms.hard,
    iou_threshold: IouThreshold = 0.5,
    class_agnostic: ClassAgnostic = False,
    max_detections: MaxDetections = 100,
    image_size: ImageSize = None,
    batch_size: BatchSize = 1,
    num_classes: NumClasses = 90,
    class_names: ClassNames = None,
    font: Font = None,
    workers: Workers = 2,
    stats: ShowStats = False,
    dtype: DtypeOption = Dtype.float32,
    device: Device = "cpu",
) -> None:
    """Find objects in images and videos.

    Prints what is found in each file, in the order given, while the next ones are read. A file that
    cannot be read is reported and skipped; the exit status is then 1. When interrupted, what was
    found so far is kept; with --resume, the same command then goes on from there.

    Several processes share the files when torchrun starts them, and write one --json FILE:
    torchrun --nproc-per-node 4 -m edet predict photos/ --json found.json
    """
    with one_line_errors():
        where = place()
        json_file = STDOUT if json_file == Path("-") else json_file
        files = find_files(images)
        copies = annotated_names(files, output) if output is not None else {}
        named = [path for path in (checkpoint, class_names, font) if path is not None]
        check_targets([*files, *named], copies, json_file)
        load_font(font, 12)
        predictor = load_predictor(
            model,
            checkpoint,
            random_weights,
            num_classes,
            score_threshold=score_threshold,
            nms=nms,
            iou_threshold=iou_threshold,
            class_agnostic=class_agnostic,
            max_detections=max_detections,
            image_size=image_size,
            batch_size=batch_size,
            class_names=class_names,
            device=where.device(checked_device(device)),
            dtype=dtype.torch,
        )
        if output is not None:
            check_writable(output, "--output", create=True)
        if random_weights:
            typer.echo("Note: the weights are random, the boxes mean nothing.", err=True)
        lacking = missing_glyphs(predictor.label_names.values(), font) if copies else ""
        if lacking:
            typer.echo(f"Note: {glyph_hint(lacking, font, '--font FILE')}", err=True)
        start = time.perf_counter()
        parts = parts_of(json_file, resume, result_options(context.params))
        if parts is None:
            counted = write_found(files, copies, predictor, workers, json_file, font)
        else:
            counted = write_parts(files, copies, predictor, workers, parts, where, font)
        seconds = time.perf_counter() - start
        report(counted, seconds, json_file, output, predictor.stats() if stats else None)
        unread = f"{counted.broken} of {len(files)} files could not be read"
        if counted.interrupted:
            fail(f"interrupted; {unread}", code=130)
        if counted.broken:
            fail(unread, code=1)
