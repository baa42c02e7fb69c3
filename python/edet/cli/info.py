"""``edet info``: a model's size, and which kernels it will run on and why."""

from __future__ import annotations

from typing import Annotated

import typer

import edet_kernels

from ..bench import count_operations, eager_copy
from ..models.counts import Counts, count_macs, count_parameters
from ..models.factory import create_model
from .common import (
    Device,
    Dtype,
    DtypeOption,
    ModelName,
    checked_device,
    one_line_errors,
    print_table,
)


def info(
    model: Annotated[str, ModelName] = "tf_efficientdet_d0",
    num_classes: Annotated[
        int | None, typer.Option(help="Classes; the model's own when left out.", min=1, metavar="N")
    ] = None,
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
