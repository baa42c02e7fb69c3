"""The error rule that decides whether a result is right, and what it is made of.

Every check compares with the reference in float64 and takes the error of PyTorch's eager code in
the same precision as its measure: what eager loses nobody can be asked to keep.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from .. import library

#: Times eager's error that a single op may be off: sums are added in another order than eager's, so
#: that either may be the better one by chance, and what is fused is rounded less often, never more.
OP_FACTOR = 2

#: The same for a whole network, or a part of one that is dozens of layers deep. They amplify the
#: first roundings of both, which are not the same ones.
NETWORK_FACTOR = 3

#: What a network in float32 may differ by in any case: eager's own roundings may cancel by chance.
NETWORK_FLOOR = 2e-5


class CheckFailed(RuntimeError):
    """A result is further from the reference than the error rule allows."""


def ulp(largest: float, dtype: torch.dtype) -> float:
    """The distance between neighbours of ``largest`` in ``dtype``."""
    info = torch.finfo(dtype)
    _, exponent = math.frexp(max(largest, info.smallest_normal))
    return math.ldexp(info.eps, exponent - 1)


def same(a: Tensor, b: Tensor) -> Tensor:
    """Where ``a`` and ``b`` are equal, NaN equal to NaN."""
    return (a == b) | (a.isnan() & b.isnan())


def allowed(eager: float, *, factor: float, unit: float = 0.0, floor: float = 0.0) -> float:
    """The error rule: the largest error that is right.

    Args:
        eager: the error of PyTorch's eager code in the same precision.
        factor: times as much is allowed, :data:`OP_FACTOR` for example,
        unit: and one unit in the last place, as eager may be right by chance.
        floor: what is allowed in any case.
    """
    return max(factor * eager + unit, floor)


@functools.cache
def _sanitized() -> bool:
    """Whether the library was built with sanitizers, and so with -O1: it rounds more often."""
    info = library.build_info()
    return info is not None and bool(info.sanitize)


def assert_as_accurate_as_eager(
    out: Any, reference64: Any, eager: Any, *, factor: float = OP_FACTOR
) -> None:
    """Asserts max|out − reference64| ≤ factor·max|eager − reference64| + 1 ulp of max|reference64|.

    Where the reference is NaN or infinite, so must the output be. Where it is finite but
    overflows in the output's dtype, the output may overflow or do as eager does. For a library
    with sanitizers the factor is twice as large.

    Args:
        out: the op's result: a tensor or a list or tuple of tensors.
        reference64: the same from the reference in float64.
        eager: the same from the reference in the output's dtype.
        factor: of eager's own error.
    """
    if not isinstance(out, Tensor):
        assert len(out) == len(reference64) == len(eager)
        for one in zip(out, reference64, eager, strict=True):
            assert_as_accurate_as_eager(*one, factor=factor)
        return
    assert out.shape == reference64.shape
    assert out.dtype == eager.dtype
    if not out.is_floating_point():
        assert torch.equal(out, reference64)
        return
    rounded = reference64.to(out.dtype)
    special = ~reference64.isfinite()
    assert same(out, rounded)[special].all(), "NaN or infinity is not where the reference has it"
    overflow = ~special & ~rounded.isfinite()
    assert (same(out, rounded) | same(out, eager))[overflow].all(), "overflows unlike the reference"
    finite = rounded.isfinite()
    assert (out.isfinite() | ~eager.isfinite())[finite].all(), "not finite where eager is"
    compared = finite & out.isfinite()
    if not compared.any():
        return
    error = (out.double() - reference64)[compared].abs().max().item()
    eager_errors = (eager.double() - reference64)[finite & eager.isfinite()].abs()
    largest = reference64[finite].abs().max().item()
    bound = allowed(
        max(eager_errors.tolist(), default=0.0),
        factor=2 * factor if _sanitized() else factor,
        unit=ulp(largest, out.dtype),
    )
    assert error <= bound, f"error {error:.3g} > {bound:.3g}, largest value {largest:.3g}"


def assert_gradients_as_accurate(
    found: Sequence[Tensor],
    exact: Sequence[Tensor],
    eager: Sequence[Tensor],
    dtype: torch.dtype,
    *,
    factor: float = OP_FACTOR,
) -> None:
    """Asserts that gradients are as good as eager's in norm, bias and direction.

    Args:
        found, exact, eager: gradients in float64: of the op, of the reference in float64 and of the
            reference in ``dtype``.
        dtype: of the maps.
        factor: of the error of eager's gradients.
    """
    eps = torch.finfo(dtype).eps
    for g, x, e in zip(found, exact, eager, strict=True):
        assert g.isfinite().all()
        norm, error, eager_error = x.norm(), (g - x).norm(), (e - x).norm()
        assert error <= factor * eager_error + 4 * eps * norm
        # rounding errors are as often up as down, so that a sum of them grows like √n
        bias, eager_bias = (g - x).sum().abs(), (e - x).sum().abs()
        assert bias <= factor * eager_bias + 8 * eps * norm
        if norm > 0:
            cosine = (g * x).sum() / (g.norm() * norm)
            assert cosine > 1 - 2 * eps - factor * (eager_error / norm) ** 2


def assert_identical(a: Any, b: Any) -> None:
    """Asserts that two results are equal in every bit that matters (NaN equal to NaN)."""
    torch.testing.assert_close(a, b, rtol=0, atol=0, equal_nan=True)


def relative_difference(found: Sequence[Tensor], exact: Sequence[Tensor]) -> float:
    """Largest difference over all maps, each as a fraction of the largest value of its ``exact``.

    It is infinite where shapes or counts differ, and NaN where a value is.
    """
    if [x.shape for x in found] != [x.shape for x in exact]:
        return math.inf
    differences = [
        (x.double() - r).abs().max() / r.abs().max().clamp(min=1e-300)
        for x, r in zip(found, exact, strict=True)
        if r.numel()
    ]
    return float(torch.stack(differences).max()) if differences else 0.0


def check_errors(
    what: str,
    errors: Mapping[str, float],
    eager: float,
    dtype: torch.dtype,
    *,
    factor: float,
    floor: float = 0.0,
) -> None:
    """Checks errors that are fractions of the largest value by the error rule.

    Args:
        what: the model and stage, for the message.
        errors: of each variant, as :func:`relative_difference` gives it.
        eager: the same of PyTorch's eager layers.
        dtype: of the maps; one unit in its last place is allowed beside ``factor`` times eager.
        factor: of eager's own error.
        floor: allowed in any case, in the place of the unit; 0 for none.

    Raises:
        CheckFailed: an error is larger or not a number; the message gives those of all variants.
    """
    unit = 0.0 if floor else torch.finfo(dtype).eps
    limit = allowed(eager, factor=factor, unit=unit, floor=floor)
    wrong = [name for name, error in errors.items() if not error <= limit]
    if wrong:
        found = ", ".join(f"{name} {error:.1e}" for name, error in errors.items())
        raise CheckFailed(
            f"{what}: {', '.join(wrong)} must differ from the float64 reference by at most "
            f"{limit:.1e} of its largest value (eager: {eager:.1e}), got {found}: "
            "no times are reported"
        )


def check_network(part: str, ours: float, eager: float, dtype: torch.dtype) -> None:
    """:func:`check_errors` of whole networks and their parts: :data:`NETWORK_FACTOR` and a floor.

    The floor is :data:`NETWORK_FLOOR` in float32, four units in the last place in 16 bits.

    Raises:
        CheckFailed: ``ours`` is larger, or not a number.
    """
    floor = NETWORK_FLOOR if dtype == torch.float32 else 4 * torch.finfo(dtype).eps
    check_errors(part, {"ours": ours}, eager, dtype, factor=NETWORK_FACTOR, floor=floor)


def check_detections(
    name: str, found: Sequence[Tensor], expected: Sequence[Tensor], *, units: float = 8
) -> float:
    """Detections must be those of the reference on the same network outputs.

    Args:
        name: what made them, for the message.
        found, expected: boxes, scores, labels and counts as :func:`edet_kernels.detect` returns
            them.
        units: in the last place of the largest, that boxes and scores may differ by: exp and the
            sigmoid are not rounded alike.

    Returns:
        The largest difference of boxes and scores, as a fraction of the largest.

    Raises:
        CheckFailed: another box, score, label or count; the message says what and how many. NaN is
            only like NaN.
    """
    limit, largest, wrong = units * torch.finfo(torch.float32).eps, 0.0, []
    names = ("boxes", "scores", "labels", "counts")
    for what, x, y in zip(names, found, expected, strict=True):
        x, y = x.double(), y.double()
        scale = y.nan_to_num(0, 0, 0).abs().max().clamp(min=1e-300)
        apart = torch.where(same(x, y), 0.0, (x - y).abs() / scale)
        bad = ~(apart <= (limit if what in ("boxes", "scores") else 0.0))
        if bad.any():
            wrong.append(f"{int(bad.sum())} of {x.numel()} {what} (by {float(apart.max()):.1e})")
        elif what in ("boxes", "scores"):
            largest = max(largest, float(apart.max()))
    if wrong:
        raise CheckFailed(
            f"{name} finds other boxes than the reference, {', '.join(wrong)}: "
            "no times are reported"
        )
    return largest


def to_tf32(x: Tensor) -> Tensor:
    """float32 numbers with a mantissa of 10 bits, rounded to nearest, ties away from zero."""
    rounded = ((x.contiguous().view(torch.int32) + 0x1000) & ~0x1FFF).view(torch.float32)
    return torch.where(x.isfinite(), rounded, x)


class Tf32Products(TorchFunctionMode):
    """Rounds what 1×1 convolutions of float32 multiply to TF32, as a GPU that may does."""

    def __torch_function__(self, function, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        if function is torch.nn.functional.conv2d and args[1].shape[-2:] == (1, 1):
            x, weight, *rest = args
            args = (to_tf32(x), to_tf32(weight), *rest)
        return function(*args, **(kwargs or {}))
