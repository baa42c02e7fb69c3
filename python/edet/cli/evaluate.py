"""``edet evaluate``: COCO's figures of a checkpoint on a data set, and pictures of them."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from ..detection.postprocess import SCORE_THRESHOLDS
from ..models.configs import get_config
from ..models.described import load_described, read_description
from ..models.efficientdet import EfficientDet
from ..models.factory import create_model
from ..models.pretrained import PRETRAINED, pretrained_file
from ..training import plots
from ..training.datasets import Dataset, open_dataset
from ..training.evaluation import evaluate as evaluate_model
from ..training.formats import DatasetError
from ..training.processes import process_group, start_processes
from .common import (
    Device,
    check_writable,
    checked_device,
    one_line_errors,
    parse_size,
    progress_bar,
    say,
)
from .predict import Nms
from .train import Bad, Data, Images, OnBad

Checkpoint = Annotated[
    Path | None,
    typer.Option("--checkpoint", "-c", help="The weights, as training wrote them.", metavar="FILE"),
]
Model = Annotated[
    str | None,
    typer.Option(
        "--model",
        "-m",
        help="Model of a checkpoint that does not say it, or edet_lite0_person without one.",
        metavar="MODEL",
    ),
]
NumClasses = Annotated[
    int | None,
    typer.Option(help="Classes of such a model; the data's when left out.", min=1, metavar="N"),
]
Split = Annotated[str, typer.Option(help="Of a folder or YAML file.", metavar="NAME")]
Output = Annotated[
    Path | None,
    typer.Option(
        "--output",
        "-o",
        help="Write curves, confusion matrix, figures and the worst images to this folder.",
        metavar="FOLDER",
    ),
]
Worst = Annotated[int, typer.Option(help="Worst images to draw.", min=0, metavar="N")]
ImageSize = Annotated[
    str | None,
    typer.Option(help="The network's input, N or HxW; the checkpoint's when left out."),
]
Suppression = Annotated[Nms, typer.Option(help="Suppression: hard, or gaussian (soft-NMS).")]
BatchSize = Annotated[int, typer.Option(help="Images at once.", min=1, metavar="N")]
Workers = Annotated[int, typer.Option(help="Processes that read ahead.", min=0, metavar="N")]


def load(
    checkpoint: Path | None, model: str | None, num_classes: int, data: Dataset
) -> EfficientDet:
    """The model of a checkpoint, whether it says which one it is or not; or one with its weights.

    Raises:
        ValueError: it does not say it and no option does, there is none, or it is of other classes
            than the data.
    """
    if checkpoint is None:
        checkpoint = None if model is None else pretrained_file(model)
        if checkpoint is None:
            raise ValueError(
                "--checkpoint must be given, but for models that come with their weights "
                f"({', '.join(PRETRAINED)}), got {'no model' if model is None else model}"
            )
        model = None
    if model is not None:
        get_config(model)
    description = read_description(checkpoint)
    if description is None:
        if model is None:
            raise ValueError(
                f"{checkpoint} does not say which model it is of: name it by --model MODEL"
            )
        return create_model(model, num_classes=num_classes, checkpoint=checkpoint)
    if model not in (None, description.config.name):
        raise ValueError(f"--model is {model}, {checkpoint} is of {description.config.name}")
    if description.class_names and description.class_names != data.class_names:
        raise DatasetError(
            f"{checkpoint} has the classes {', '.join(description.class_names)}, the data "
            f"{', '.join(data.class_names)}: they must be the same, in this order"
        )
    return load_described(checkpoint)[0]


def evaluate(
    data: Data,
    checkpoint: Checkpoint = None,
    model: Model = None,
    num_classes: NumClasses = None,
    split: Split = "val",
    images: Images = None,
    bad: OnBad = Bad.refuse,
    output: Output = None,
    worst: Worst = 8,
    image_size: ImageSize = None,
    nms: Suppression = Nms.hard,
    batch_size: BatchSize = 8,
    workers: Workers = 2,
    device: Device = "cpu",
) -> None:
    """Evaluate a checkpoint: COCO's twelve figures and each class' average precision."""
    assert nms.value in SCORE_THRESHOLDS
    with one_line_errors():
        where = start_processes(checked_device(device))
        if output is not None:
            check_writable(output, "--output", create=True)
        opened = open_dataset(data, split, images=images, bad=bad.value)
        classes = len(opened.class_names) if num_classes is None else num_classes
        network = load(checkpoint, model, classes, opened).to(where)
        first = process_group()[0] == 0
        with progress_bar() as progress:
            task = progress.add_task("evaluating", total=len(opened))
            found = evaluate_model(
                network,
                opened,
                image_size=parse_size(image_size),
                nms=nms.value,
                batch_size=batch_size,
                workers=workers,
                progress=(lambda count: progress.advance(task, count)) if first else None,
            )
        if not first:
            return
        say(found)  # the files below are wanted all the same
        if output is not None:
            plots.plot_evaluation(found, opened, output, worst=worst)
            typer.echo(f"Pictures and figures: {output}", err=True)
