"""The tile schedule of a node graph that CUDA computes in one launch, as data: what each tile waits
for, and how long a number of blocks takes for it."""

from __future__ import annotations

import ctypes
import functools
import heapq
from collections.abc import Sequence
from dataclasses import dataclass

from . import library
from .names import POOLS, Size

#: Columns of pixels of a tile (csrc/core/tile_schedule.h).
TILE_COLUMNS = 8


@dataclass(frozen=True)
class Wait:
    """Tiles of one image of a node that must be done before another begins.

    Attributes:
        node: whose tiles.
        rows, columns: of tiles, from the first to before the second.
        slices: that each tile's flag must have counted.
    """

    node: int
    rows: tuple[int, int]
    columns: tuple[int, int]
    slices: int


@dataclass(frozen=True)
class Tile:
    """What a block computes at once.

    Attributes:
        node, image: whose map.
        row, column: of tiles.
        slice: part of the output channels.
        flag: the number of the flag it adds one to.
        waits: for what is read, one entry for each edge from another node.
    """

    node: int
    image: int
    row: int
    column: int
    slice: int
    flag: int
    waits: tuple[Wait, ...]


@dataclass(frozen=True)
class Schedule:
    """Tiles in the order in which blocks claim them.

    Attributes:
        tiles: those of all nodes and images.
        inputs: number of input maps; a node's edges count them first.
        nodes: for each node the ids it fuses.
        sizes: for each node its (H, W).
        tile_rows: rows of pixels of a tile.
    """

    tiles: tuple[Tile, ...]
    inputs: int
    nodes: tuple[tuple[int, ...], ...]
    sizes: tuple[Size, ...]
    tile_rows: int

    @functools.cached_property
    def _last(self) -> dict[tuple[int, int, int, int], list[int]]:
        """Numbers of the slices of each tile, by node, image, row and column."""
        numbers: dict[tuple[int, int, int, int], list[int]] = {}
        for number, t in enumerate(self.tiles):
            numbers.setdefault((t.node, t.image, t.row, t.column), []).append(number)
        return numbers

    def needs(self, number: int) -> list[int]:
        """Numbers of the tiles that tile ``number`` waits for."""
        tile = self.tiles[number]
        return [
            other
            for wait in tile.waits
            for row in range(*wait.rows)
            for column in range(*wait.columns)
            for other in self._last[wait.node, tile.image, row, column]
        ]

    def run(self, blocks: int | None = None) -> list[int]:
        """When each tile begins, in steps of one tile, on ``blocks`` blocks (None: any number).

        As on a GPU, a block claims the next tile and holds it until what it waits for is done.
        """
        begins: list[int] = []
        free = [0] * (len(self.tiles) if blocks is None else blocks)
        for number in range(len(self.tiles)):
            ready = max((begins[other] + 1 for other in self.needs(number)), default=0)
            begins.append(max(ready, heapq.heappop(free)))
            heapq.heappush(free, begins[-1] + 1)
        return begins

    def steps(self, blocks: int | None = None) -> int:
        """How many steps ``blocks`` blocks take; the longest chain of tiles for None."""
        return max((begin + 1 for begin in self.run(blocks)), default=0)


def tile_schedule(
    input_sizes: Sequence[Size],
    nodes: Sequence[Sequence[int]],
    sizes: Sequence[Size],
    *,
    batch: int = 1,
    pool: str = "same",
    tile_rows: int = 8,
    slices: int | Sequence[int] = 1,
) -> Schedule:
    """The schedule by which CUDA computes a node graph in one launch, from the code that it runs.

    Args:
        input_sizes: (H, W) of each input.
        nodes, sizes, pool: as for :func:`edet_kernels.bifpn`.
        batch: images.
        tile_rows: rows of a tile, 8, or 4 where maps are small; it has 8 columns.
        slices: parts that the output channels are cut into, of all nodes or of each.

    Raises:
        ValueError: the graph has more nodes or edges than one launch can hold.
        RuntimeError: the op library is not built.
    """
    if not library.load():
        raise RuntimeError(library.status())
    counts = [len(edges) for edges in nodes]
    parts = [slices] * len(nodes) if isinstance(slices, int) else list(slices)

    def ints(values: Sequence[int]) -> ctypes.Array[ctypes.c_int]:
        return (ctypes.c_int * max(len(values), 1))(*values)

    graph = (
        len(input_sizes),
        ints([n for size in input_sizes for n in size]),
        len(nodes),
        ints([n for size in sizes for n in size]),
        ints(counts),
        ints([e for edges in nodes for e in edges]),
        ints(parts),
        batch,
        POOLS.index(pool),
        tile_rows,
    )
    function = library.symbol("edet_tile_schedule")
    function.restype = ctypes.c_int64
    wait_count = ctypes.c_int64()
    count = function(*graph, None, None, ctypes.byref(wait_count))
    if count < 0:
        raise ValueError(
            f"nodes must fit into one launch (80 nodes, 192 edges, 16 inputs), got {len(nodes)} "
            f"nodes with {sum(counts)} edges of {len(input_sizes)} inputs"
        )
    rows = ints([0] * 6 * count)
    wait_rows = ints([0] * 7 * wait_count.value)
    function(*graph, rows, wait_rows, ctypes.byref(wait_count))
    waits: list[list[Wait]] = [[] for _ in range(count)]
    for i in range(wait_count.value):
        tile, node, row0, row1, column0, column1, done = wait_rows[7 * i : 7 * i + 7]
        waits[tile].append(Wait(node, (row0, row1), (column0, column1), done))
    tiles = []
    for i in range(count):
        node, image, row, column, part, flag = rows[6 * i : 6 * i + 6]
        tiles.append(Tile(node, image, row, column, part, flag, tuple(waits[i])))
    return Schedule(
        tuple(tiles),
        len(input_sizes),
        tuple(map(tuple, nodes)),
        tuple((h, w) for h, w in sizes),
        tile_rows,
    )
