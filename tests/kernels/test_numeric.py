"""The error rule itself: what it lets pass and what it does not."""

import math

import pytest
import torch

from edet_kernels.testing.numeric import (
    CheckFailed,
    assert_as_accurate_as_eager,
    check_detections,
    check_errors,
    check_network,
    relative_difference,
    ulp,
)
from edet_kernels.testing.samples import DTYPES

NAN, INF = torch.nan, torch.inf


def test_relative_difference_is_of_the_largest_value_of_each_map():
    exact = [torch.tensor([1.0, -4.0], dtype=torch.float64), torch.zeros(0, dtype=torch.float64)]
    assert relative_difference([torch.tensor([1.0, -3.0]), torch.zeros(0)], exact) == 0.25
    assert relative_difference([], []) == 0.0


@pytest.mark.parametrize("place", [0, 1])
def test_relative_difference_is_no_number_where_a_value_is_none(place):
    exact = [torch.ones(2, dtype=torch.float64)] * 2
    found = [torch.full((2,), NAN if i == place else 1.5) for i in range(2)]
    assert math.isnan(relative_difference(found, exact))


def test_relative_difference_of_other_shapes_is_infinite():
    exact = [torch.ones(2, dtype=torch.float64)]
    for found in ([torch.ones(1)], [torch.ones(2)] * 2, []):
        assert relative_difference(found, exact) == INF


@pytest.mark.parametrize("factor", [2, 3, 8])
def test_errors_may_be_a_factor_of_eagers_and_a_unit(factor):
    eps = torch.finfo(torch.float32).eps
    check_errors("m", {"ours": factor * 1e-5 + eps}, 1e-5, torch.float32, factor=factor)
    for error in (factor * 1e-5 + 2 * eps, NAN, INF):
        with pytest.raises(CheckFailed, match=r"m: ours must differ .*got eager 1\.0e-05, ours"):
            errors = {"eager": 1e-5, "ours": error}
            check_errors("m", errors, 1e-5, torch.float32, factor=factor)


@pytest.mark.parametrize("error", [4e-5, INF, NAN])
def test_a_floor_is_in_the_place_of_the_unit(error):
    check_network("part", 2.9e-5, 1e-5, torch.float32)
    check_network("part", 2e-5, 0.0, torch.float32)
    check_network("part", 2**-5, 0.0, torch.bfloat16)  # four units in the last place
    with pytest.raises(CheckFailed, match="part: ours must differ"):
        check_network("part", error, 1e-5, torch.float32)
    with pytest.raises(CheckFailed, match="part: ours must differ"):
        check_network("part", 0.04, 0.01, torch.bfloat16)


@pytest.mark.parametrize("wrong", range(4))
def test_detections_are_compared_whole(wrong):
    right = [
        torch.tensor([[[0.0, 0, 10, 10], [5, 5, 9, 9]]]),
        torch.tensor([[0.9, 0.8]]),
        torch.tensor([[3, 7]]),
        torch.tensor([2]),
    ]
    assert check_detections("m", right, right) == 0
    assert check_detections("none", *[[torch.zeros_like(x) for x in right]] * 2) == 0
    found = [x + 1e-3 if x.is_floating_point() else x.flip(-1) for x in right]
    found = [a if i == wrong else b for i, (a, b) in enumerate(zip(found, right, strict=True))]
    if wrong == 3:
        found[3] = torch.tensor([1])
    with pytest.raises(CheckFailed, match="m finds other boxes"):
        check_detections("m", found, right)


def test_another_factor_can_be_asked_for():
    ones, off = torch.ones(2, dtype=torch.float64), torch.ones(2) + 3e-6
    eager = torch.ones(2) + 1e-6
    with pytest.raises(AssertionError, match="error"):
        assert_as_accurate_as_eager(off, ones, eager)
    assert_as_accurate_as_eager(off, ones, eager, factor=3)


def rule(out, exact, eager, dtype=torch.float16):
    """Applies the rule to lists of numbers."""
    assert_as_accurate_as_eager(
        torch.tensor(out, dtype=dtype),
        torch.tensor(exact, dtype=torch.float64),
        torch.tensor(eager, dtype=dtype),
    )


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("value", [1.0, 1.5, 3.0, 1000.0, 0.125])
def test_ulp_is_the_distance_to_the_next_number(value, dtype):
    x = torch.tensor(value, dtype=dtype)
    gap = torch.nextafter(x, torch.tensor(INF, dtype=dtype)) - x
    assert ulp(value, dtype) == gap.item()
    assert ulp(0.0, dtype) == torch.finfo(dtype).smallest_normal * torch.finfo(dtype).eps


def test_the_bound_is_twice_the_eager_error_and_an_ulp():
    step = 2**-10  # of float16 at 1
    rule([1 + step, 0.5], [1.0, 0.5], [1.0, 0.5])
    rule([1 + 3 * step, 0.5], [1.0, 0.5], [1 + step, 0.5])
    with pytest.raises(AssertionError, match="error"):
        rule([1 + 2 * step, 0.5], [1.0, 0.5], [1.0, 0.5])
    with pytest.raises(AssertionError, match="error"):
        rule([1 + 4 * step, 0.5], [1.0, 0.5], [1 + step, 0.5])


@pytest.mark.parametrize("special", [NAN, INF, -INF])
def test_special_values_must_be_where_the_reference_has_them(special):
    rule([special, 1.0], [special, 1.0], [0.0, 1.0])
    for wrong in {0.0, INF, -INF} - {special}:
        with pytest.raises(AssertionError, match="NaN or infinity"):
            rule([wrong, 1.0], [special, 1.0], [special, 1.0])
    with pytest.raises(AssertionError, match="not finite"):
        rule([1.0, special], [1.0, 1.0], [1.0, 1.0])


def test_overflow_may_be_eagers_or_the_references():
    rule([INF, 1.0], [1e5, 1.0], [INF, 1.0])
    rule([INF, 1.0], [1e5, 1.0], [65504.0, 1.0])
    rule([65504.0, 1.0], [1e5, 1.0], [65504.0, 1.0])
    with pytest.raises(AssertionError, match="overflows"):
        rule([-INF, 1.0], [1e5, 1.0], [INF, 1.0])
    # where eager overflows on the way to a number, the op may as well, or be right
    rule([NAN, 1.0], [2.0, 1.0], [NAN, 1.0])
    rule([2.0, 1.0], [2.0, 1.0], [NAN, 1.0])
    with pytest.raises(AssertionError, match="error"):
        rule([3.0, 1.0], [2.0, 1.0], [NAN, 1.0])


def test_shape_dtype_and_length_must_agree():
    ones = torch.ones(2)
    for bad in (torch.ones(3), torch.ones(2, 1), torch.ones(2, dtype=torch.float16), [ones] * 2):
        with pytest.raises(AssertionError):
            assert_as_accurate_as_eager([bad], [ones.double()], [ones])
    with pytest.raises(AssertionError):
        assert_as_accurate_as_eager([ones], [ones.double()] * 2, [ones] * 2)


def test_integers_must_be_equal():
    a, b = torch.tensor([1, 2]), torch.tensor([1, 3])
    assert_as_accurate_as_eager(a, a, a)
    with pytest.raises(AssertionError):
        assert_as_accurate_as_eager(b, a, a)
