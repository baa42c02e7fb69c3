"""Reading ahead: threads that fetch what an endless iterable names while its results are used."""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, TypeVar

_Item = TypeVar("_Item")
_Read = TypeVar("_Read")

#: Errors of one item, which is reported in its place; any other one ends the iteration.
ITEM_ERRORS = (OSError, ValueError, TypeError)


def read_ahead(
    items: Iterable[_Item], read: Callable[[int, _Item], _Read], workers: int, batch: int
) -> Iterator[list[tuple[_Item, _Read | Exception]]]:
    """Batches of items and what ``read`` made of each, in order.

    A thread goes through ``items`` and ``workers`` threads read them while the batch before is
    used; no more wait at a time than two for each worker and one batch.

    Args:
        items: any iterable, also an endless one.
        read: called with the number of an item and the item.
        workers: threads that read.
        batch: items yielded at once; the last time, those that are left.

    Yields:
        for each item of a batch the item and its result, or one of :data:`ITEM_ERRORS` that reading
        it raised.

    Raises:
        Exception: whatever iterating over ``items`` raises, after what came before it.
    """
    waiting: queue.Queue[tuple[_Item, Future[_Read]] | None] = queue.Queue(2 * workers + batch)
    closed = threading.Event()

    def put(entry: tuple[_Item, Future[_Read]] | None) -> None:
        while not closed.is_set():
            try:
                return waiting.put(entry, timeout=0.1)
            except queue.Full:
                pass

    def feed() -> None:
        try:
            for i, item in enumerate(items):
                if closed.is_set():
                    break
                put((item, readers.submit(read, i, item)))
        finally:
            put(None)

    def batches() -> Iterator[list[tuple[_Item, Future[_Read]]]]:
        entries = []
        while entry := waiting.get():
            entries.append(entry)
            if len(entries) == batch:
                yield entries
                entries = []
        if entries:
            yield entries

    with (
        ThreadPoolExecutor(workers, "edet-read") as readers,
        ThreadPoolExecutor(1, "edet-feed") as feeder,
    ):
        feeding = feeder.submit(feed)
        try:
            for entries in batches():
                yield [(item, _outcome(future)) for item, future in entries]
            feeding.result()  # raises what the iteration raised
        finally:
            closed.set()


def _outcome(future: Future[Any]) -> Any:
    """What was read, or why that could not be read."""
    try:
        return future.result()
    except ITEM_ERRORS as error:
        return error
