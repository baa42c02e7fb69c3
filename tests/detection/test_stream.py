"""Reading ahead knows no images: order, batches, errors, and how far it goes."""

import itertools
import threading

import pytest

from edet.detection.stream import read_ahead


def test_batches_come_in_order_and_the_last_one_is_smaller():
    batches = list(read_ahead("abcde", lambda i, x: f"{i}{x}", workers=3, batch=2))
    assert batches == [[("a", "0a"), ("b", "1b")], [("c", "2c"), ("d", "3d")], [("e", "4e")]]


@pytest.mark.parametrize("items", [[], [1, 2, 3, 4]])
def test_no_batch_is_empty(items):
    assert all(read_ahead(items, lambda i, x: x, workers=1, batch=2))


def test_an_item_that_cannot_be_read_is_reported_in_its_place():
    def read(i, x):
        if x == 2:
            raise OSError("broken")
        return x

    [batch] = read_ahead([1, 2, 3], read, workers=2, batch=3)
    assert [x for x, _ in batch] == [1, 2, 3]
    assert batch[0][1] == 1 and isinstance(batch[1][1], OSError) and batch[2][1] == 3


def test_another_error_ends_the_iteration():
    def read(i, x):
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        list(read_ahead([1], read, workers=1, batch=1))


def test_it_goes_no_further_than_promised_and_stops_when_it_is_closed():
    asked = []
    enough = threading.Event()

    def read(i, x):
        asked.append(x)
        if len(asked) >= 3:
            enough.set()
        return x

    batches = read_ahead(itertools.count(), read, workers=1, batch=2)
    assert next(batches) == [(0, 0), (1, 1)]
    assert enough.wait(10)
    batches.close()
    # two are out, 2 per worker and a batch wait, one is being put, one was in the thread's hands
    assert len(asked) <= 2 + 2 + 2 + 2
