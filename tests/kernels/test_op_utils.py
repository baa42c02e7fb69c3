"""The error rule itself: what it lets pass and what it does not."""

import pytest
import torch
from op_utils import DTYPES, assert_as_accurate_as_eager, ulp

NAN, INF = torch.nan, torch.inf


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
