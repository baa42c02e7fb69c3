"""``edet triton-repository``: a folder that NVIDIA Triton Inference Server serves a model from."""

from __future__ import annotations

import json
import os
import re
import secrets
import shutil
from pathlib import Path
from typing import Annotated

import typer

from ..detection.labels import label_name
from ..detection.predictor import Predictor
from ..models.described import save_described
from ..models.pretrained import PRETRAINED
from .common import Dtype, DtypeOption, NumClasses, check_writable, one_line_errors
from .predict import (
    Checkpoint,
    ClassAgnostic,
    ClassNames,
    ImageSize,
    IouThreshold,
    MaxDetections,
    Nms,
    ScoreThreshold,
    Suppression,
    load_predictor,
)

#: The server's model.py. The class it looks for is the package's, and is upgraded with it.
MODEL_PY = '''"""What Triton's Python backend runs; written by edet triton-repository."""

from edet.serving import TritonPythonModel

__all__ = ["TritonPythonModel"]
'''

CONFIG = """\
# Written by edet triton-repository; edet.serving.TritonPythonModel says what the tensors hold.
name: {name}
backend: "python"
max_batch_size: {batch_size}
input [
  {{ name: "image" data_type: TYPE_STRING dims: [ 1 ] }}
]
output [
  {{ name: "boxes" data_type: TYPE_FP32 dims: [ {most}, 4 ] }},
  {{ name: "scores" data_type: TYPE_FP32 dims: [ {most} ] }},
  {{ name: "labels" data_type: TYPE_INT64 dims: [ {most} ] }},
  {{ name: "names" data_type: TYPE_STRING dims: [ {most} ] }},
  {{ name: "count" data_type: TYPE_INT32 dims: [ 1 ] }}
]
instance_group [
  {{ count: {instances} kind: {kind} }}
]
dynamic_batching {{ max_queue_delay_microseconds: {delay} }}
{parameters}
"""

PARAMETER = """\
parameters {{
  key: "{key}"
  value {{ string_value: "{value}" }}
}}"""


def config_text(
    predictor: Predictor,
    dtype: Dtype,
    *,
    name: str,
    gpu: bool,
    instances: int,
    threads: int,
    workers: int,
    delay: int,
) -> str:
    """The server's config.pbtxt for ``predictor``."""
    height, width = predictor.image_size
    parameters: dict[str, object] = {
        "checkpoint": "model.pt",
        "score_threshold": predictor.score_threshold,
        "nms": predictor.nms,
        "iou_threshold": predictor.iou_threshold,
        "class_agnostic": str(predictor.class_agnostic).lower(),
        "max_detections": predictor.max_detections,
        "image_height": height,
        "image_width": width,
        "dtype": dtype.value,
        "threads": threads,
        "workers": workers,
    }
    return CONFIG.format(
        name=json.dumps(name),
        batch_size=predictor.batch_size,
        most=predictor.max_detections,
        instances=instances,
        kind="KIND_GPU" if gpu else "KIND_CPU",
        delay=delay,
        parameters="\n".join(PARAMETER.format(key=k, value=v) for k, v in parameters.items()),
    )


def write_model(folder: Path, predictor: Predictor, config: str) -> None:
    """Writes a model's folder; a server that looks never sees half of it."""
    half = folder.with_name(f".{secrets.token_hex(4)}")
    try:
        (half / "1").mkdir(parents=True)
        (half / "1" / "model.py").write_text(MODEL_PY, encoding="utf-8")
        labels = range(1, predictor.model.config.num_classes + 1)
        save_described(
            predictor.model,
            half / "1" / "model.pt",
            class_names=[label_name(label, predictor.label_names) for label in labels],
        )
        (half / "config.pbtxt").write_text(config, encoding="utf-8")
        os.rename(half, folder)
    except BaseException:
        shutil.rmtree(half, ignore_errors=True)
        raise


def triton_repository(
    model: Annotated[
        str,
        typer.Argument(
            help="A checkpoint of edet train, a model that comes with its weights "
            f"({', '.join(PRETRAINED)}), or a name that 'edet models' lists, with --checkpoint.",
            metavar="MODEL",
        ),
    ],
    output: Annotated[
        Path,
        typer.Option("--output", "-o", help="The server's model repository.", metavar="FOLDER"),
    ],
    checkpoint: Checkpoint = None,
    name: Annotated[
        str, typer.Option("--name", help="What clients ask for.", metavar="NAME")
    ] = "edet",
    gpu: Annotated[bool, typer.Option("--gpu", help="Run on GPUs: an instance on each.")] = False,
    instances: Annotated[
        int, typer.Option(help="Processes; on CPUs, cores / threads.", min=1, metavar="N")
    ] = 1,
    threads: Annotated[
        int, typer.Option(help="CPU threads of each; 0: as PyTorch has it.", min=0, metavar="N")
    ] = 1,
    workers: Annotated[
        int, typer.Option(help="Threads that decode pictures.", min=1, metavar="N")
    ] = 2,
    batch_size: Annotated[
        int, typer.Option(help="Images that the server may run at once.", min=1, metavar="N")
    ] = 8,
    delay: Annotated[
        int, typer.Option(help="Microseconds to wait for more of them.", min=0, metavar="N")
    ] = 0,
    score_threshold: ScoreThreshold = 0.3,
    nms: Suppression = Nms.hard,
    iou_threshold: IouThreshold = 0.5,
    class_agnostic: ClassAgnostic = False,
    max_detections: MaxDetections = 100,
    image_size: ImageSize = None,
    num_classes: NumClasses = 90,
    class_names: ClassNames = None,
    dtype: DtypeOption = Dtype.float32,
) -> None:
    """Write a model repository for NVIDIA Triton Inference Server.

    Clients send picture files and get boxes, scores, labels and names. The server's Python backend
    runs it, in an environment that has edet-kernels[image].
    """
    with one_line_errors():
        if not re.fullmatch(r"\w[\w.-]*", name, re.ASCII):
            raise ValueError(f"--name must be letters, digits and ._-, got {name!r}")
        if (output / name).exists():
            raise ValueError(f"--output: {output / name} exists: remove it or give another --name")
        predictor = load_predictor(
            model,
            checkpoint,
            False,
            num_classes,
            score_threshold=score_threshold,
            nms=nms,
            iou_threshold=iou_threshold,
            class_agnostic=class_agnostic,
            max_detections=max_detections,
            image_size=image_size,
            batch_size=batch_size,
            class_names=class_names,
        )
        check_writable(output, "--output", create=True)
        text = config_text(
            predictor,
            dtype,
            name=name,
            gpu=gpu,
            instances=instances,
            threads=threads,
            workers=workers,
            delay=delay,
        )
        write_model(output / name, predictor, text)
        typer.echo(f"Model {name} for tritonserver --model-repository={output}", err=True)
