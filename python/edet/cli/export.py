"""``edet export``: a detector in one file for ONNX runtimes, AOTInductor or torch.export."""

from __future__ import annotations

from enum import Enum
from pathlib import Path
from typing import Annotated

import typer

from ..deploy import FORMATS
from ..deploy import export as export_model
from ..detection.predictor import Predictor
from .common import (
    Device,
    Dtype,
    DtypeOption,
    NumClasses,
    check_target,
    checked_device,
    one_line_errors,
)
from .predict import (
    Checkpoint,
    ClassAgnostic,
    ClassNames,
    ImageSize,
    IouThreshold,
    MaxDetections,
    Nms,
    RandomWeights,
    ScoreThreshold,
    Suppression,
    load_predictor,
)
from .targets import check_targets


class Format(str, Enum):
    """Kinds of files."""

    onnx = "onnx"
    aoti = "aoti"
    torch = "torch"


Model = Annotated[
    str | None,
    typer.Argument(
        help="A name that 'edet models' lists, edet_lite0_person, or a checkpoint of edet train. "
        "It may be left out when the checkpoint says it.",
        metavar="MODEL",
    ),
]
Output = Annotated[
    Path,
    typer.Option(
        "--output", "-o", help="The file to write: .onnx, or .pt2 for the others.", metavar="FILE"
    ),
]
FileFormat = Annotated[
    Format,
    typer.Option(
        "--format",
        "-f",
        help="onnx: standard operators, for ONNX Runtime, OpenVINO, TensorRT. aoti: compiled by "
        "AOTInductor, for C++ and Python with libtorch and libedet_kernels.so. torch: a program "
        "of torch.export.",
    ),
]
BatchSize = Annotated[
    int | None,
    typer.Option(help="Images at once; any number when left out.", min=1, metavar="N"),
]
Postprocess = Annotated[
    bool,
    typer.Option(
        "--postprocess/--no-postprocess",
        help="End with detections, or with the outputs of the heads.",
    ),
]
MaxCandidates = Annotated[
    int,
    typer.Option(
        help="Anchors x classes that enter suppression; TensorRT takes 3840 at most.",
        min=1,
        metavar="N",
    ),
]


def interface_lines(predictor: Predictor, batch_size: int | None, postprocess: bool) -> list[str]:
    """What goes into an exported file and comes out of it, a line each."""
    batch = "B" if batch_size is None else str(batch_size)
    height, width = predictor.image_size
    lines = [f"in:  images ({batch}, 3, {height}, {width}) uint8, letterboxed RGB"]
    if not postprocess:
        config = predictor.model.config
        first, last = config.min_level, config.max_level
        outputs = [
            f"{part}_p{first} ... {part}_p{last} {what}"
            for part, what in (("class", "logits"), ("box", "regressions"))
        ]
        return [*lines, f"out: {', '.join(outputs)}"]
    most = predictor.max_detections
    return [
        *lines,
        f"     sizes ({batch}, 2) int64, height and width of each image before",
        f"out: boxes ({batch}, {most}, 4) float32, scores ({batch}, {most}) float32, "
        f"labels ({batch}, {most}) int64, counts ({batch}) int64",
    ]


def export(
    output: Output,
    model: Model = None,
    checkpoint: Checkpoint = None,
    format: FileFormat = Format.onnx,
    postprocess: Postprocess = True,
    image_size: ImageSize = None,
    batch_size: BatchSize = None,
    score_threshold: ScoreThreshold = 0.3,
    nms: Suppression = Nms.hard,
    iou_threshold: IouThreshold = 0.5,
    class_agnostic: ClassAgnostic = False,
    max_detections: MaxDetections = 100,
    max_candidates: MaxCandidates = 5000,
    num_classes: NumClasses = 90,
    class_names: ClassNames = None,
    random_weights: RandomWeights = False,
    dtype: DtypeOption = Dtype.float32,
    device: Device = "cpu",
) -> None:
    """Write a detector for another runtime: one file from pixels to boxes.

    The file finds what 'edet predict' finds. Its height and width are fixed: write a file for each
    size. docs/deployment.md shows how to run each format.
    """
    with one_line_errors():
        if output.suffix != FORMATS[format.value]:
            raise ValueError(
                f"--output must end in {FORMATS[format.value]} with --format {format.value}, "
                f"got {output}"
            )
        check_target(output, "--output")
        named = [Path(path) for path in (model, checkpoint, class_names) if path is not None]
        check_targets(named, {output: output}, None)
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
            class_names=class_names,
            device=checked_device(device),
            dtype=dtype.torch,
        )
        export_model(
            predictor,
            output,
            format=format.value,
            batch_size=batch_size,
            postprocess=postprocess,
            max_candidates=max_candidates,
        )
        typer.echo(f"{output}: {output.stat().st_size / 1e6:.1f} MB")
        for line in interface_lines(predictor, batch_size, postprocess):
            typer.echo(line)
