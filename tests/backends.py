"""The backends that the tests of the ops run on, and which of a test's cases each of them runs."""

from __future__ import annotations

import itertools
import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch

from edet_kernels.testing.samples import DTYPES, SIZES, Call, bifpn_graph, sample

#: The steps of a block in training, which the CPU alone has kernels for.
BLOCK_OPS = ("training_moments", "training_depthwise", "training_project")

SMALL_SIZES = ((5, 3), (3, 2), (9, 6))


@dataclass(frozen=True)
class Backend:
    """A backend under test.

    Attributes:
        lacks: ops that it has no kernel for.
        chains: ops that are no kernels of their own but sequences of others' launches.
        every_case: whether it runs all combinations of a test's values; see :func:`cases`.
        batch: of its samples.
        fusion_sizes: of a fusion's maps: as it is, enlarged, max-pooled.
        options: for some ops, those of its samples.
        rounded: dtypes to which it rounds its results; to others it cuts them off.
    """

    name: str
    lacks: tuple[str, ...] = ()
    chains: tuple[str, ...] = ()
    every_case: bool = False
    batch: int = 2
    fusion_sizes: tuple[tuple[int, int], ...] = SIZES
    options: dict[str, dict[str, Any]] = field(default_factory=dict)
    rounded: tuple[torch.dtype, ...] = DTYPES

    def sample(
        self, op: str, dtype: torch.dtype = torch.float32, batch: int | None = None, **options: Any
    ) -> Call:
        """A call of ``op``, small where the backend is slow unless ``options`` say otherwise."""
        options = {**self.options.get(op, {}), **options}
        return sample(op, dtype, self.batch if batch is None else batch, **options)


BACKENDS = {
    backend.name: backend
    for backend in (
        Backend("cpu", every_case=True),
        Backend("reference"),
        # interpreted without a GPU, by which a launch takes a tenth of a second and more
        Backend(
            "triton",
            lacks=("mbconv", "stem", "nms", "detect", *BLOCK_OPS),
            chains=("bifpn", "head"),
            batch=1,
            fusion_sizes=SMALL_SIZES,
            options={
                "weighted_fusion": {"sizes": SMALL_SIZES},
                "fusion_node": {"sizes": SMALL_SIZES},
                "training_node": {"sizes": SMALL_SIZES},
                "separable_conv": {"sizes": SMALL_SIZES[:2]},
                "head": {"sizes": SMALL_SIZES[:2]},
                "lateral": {"size": (5, 3)},
                "bifpn": {"graph": bifpn_graph((5, 3), levels=2, cells=1)},
            },
            # the interpreter, unlike a GPU, does not round to bfloat16
            rounded=DTYPES if torch.cuda.is_available() else DTYPES[:2],
        ),
        # the CUDA kernels, executed on the host
        Backend("emulated", lacks=("training_node", *BLOCK_OPS), chains=("bifpn", "head")),
    )
}


def covering(*axes: Sequence[Any]) -> list[tuple[Any, ...]]:
    """The fewest rows in which every value of every axis occurs."""
    count = max(map(len, axes), default=1)
    # shifted each time an axis begins anew, so that two of one length do not go in step for ever
    return [
        tuple(axis[(i + i // len(axis) * k) % len(axis)] for k, axis in enumerate(axes))
        for i in range(count)
    ]


def pairs(*axes: Sequence[Any]) -> list[tuple[Any, ...]]:
    """Few rows in which each two values of different axes meet."""

    def met(row: tuple[int, ...]) -> set[tuple[tuple[int, int], ...]]:
        # of one axis alone, its values
        return set(itertools.combinations(enumerate(row), min(2, len(axes))))

    rows = list(itertools.product(*(range(len(axis)) for axis in axes)))
    missing, chosen = set().union(*map(met, rows)), []
    while missing:
        chosen.append(max(rows, key=lambda row: len(met(row) & missing)))
        missing -= met(chosen[-1])
    return [tuple(axis[i] for axis, i in zip(axes, row, strict=True)) for row in chosen]


def cases(
    op: Iterable[str],
    *,
    backends: Sequence[str] = tuple(BACKENDS),
    spread: bool = False,
    rounded: bool = False,
    **axes: Sequence[Any],
) -> pytest.MarkDecorator:
    """Parametrises a test by ``backend``, ``op`` and the ``axes``.

    The CPU's kernels run all combinations, and with ``EDET_TEST_CASES=pairs`` as many as it takes
    for each two values to meet. The other backends, which are slow or make no choice by these
    values, run as many as it takes to meet every value: for each op, and one for a chain.

    Args:
        op: those that a backend lacks are left out.
        backends: their names.
        spread: every value is met once for all ops, not for each.
        rounded: a ``dtype`` that a backend does not round to is left out, as it always is for
            statistics.
    """
    rows: list[tuple[Any, ...]] = []
    every = pairs if os.environ.get("EDET_TEST_CASES") == "pairs" else itertools.product
    for backend in map(BACKENDS.__getitem__, backends):
        ops = [one for one in op if one not in backend.lacks]
        for group in ([ops] if ops else []) if spread else [[one] for one in ops]:
            own = {"op": group, **axes}
            if rounded or group == ["training_node"]:
                own |= {
                    k: [d for d in axes[k] if d in backend.rounded] for k in axes if k == "dtype"
                }
            found = list((every if backend.every_case else covering)(*own.values()))
            if group[0] in backend.chains and not spread:
                found = [found[len(found) // 2]]
            rows += [(backend.name, *values) for values in found]
    return pytest.mark.parametrize(("backend", "op", *axes), rows, indirect=["backend"], ids=str)


def gradient_cases(
    op: Iterable[str], *, backends: Sequence[str] = ("cpu", "triton"), **axes: Sequence[Any]
) -> pytest.MarkDecorator:
    """:func:`cases` of a test of gradients, by default on the backends with backward kernels."""
    return cases(op, backends=backends, spread=True, rounded=True, **axes)
