"""The timer: who has a turn when, what counts, and when it ends. No test depends on a time."""

import pytest
import torch

from edet_kernels.testing import timing


def order_of(rounds, **options):
    """The turns in their order, and the samples; a call's name is what it takes."""
    turns = []
    calls = {name: (lambda name=name: turns.append(name)) for name in "abc"}

    def clock(call):
        call()
        return float(len(turns))

    return turns, timing.measure(calls, clock, rounds=rounds, **options)


def test_each_call_has_a_turn_in_every_round_in_another_order():
    turns, samples = order_of(6, warm_up=0)
    rounds = ["".join(turns[i : i + 3]) for i in range(0, 18, 3)]
    assert all(sorted(one) == ["a", "b", "c"] for one in rounds)
    assert len(set(rounds)) == 6
    assert all(len(times) == 6 for times in samples.values())


def test_warm_up_is_not_counted():
    seen = []
    turns, samples = order_of(2, warm_up=3, progress=lambda *done: seen.append(done))
    assert len(turns) == 15
    assert sorted(t for times in samples.values() for t in times) == [10.0, 11, 12, 13, 14, 15]
    assert seen == [(1, 2), (2, 2)]


@pytest.mark.parametrize(("rounds", "expected"), [(1, 1), (2, 2), (9, 3)])
def test_past_the_limit_it_ends_after_three_rounds(rounds, expected):
    _, samples = order_of(rounds, limit=-1.0)
    assert [len(times) for times in samples.values()] == [expected] * 3


def test_a_call_may_time_itself():
    class Own:
        def __call__(self):
            raise AssertionError("it is not called from outside")

        def seconds(self):
            return 0.25

    assert timing.call_seconds(Own()) == 0.25
    assert timing.host_clock(torch.device("cpu"))(Own()) == 250.0


def test_a_turn_is_the_median_of_its_calls(monkeypatch):
    times = iter([0.5, 0.1, 0.2])
    monkeypatch.setattr(timing, "call_seconds", lambda call: next(times))
    monkeypatch.setattr(timing, "TURN_SECONDS", 0.75)
    assert timing.turn_clock(lambda: None) == 200.0


def test_roofs_are_the_best_of_a_few(monkeypatch):
    times = iter([4.0, 2.0, 3.0, 5.0, 9.0, 8.0, 1.0, 7.0])

    def seconds(call):
        call()
        return 1e-3 * next(times)

    monkeypatch.setattr(timing, "call_seconds", seconds)
    cpu = torch.device("cpu")
    assert timing.matrix_peak(cpu, torch.float32, [64]) == pytest.approx(2 * 64**3 / 2e-3)
    assert timing.copy_bandwidth(cpu) == pytest.approx(2 * 2**26 / 1e-3)


def test_slow_arithmetic_is_tried_on_the_smallest_matrix_only(monkeypatch):
    sides = []

    def seconds(call):
        sides.append(len(call()))
        return 1.0

    monkeypatch.setattr(timing, "call_seconds", seconds)
    peak = timing.matrix_peak(torch.device("cpu"), torch.float32, [8, 16])
    assert set(sides) == {8} and peak == pytest.approx(2 * 8**3)


def test_the_peak_of_a_cpu_is_the_faster_products(monkeypatch):
    """PyTorch's of 1024² take 1 ms, then ours of 64² pixels and 288² weights 0.1 ms, or 1 ms."""
    cpu = torch.device("cpu")
    for own, expected in ((1e-4, 2 * 64**2 * 288**2 / 1e-4), (1e-3, 2 * 1024**3 / 1e-3)):
        shapes = []

        def seconds(call, own=own, shapes=shapes):
            found = call()
            shapes.append(tuple(found[0].shape if isinstance(found, list) else found.shape))
            return own if isinstance(found, list) else 1e-3

        monkeypatch.setattr(timing, "call_seconds", seconds)
        assert timing.product_peak(cpu, torch.float32, [1024]) == pytest.approx(expected)
        assert set(shapes) == {(1024, 1024), (1, 288, 64, 64)}
