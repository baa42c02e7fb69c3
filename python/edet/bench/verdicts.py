"""Two results compared row by row: faster, slower, the same, or too noisy to tell."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from .result import (
    OURS,
    short,
)


@dataclass(frozen=True)
class Verdict:
    """One row of two results.

    Attributes:
        row: the model, batch, dtype and stage.
        before, after: medians of ours, ms.
        ratio: after / before, divided by ``drift``.
        low, high: its 95 % interval.
        drift: how much slower the variants that are not ours became: the machine, not the code.
        word: ``faster``, ``slower``, ``same`` or ``unclear``.
    """

    row: str
    before: float
    after: float
    ratio: float
    low: float
    high: float
    drift: float
    word: str


def _medians(samples: Sequence[float], generator: np.random.Generator) -> np.ndarray[Any, Any]:
    """Medians of 2000 resamplings of ``samples`` (bootstrap, Efron 1979)."""
    values = np.asarray(samples, np.float64)
    picks = generator.integers(0, len(values), (2000, len(values)))
    medians: np.ndarray[Any, Any] = np.median(values[picks], axis=1)
    return medians


def verdicts(
    before: dict[str, Any], after: dict[str, Any], tolerance: float = 0.02
) -> list[Verdict]:
    """Compares our times in two results, row by row.

    A row is faster (slower) only when the whole 95 % interval of the ratio of medians is below
    1 − ``tolerance`` (above 1 + ``tolerance``); the same when all of it is inside; otherwise the
    samples are too noisy to tell. Variants that are not ours, such as PyTorch's eager layers, run
    the same code in both results: what they lost or gained is the machine's and is divided out.

    Raises:
        ValueError: no row is in both.
    """

    def keyed(result: dict[str, Any]) -> dict[tuple[Any, ...], dict[str, Any]]:
        return {
            (r["model"], *r["image_size"], r.get("batch_size", 1), r["dtype"], r["stage"]): r
            for r in result["rows"]
            if OURS in r["times"]
        }

    olds, news = keyed(before), keyed(after)
    generator = np.random.default_rng(0)
    found = []
    for key in (key for key in olds if key in news):
        old, new = olds[key]["times"], news[key]["times"]
        ratio = _medians(new[OURS]["samples_ms"], generator) / _medians(
            old[OURS]["samples_ms"], generator
        )
        controls = [name for name in old if name != OURS and name in new]
        drifts = np.ones_like(ratio)
        if controls:
            each = [
                _medians(new[n]["samples_ms"], generator)
                / _medians(old[n]["samples_ms"], generator)
                for n in controls
            ]
            drifts = np.exp(np.mean(np.log(each), axis=0))
        low, middle, high = np.quantile(ratio / drifts, (0.025, 0.5, 0.975))
        word = "unclear"
        if high < 1 - tolerance:
            word = "faster"
        elif low > 1 + tolerance:
            word = "slower"
        elif low >= 1 - tolerance and high <= 1 + tolerance:
            word = "same"
        model, height, width, batch, dtype, stage = key
        name = f"{short(model)} {height}x{width} batch {batch} {dtype} {stage}"
        found.append(
            Verdict(
                name,
                statistics.median(old[OURS]["samples_ms"]),
                statistics.median(new[OURS]["samples_ms"]),
                float(middle),
                float(low),
                float(high),
                float(np.median(drifts)),
                word,
            )
        )
    if not found:
        raise ValueError("results must have a row in common: model, size, batch, dtype and stage")
    return found
