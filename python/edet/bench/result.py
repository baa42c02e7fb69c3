"""The one result file of all benchmarks: what it holds, and how it is summed up, written and read.

Every benchmark of the project writes it: ``edet bench --json`` and ``benchmarks/cpu.py``.
"""

from __future__ import annotations

import json
import os
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ..files import replacing

#: Names the result file's format; a file of another one is refused.
SCHEMA = "edet-bench/1"

#: What a result file holds, and each of its rows. Rows may also hold ``batch_size`` (1),
#: ``parameters`` and ``bytes``: what one call must at least read and write.
KEYS = ("schema", "date", "revision", "machine", "versions", "threads", "settings", "peak_gflops",
        "rows", "scaling", "memory", "fusion")  # fmt: skip

ROW_KEYS = ("model", "image_size", "dtype", "stage", "macs", "rounds", "times", "unavailable",
            "best_rival", "ratios", "peak_fraction")  # fmt: skip

#: Stages in the order they run; the whole network last.
STAGE_ORDER = ("pre-processing", "backbone", "BiFPN", "heads", "post-processing", "network",
               "network + post-processing")  # fmt: skip

#: Stages whose other variant is no rival, and what it is: our own reference, which is written to be
#: read; what of a call is spent inside operators.
NO_RIVALS = {"post-processing": "the reference", "predictor": "a part of ours"}

#: Latencies published elsewhere, ms, as context and not as a comparison: batch 1, whole detector.
PUBLISHED: dict[str, dict[str, float]] = {
    "Titan V, FP32, TensorFlow 2.1, with pre- and post-processing (paper, table 2)": {
        "d0": 12, "d1": 16, "d2": 23, "d3": 37, "d4": 65, "d5": 128, "d6": 169, "d7": 232,
        "d7x": 285,
    },
    "V100, FP16, TensorFlow 2.1, with pre- and post-processing (paper, table 2)": {
        "d0": 10.2, "d1": 13.5, "d2": 17.7, "d3": 29.0, "d4": 42.8, "d5": 72.5, "d6": 92.8,
        "d7": 122, "d7x": 153,
    },
    "GPU not named, FP16, TensorRT (NVIDIA's sample, D0 only)": {"d0": 2.27},
    "A100, FP16, TensorFlow 2 (NVIDIA DeepLearningExamples, D0 only)": {"d0": 26.31},
}  # fmt: skip

#: Name of our own column.
OURS = "ours"


def summary(samples: Sequence[float]) -> dict[str, Any]:
    """Median and quartiles of ``samples``, which are kept.

    Raises:
        ValueError: there are none.
    """
    if not samples:
        raise ValueError("samples must hold at least one time, got none")
    q1, q3 = samples[0], samples[0]
    if len(samples) > 1:
        q1, _, q3 = statistics.quantiles(samples, n=4, method="inclusive")
    return {
        "median_ms": statistics.median(samples),
        "q1_ms": q1,
        "q3_ms": q3,
        "samples_ms": list(samples),
    }


def ratios(theirs: Sequence[float], ours: Sequence[float]) -> dict[str, float]:
    """How many times longer theirs took: ratio of the medians, and median of each round's ratio.

    Raises:
        ValueError: not the same number of rounds.
    """
    if len(theirs) != len(ours):
        raise ValueError(f"rounds must be as many for both, got {len(theirs)} and {len(ours)}")
    return {
        "of_medians": statistics.median(theirs) / statistics.median(ours),
        "paired": statistics.median(t / o for t, o in zip(theirs, ours, strict=True)),
    }


def compare(times: dict[str, dict[str, Any]]) -> tuple[str | None, dict[str, dict[str, float]]]:
    """The fastest rival of a row (None without any) and the ratios of each to ours."""
    rivals = [name for name in times if name != OURS]
    if OURS not in times or not rivals:
        return None, {}
    best = min(rivals, key=lambda name: times[name]["median_ms"])
    ours = times[OURS]["samples_ms"]
    return best, {name: ratios(times[name]["samples_ms"], ours) for name in rivals}


def check(result: Any) -> dict[str, Any]:
    """``result`` when it is a result of this format.

    Raises:
        ValueError: naming what is missing.
    """
    if not isinstance(result, dict) or result.get("schema") != SCHEMA:
        raise ValueError(f"result must have the schema {SCHEMA!r}")
    missing = [key for key in KEYS if key not in result]
    missing += [f"rows[{i}].{k}" for i, row in enumerate(result["rows"] if not missing else [])
                for k in ROW_KEYS if k not in row]  # fmt: skip
    if missing:
        raise ValueError(f"result must hold {', '.join(missing)}")
    return result


def write(result: dict[str, Any], path: str | os.PathLike[str]) -> None:
    """Writes a result file; it appears whole or not at all.

    Raises:
        ValueError: ``result`` is not of the format.
        OSError: the folder does not exist or cannot be written.
    """
    text = json.dumps(check(result), indent=1, ensure_ascii=False, allow_nan=False)
    with replacing(path) as temporary:
        temporary.write_text(text + "\n", encoding="utf-8")


def read(path: str | os.PathLike[str]) -> dict[str, Any]:
    """Reads a result file.

    Raises:
        ValueError: it is not of the format.
    """
    return check(json.loads(Path(path).read_text(encoding="utf-8")))


def short(model: str) -> str:
    """The model's name without its family."""
    return model.removeprefix("tf_").removeprefix("efficientdet_")


def throughput(row: dict[str, Any], name: str) -> float:
    """Images per second of a variant."""
    return float(1e3 * row.get("batch_size", 1) / row["times"][name]["median_ms"])
