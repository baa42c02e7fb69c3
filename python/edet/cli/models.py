"""``edet models``: the models there are."""

from __future__ import annotations

import typer

from ..models.configs import get_config, list_models
from ..models.pretrained import PRETRAINED
from .common import print_table


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
    for name, finds in PRETRAINED.items():
        typer.echo(f"{name} comes with its weights and finds {finds}.")
