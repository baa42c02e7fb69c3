"""The tile schedule of one launch, interpreted once more: every tile once, every read after its
write, an end for any number of blocks. What is read comes from the reference's own resizing."""

from __future__ import annotations

import functools
import itertools
from dataclasses import replace

import pytest
import torch

from edet_kernels import library, reference
from edet_kernels.schedule import TILE_COLUMNS, Schedule, tile_schedule
from edet_kernels.testing.samples import Graph, bifpn_graph

pytestmark = pytest.mark.skipif(not library.load(), reason="needs the op library")

ODD = Graph(
    [(17, 12), (5, 3), (300, 40)],
    [(0, 0, 1), (3, 1), (3, 3), (4, 3, 1), (0, 2), (6, 5), (2, 7)],
    [(9, 6), (17, 12), (9, 6), (5, 3), (17, 12), (17, 30), (34, 30)],
    [9],
)
GRAPHS = {
    "D0": bifpn_graph((64, 64), levels=5, cells=3),
    "D1, not square": bifpn_graph((48, 80), levels=5, cells=1),
    "odd sizes": bifpn_graph((75, 57), levels=5, cells=2),
    "D7x's nodes": bifpn_graph((96, 96), levels=6, cells=1),
    "one pixel": bifpn_graph((1, 1), levels=4, cells=2),
    "any": ODD,
}
graphs = pytest.mark.parametrize("graph", GRAPHS.values(), ids=GRAPHS)


@functools.cache
def influence(source: int, out: int, pooled: bool, pool: str) -> torch.Tensor:
    """(source, out): which positions of an axis change which ones of its resized map."""
    other, other_out = (2, 1) if pooled else (1, 1)  # the other axis decides for pooling
    x = torch.eye(source)[:, None, :, None].expand(-1, 1, -1, other)
    return reference.resize(x, (out, other_out), pool)[:, 0, :, 0] > 0


def positions(source: int, out: int, pooled: bool, pool: str, first: int, count: int) -> set[int]:
    """Positions of a source that ``count`` outputs from ``first`` on and their halo read."""
    outs = slice(max(first - 1, 0), min(first + count + 1, out))
    return set(influence(source, out, pooled, pool)[:, outs].any(1).nonzero()[:, 0].tolist())


def interpret(graph: Graph, schedule: Schedule, batch: int, pool: str, slices: int) -> None:
    """Checks a schedule tile by tile."""
    first = len(graph.input_sizes)
    extents = [*graph.input_sizes, *graph.sizes]
    done: dict[int, int] = {}  # slices of each flag
    flags: dict[tuple[int, int, int, int], int] = {}
    seen = set()
    for tile in schedule.tiles:
        h, w = graph.sizes[tile.node]
        y, x = tile.row * schedule.tile_rows, tile.column * TILE_COLUMNS
        assert y < h and x < w and tile.image < batch and tile.slice < slices
        place = (tile.node, tile.image, tile.row, tile.column)
        assert (*place, tile.slice) not in seen
        seen.add((*place, tile.slice))
        assert flags.setdefault(place, tile.flag) == tile.flag
        waited = set()
        for wait in tile.waits:
            for row, column in itertools.product(range(*wait.rows), range(*wait.columns)):
                other = (wait.node, tile.image, row, column)
                # a flag that never reaches its value, or not before this, is a deadlock
                assert done.get(flags[other]) == wait.slices == slices
                waited.add(other)
        needed = set()
        for edge in graph.nodes[tile.node]:
            if edge < first:
                continue
            eh, ew = extents[edge]
            pooled = eh > h or ew > w
            rows = positions(eh, h, pooled, pool, y, schedule.tile_rows)
            columns = positions(ew, w, pooled, pool, x, TILE_COLUMNS)
            needed |= {
                (edge - first, tile.image, r // schedule.tile_rows, c // TILE_COLUMNS)
                for r, c in itertools.product(rows, columns)
            }
        assert waited == needed
        done[tile.flag] = done.get(tile.flag, 0) + 1
    assert len(set(flags.values())) == len(flags)
    pixels = sum(h * w for h, w in graph.sizes)
    covered = 0
    for node, _, row, column, _ in seen:
        h, w = graph.sizes[node]
        rows = min(h - row * schedule.tile_rows, schedule.tile_rows)
        covered += rows * min(w - column * TILE_COLUMNS, TILE_COLUMNS)
    assert covered == batch * slices * pixels


@graphs
@pytest.mark.parametrize(("tile_rows", "batch", "slices"), [(8, 1, 1), (4, 2, 1), (8, 1, 3)])
@pytest.mark.parametrize("pool", ["same", "symmetric"])
def test_every_read_follows_its_write(graph, tile_rows, batch, slices, pool):
    options = {"batch": batch, "pool": pool, "tile_rows": tile_rows, "slices": slices}
    schedule = tile_schedule(graph.input_sizes, graph.nodes, graph.sizes, **options)
    interpret(graph, schedule, batch, pool, slices)


@graphs
def test_any_number_of_blocks_comes_to_the_end(graph):
    schedule = tile_schedule(graph.input_sizes, graph.nodes, graph.sizes)
    chain = schedule.steps()
    for blocks in (1, 2, 3, 7, 132, 264):
        begins = schedule.run(blocks)
        assert max(begins.count(step) for step in set(begins)) <= blocks
        for number, begin in enumerate(begins):
            assert all(begins[other] < begin for other in schedule.needs(number))
        assert max(chain, -(-len(schedule.tiles) // blocks)) <= schedule.steps(blocks)
    assert schedule.steps(1) == len(schedule.tiles)


def test_an_interpreter_that_sees_mistakes():
    graph = GRAPHS["D1, not square"]
    schedule = tile_schedule(graph.input_sizes, graph.nodes, graph.sizes)
    backwards = Schedule(schedule.tiles[::-1], 5, schedule.nodes, schedule.sizes, 8)
    with pytest.raises((AssertionError, KeyError)):
        interpret(graph, backwards, 1, "same", 1)
    for lost in (20, len(schedule.tiles) - 1):
        tiles = list(schedule.tiles)
        tiles[lost] = replace(tiles[lost], waits=tiles[lost].waits[1:])
        with pytest.raises(AssertionError):
            interpret(graph, replace(schedule, tiles=tuple(tiles)), 1, "same", 1)


def test_the_longest_chain_of_a_cell():
    # four nodes down, five up: each waits for the one before
    graph = bifpn_graph((8, 8), levels=5, cells=1)
    assert tile_schedule(graph.input_sizes, graph.nodes, graph.sizes).steps() == 8
    # P3 of D0 is 64 tiles
    graph = GRAPHS["D0"]
    schedule = tile_schedule(graph.input_sizes, graph.nodes, graph.sizes)
    assert sum(tile.node == 3 for tile in schedule.tiles) == 64


def test_empty_and_too_large_graphs():
    assert tile_schedule([(4, 4)], [(0,)], [(4, 4)], batch=0).tiles == ()
    with pytest.raises(ValueError, match="nodes must fit into one launch"):
        tile_schedule([(4, 4)], [(0,)] * 81, [(4, 4)] * 81)
