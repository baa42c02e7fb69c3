"""``edet train``: a data set to a checkpoint, on one process or on those of torchrun."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterator
from enum import Enum
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

from ..models.backbones import load_backbone
from ..models.detectors import load_detector
from ..models.efficientdet import EfficientDet
from ..models.factory import create_model, model_config
from ..models.pretrained import PRETRAINED
from ..training import plots
from ..training.augment import Augmentation
from ..training.datasets import Dataset, open_dataset
from ..training.fit import BEST, LAST, LOG, History
from ..training.formats import DatasetError
from ..training.logs import Event
from ..training.processes import process_group, start_processes
from ..training.trainer import NotFiniteError, Trainer
from .common import Device, Dtype, checked_device, fail, one_line_errors, parse_size, say

#: Exit status of a run that Ctrl-C ended, as shells have it.
INTERRUPTED = 130


class Optimizer(str, Enum):
    """Optimisers of :class:`edet.training.Trainer`."""

    sgd = "sgd"
    adamw = "adamw"


class Part(str, Enum):
    """What can be frozen."""

    backbone = "backbone"
    norms = "norms"


class Bad(str, Enum):
    """What becomes of images and boxes that cannot be used."""

    refuse = "refuse"
    skip = "skip"


Data = Annotated[
    Path,
    typer.Argument(
        help="COCO .json, YOLO data.yaml, or a folder with one of them or with Pascal VOC's.",
        metavar="DATA",
    ),
]
Validation = Annotated[
    Path | None,
    typer.Option(help="Data to evaluate on; DATA's split val when it has one.", metavar="DATA"),
]
Images = Annotated[
    Path | None, typer.Option(help="Folder of a COCO file's images.", metavar="FOLDER")
]
OnBad = Annotated[
    Bad, typer.Option("--bad", help="Images and boxes that cannot be used: refuse, or skip.")
]
Output = Annotated[
    Path,
    typer.Option(
        "--output", "-o", help="Folder for checkpoints, logs and pictures.", metavar="FOLDER"
    ),
]
Model = Annotated[
    str, typer.Option("--model", "-m", help="A name that 'edet models' lists.", metavar="MODEL")
]
Start = Annotated[
    Path | None,
    typer.Option(
        "--checkpoint",
        "-c",
        help="Detector to start from; of another number of classes, its class prediction is new.",
        metavar="FILE",
    ),
]
Backbone = Annotated[
    str | None,
    typer.Option(
        help="Classifier to start from: a file with timm's, torchvision's or lukemelas' names, or "
        "'imagenet' for the packages with Lite's (extras lite0, lite1, lite2; D0 takes Lite0's).",
        metavar="FILE",
    ),
]
Epochs = Annotated[int, typer.Option(help="Times every image is seen.", min=1, metavar="N")]
BatchSize = Annotated[
    int, typer.Option(help="Images of a step, over all processes.", min=1, metavar="N")
]
LearningRate = Annotated[
    float | None,
    typer.Option(
        "--learning-rate", "--lr", help="The highest; see docs/training.md when left out.", min=0
    ),
]
Choice = Annotated[Optimizer, typer.Option(help="Optimiser: sgd as published, or adamw.")]
ImageSize = Annotated[
    str | None,
    typer.Option(help="The network's input, N or HxW; the model's when left out.", metavar="N"),
]
Strength = Annotated[
    float,
    typer.Option(
        help="Strength of flips and scale jitter: 0 none, 1 as published.",
        min=0,
        max=1,
        metavar="S",
    ),
]
Colour = Annotated[
    float,
    typer.Option(
        help="Brightness, contrast and saturation change by up to this part.",
        min=0,
        max=1,
        metavar="S",
    ),
]
Mosaic = Annotated[
    float,
    typer.Option(
        help="Part of the images that become mosaics of four; none in the last fifth of the "
        "epochs.",
        min=0,
        max=1,
        metavar="P",
    ),
]
WeightDecay = Annotated[
    float | None,
    typer.Option(help="Of the convolutions' weights; as published when left out.", min=0),
]
Precision = Annotated[Dtype, typer.Option(help="Autocast to this precision.")]
Accumulate = Annotated[
    int, typer.Option(help="Parts a batch is computed in, to take less memory.", min=1, metavar="N")
]
Freeze = Annotated[
    list[Part] | None, typer.Option(help="Leave as it is: backbone, norms; may be repeated.")
]
Workers = Annotated[int, typer.Option(help="Processes that read ahead.", min=0, metavar="N")]
Seed = Annotated[int, typer.Option(help="Of weights, order and augmentation.", min=0, metavar="N")]
Every = Annotated[int, typer.Option(help="Epochs between evaluations.", min=1, metavar="N")]
Patience = Annotated[
    int | None,
    typer.Option(help="Evaluations without a better AP that end the run.", min=1, metavar="N"),
]
SaveMinutes = Annotated[
    float, typer.Option(help="Between checkpoints within an epoch.", min=0, metavar="MIN")
]
Resume = Annotated[
    bool, typer.Option("--resume", help="Go on from the folder's last.pt, if it is there.")
]
TensorBoardOption = Annotated[
    bool, typer.Option("--tensorboard", help="Write for TensorBoard too, into the folder.")
]


def open_data(
    data: Path, validation: Path | None, images: Path | None, bad: str
) -> tuple[Dataset, Dataset | None]:
    """The data to learn, and to evaluate on where there are any.

    Raises:
        ValueError, OSError: what cannot be used.
    """
    learnt = open_dataset(data, "train", images=images, bad=bad)
    if validation is not None:
        names = learnt.class_names
        return learnt, open_dataset(validation, "val", images=images, bad=bad, class_names=names)
    if not data.is_dir() and data.suffix == ".json":
        return learnt, None
    try:
        return learnt, open_dataset(data, "val", images=images, bad=bad)
    except DatasetError as error:
        if "split 'val'" in str(error) or "has no 'val'" in str(error):
            return learnt, None
        raise


def new_model(
    name: str,
    classes: int,
    size: tuple[int, int] | None,
    checkpoint: Path | None,
    backbone: str | None,
) -> EfficientDet:
    """The model that the options ask for, with the weights it starts from.

    Raises:
        ValueError: both kinds of weights, or a file that does not fit.
    """
    model_config(name)
    if checkpoint is not None and backbone is not None:
        raise ValueError("--checkpoint and --backbone exclude each other")
    model = create_model(name, num_classes=classes, image_size=size, reinit_head=True)
    if name in PRETRAINED and checkpoint is None and backbone is None:
        announce(f"Starts from the weights that come with {name}")
    if checkpoint is not None:
        prediction = model.class_net.predict.conv_pw.weight
        before = prediction.detach().clone()
        load_detector(model, checkpoint, reinit_head=True)
        same = torch.equal(prediction, before)
        announce(
            f"Starts from {checkpoint}{'; its class prediction is trained anew' if same else ''}"
        )
    if backbone is not None:
        load_backbone(model, None if backbone == "imagenet" else backbone)
    return model


def announce(message: object) -> None:
    """Prints in the first process."""
    if process_group()[0] == 0:
        say(message)


class Screen:
    """A callback that shows a run: a bar on a terminal, one line for each epoch anywhere."""

    def __init__(self) -> None:
        console = Console(stderr=True)
        self._progress = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TimeRemainingColumn(),
            TextColumn("{task.fields[values]}"),
            console=console,
            disable=not console.is_terminal,
            transient=True,
            redirect_stdout=sys.stdout.isatty(),  # lines come above the bar; a pipe gets them plain
        )
        self._task = self._progress.add_task("", values="")

    @contextlib.contextmanager
    def shown(self) -> Iterator[Screen]:
        """Shows the bar in the block."""
        with self._progress:
            yield self

    def __call__(self, event: Event) -> None:
        values = event.values
        if event.kind == "step":
            text = (
                f"loss {values['loss']:.3f}  lr {values['learning_rate']:.2g}  "
                f"gradient {values['gradient_norm']:.2g}  "
                f"{values['images_per_second']:.3g} images/s"
            )
            self._progress.update(
                self._task,
                description=f"epoch {event.epoch}/{event.epochs}",
                completed=event.step,
                total=event.steps,
                values=text + (f"  {event.skipped} left out" if event.skipped else ""),
            )
        elif event.kind == "epoch":
            text = (
                f"epoch {event.epoch}/{event.epochs}: loss {values['loss']:.4f} (classes "
                f"{values['class_loss']:.4f}, boxes {values['box_loss']:.5f}), "
                f"lr {values['learning_rate']:.3g}"
            )
            if "AP" in values:
                text += f", AP {values['AP']:.4f}, AP50 {values['AP50']:.4f}"
            say(text)  # the run goes on when its reader has left


def _finish(history: History, data: Dataset | None, folder: Path, steps: int) -> None:
    """Says what came out, and draws it."""
    if history.interrupted:
        typer.echo(f"Stopped at step {steps}; go on with --resume", err=True)
    if history.evaluation is not None:
        say(history.evaluation)
    try:
        if history.rows:
            plots.plot_history(history.rows, folder / "curves.png", str(folder))
        if history.evaluation is not None and data is not None:
            plots.plot_evaluation(history.evaluation, data, folder / "evaluation")
    except ImportError as error:
        typer.echo(f"Note: no pictures: {error}", err=True)
    names = [name for name in (BEST, LAST, LOG, "curves.png") if (folder / name).exists()]
    typer.echo(f"In {folder}: {', '.join(names)}", err=True)


def run(
    data: tuple[Dataset, Dataset | None],
    model: EfficientDet,
    folder: Path,
    trainer_options: dict[str, Any],
    fit_options: dict[str, Any],
) -> None:
    """Trains, shows how it goes, and ends with what came out."""
    first = process_group()[0] == 0
    screen = Screen()
    trainer = Trainer(model, **trainer_options)
    options = {"folder": folder, "validation": data[1]} | fit_options
    with screen.shown() if first else contextlib.nullcontext():
        history = trainer.fit(data[0], callbacks=[screen] if first else [], **options)
    if first:
        _finish(history, data[1], folder, trainer.step_count)
    if history.interrupted:
        raise typer.Exit(INTERRUPTED)


def train(
    data: Data,
    output: Output = Path("run"),
    validation: Validation = None,
    images: Images = None,
    bad: OnBad = Bad.refuse,
    model: Model = "tf_efficientdet_d0",
    checkpoint: Start = None,
    backbone: Backbone = None,
    epochs: Epochs = 50,
    batch_size: BatchSize = 8,
    learning_rate: LearningRate = None,
    optimizer: Choice = Optimizer.sgd,
    image_size: ImageSize = None,
    augmentation: Strength = 1.0,
    colour: Colour = 0.0,
    mosaic: Mosaic = 0.0,
    weight_decay: WeightDecay = None,
    precision: Precision = Dtype.float32,
    accumulate: Accumulate = 1,
    freeze: Freeze = None,
    workers: Workers = 2,
    seed: Seed = 0,
    evaluate_every: Every = 1,
    patience: Patience = None,
    save_minutes: SaveMinutes = 10.0,
    resume: Resume = False,
    tensorboard: TensorBoardOption = False,
    device: Device = "cpu",
) -> None:
    """Train a model on your own images.

    Writes last.pt, and best.pt by the average precision of the validation data, into the output
    folder: 'edet predict -c run/best.pt' needs nothing else. Ctrl-C keeps what there is; the same
    command with --resume goes on, also after a crash. On several GPUs: torchrun --nproc-per-node 4
    -m edet train ... --device cuda
    """
    with one_line_errors():
        try:
            where = start_processes(checked_device(device))
            torch.manual_seed(seed)
            opened = open_data(data, validation, images, bad.value)
            for dataset in opened:
                announce(dataset.report if dataset else "Note: no data to evaluate on")
            classes = len(opened[0].class_names)
            network = new_model(model, classes, parse_size(image_size), checkpoint, backbone)
            trainer_options = {
                "batch_size": batch_size,
                "learning_rate": learning_rate,
                "optimizer": optimizer.value,
                "weight_decay": weight_decay,
                "precision": precision.value,
                "accumulate": accumulate,
                "freeze": [part.value for part in freeze or ()],
            }
            fit_options = {
                "epochs": epochs,
                "augmentation": Augmentation.of_strength(augmentation, colour=colour, mosaic=mosaic)
                if augmentation or colour or mosaic
                else None,
                "workers": workers,
                "seed": seed,
                "evaluate_every": evaluate_every,
                "patience": patience,
                "save_minutes": save_minutes,
                "resume": resume,
                "tensorboard": tensorboard,
            }
            run(opened, network.to(where), output, trainer_options, fit_options)
        except NotFiniteError as error:
            fail(error, code=1)
