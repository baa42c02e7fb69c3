"""Blocks that run together in the emulation: flags, memory order between blocks, deadlocks."""

import numpy as np
import pytest

pytestmark = pytest.mark.usefixtures("emulated")

NUMBERS = np.arange(48, dtype=np.int32)


def passed_on(blocks):
    """What every row of :func:`pass_on` must be."""
    rows = [NUMBERS]
    for _ in range(blocks - 1):
        rows.append(rows[-1][::-1] + 1)
    return np.stack(rows)


@pytest.fixture(autouse=True)
def one_block_at_a_time_again(emulation):
    yield
    emulation.set_resident(1)


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("resident", [1, 2, 3, 7, 20])
def test_any_number_of_blocks_at_a_time(emulation, resident, seed):
    emulation.set_seed(seed)
    emulation.set_resident(resident)
    assert np.array_equal(emulation.pass_on(NUMBERS, 12), passed_on(12))


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("resident", [2, 5, 12])
@pytest.mark.parametrize(
    ("fault", "message"),
    [
        ("no_await", "a race between blocks"),
        ("no_release", r"block \d+ wrote, without an acquire of its release"),
        ("no_barrier", "a race between blocks"),
        ("constant_read", "through the read-only cache, which this launch has written"),
        ("wrong_flag", "a race between blocks"),
        ("deadlock", r"a deadlock of \d+ blocks; block \d+, thread \(0, 0, 0\) in tile \d+ of node "
                     r"0 waits for flag \d+ to become 1, it is 0"),
    ],
)  # fmt: skip
def test_a_fault_is_caught_whatever_the_order(emulation, fault, message, resident, seed):
    emulation.set_seed(seed)
    emulation.set_resident(resident)
    with pytest.raises(RuntimeError, match=message):
        emulation.pass_on(NUMBERS, 12, fault)


def test_blocks_that_follow_each_other_are_watched_too(emulation):
    with pytest.raises(RuntimeError, match="a race between blocks"):
        emulation.pass_on(NUMBERS, 12, "no_await")


def test_a_launch_that_overtakes_another_must_await_it(emulation):
    assert np.array_equal(emulation.overtake(NUMBERS), NUMBERS + 2)
    with pytest.raises(RuntimeError, match="a launch before may still use: it was not awaited"):
        emulation.overtake(NUMBERS, "no_await")
