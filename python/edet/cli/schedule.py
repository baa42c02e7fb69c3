"""``edet schedule``: the tiles of a model's BiFPN, as CUDA computes it in one launch."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated

import typer

from edet_kernels.schedule import Schedule, tile_schedule

from ..extras import require
from ..files import replacing
from ..fused.cells import graph_of
from ..models.bifpn import bifpn_nodes
from ..models.configs import ModelConfig
from ..models.factory import model_config
from .common import ModelName, check_picture, one_line_errors, print_table


def of_model(config: ModelConfig, *, batch: int = 1, tile_rows: int = 8) -> Schedule:
    """The schedule of all cells of a model's BiFPN.

    Raises:
        ValueError: it has more nodes than one launch can hold.
        RuntimeError: the op library is not built.
    """
    sizes = config.level_sizes
    graph = graph_of([bifpn_nodes(config.levels)] * config.cells, config.levels)
    node_sizes = [sizes[node.level] for node in graph.nodes]
    return tile_schedule(sizes, graph.edges, node_sizes, batch=batch, tile_rows=tile_rows)


def _name(schedule: Schedule, map_id: int, min_level: int, levels: int) -> str:
    """P3 for an input, P4.12 for node 12 at level 4."""
    if map_id < schedule.inputs:
        return f"P{min_level + map_id}"
    node = map_id - schedule.inputs
    level = bifpn_nodes(levels)[node % (2 * levels - 2)].level
    return f"P{min_level + level}.{node}"


def table(schedule: Schedule, min_level: int, levels: int, blocks: int) -> list[list[str]]:
    """Rows of a table, the first one its header: for each node its tiles and when they run."""
    begins = schedule.run(blocks)
    rows = [["node", "fuses", "map", "tiles", "numbers", "waits for", "begin", "end"]]
    for node, edges in enumerate(schedule.nodes):
        numbers = [i for i, tile in enumerate(schedule.tiles) if tile.node == node]
        h, w = schedule.sizes[node]
        most = max((len(schedule.needs(i)) for i in numbers), default=0)
        rows.append(
            [
                _name(schedule, schedule.inputs + node, min_level, levels),
                " ".join(_name(schedule, e, min_level, levels) for e in edges),
                f"{h}x{w}",
                str(len(numbers)),
                f"{numbers[0]}-{numbers[-1]}",
                f"{most} tiles" if most else "nothing",
                str(min(begins[i] for i in numbers)),
                str(max(begins[i] for i in numbers) + 1),
            ]
        )
    return rows


def draw(schedule: Schedule, path: str | os.PathLike[str], blocks: int, title: str) -> None:
    """Draws which node's tiles run in which step, and how many, to ``path`` (PNG, SVG or PDF).

    Raises:
        ImportError: matplotlib (extra ``plot``) is not installed.
        OSError: the folder does not exist or cannot be written; nothing is left behind.
    """
    figures = require("matplotlib.figure", "plot")
    begins = schedule.run(blocks)
    steps, count = max(begins, default=0) + 1, len(schedule.nodes)
    grid = [[0] * steps for _ in range(count)]
    for tile, begin in zip(schedule.tiles, begins, strict=True):
        grid[tile.node][begin] += 1
    figure = figures.Figure(figsize=(9, 2 + 0.16 * count), layout="constrained")
    axes = figure.add_subplot()
    shown = [[n or float("nan") for n in row] for row in grid]
    image = axes.imshow(shown, aspect="auto", cmap="viridis", interpolation="nearest")
    figure.colorbar(image, label="tiles that begin")
    axes.set_xlabel(f"step, on {blocks} blocks")
    axes.set_ylabel("node")
    chain = schedule.steps()
    axes.set_title(
        f"{title}: {len(schedule.tiles)} tiles in {steps} steps, the longest chain {chain}",
        fontsize=10,
        loc="left",
    )
    with replacing(path) as temporary:
        figure.savefig(temporary, dpi=150)


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
            check_picture(plot)
        config = model_config(model)
        pyramid = of_model(config, batch=batch, tile_rows=tile_rows)
        print_table(table(pyramid, config.min_level, config.levels, blocks))
        typer.echo(
            f"\n{len(pyramid.tiles)} tiles of {tile_rows}x8 pixels; the longest chain is "
            f"{pyramid.steps()} tiles, {blocks} blocks take {pyramid.steps(blocks)} steps"
        )
        if plot is not None:
            draw(pyramid, plot, blocks, f"{model}, batch {batch}")
            typer.echo(plot)
