"""What is measured of a case: the rows of the tables of benchmarks/cpu.py."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import replace
from typing import Any
from unittest import mock

import torch
from torch import Tensor

from benchmarks import rivals
from benchmarks.case import STAGES, Case, log
from edet import EfficientDet, count_macs
from edet.bench import report
from edet.bench.result import OURS
from edet.bench.variants import (
    eager_copy,
    prepare,
)
from edet_kernels import reference
from edet_kernels.testing import timing as timer
from edet_kernels.testing.numeric import (
    OP_FACTOR,
    check_errors,
    relative_difference,
)
from edet_kernels.testing.timing import TURN_SECONDS, Call


@torch.inference_mode()
def measure(
    calls: dict[str, Call], *, rounds: int, seconds: float, limit: float
) -> dict[str, dict[str, Any]]:
    """Times ``calls`` in rounds in which each has a turn.

    Args:
        rounds: at least this many.
        seconds: and until each call was timed this long.
        limit: no round is begun after this many seconds once there have been three.

    Returns:
        ``report.summary`` for each call.
    """
    # a turn of a quick call lasts TURN_SECONDS, of a slow one longer
    rounds = max(rounds, math.ceil(seconds / TURN_SECONDS))
    times = timer.measure(calls, timer.turn_clock, rounds=rounds, limit=limit)
    return {name: report.summary(samples) for name, samples in times.items()}


def stage_row(
    case: Case, stage: str, names: Sequence[str], timing: dict[str, Any]
) -> dict[str, Any]:
    """One row of the table."""
    calls, errors, unavailable = case.checked_calls(stage, names)
    times = measure(calls, **timing)
    for name, error in errors.items():
        times[name]["error"] = error
    best, ratios = report.compare(times)
    macs = count_macs(case.ours)
    counts = {
        "bifpn": macs.fpn,
        "heads": macs.class_net + macs.box_net,
        "backbone": macs.backbone,
        "post": 0,
        "nodes": 0,  # the projections are not part of it
    }
    return {
        "model": case.ours.config.name,
        "image_size": list(case.ours.config.image_size),
        "dtype": case.dtype_name,
        "batch_size": len(case.images),
        "stage": STAGES[stage],
        "macs": len(case.images) * counts.get(stage, macs.total),
        "rounds": len(next(iter(times.values()))["samples_ms"]),
        "times": times,
        "unavailable": unavailable,
        "best_rival": best,
        "ratios": ratios,
        "peak_fraction": {},  # known when the peak is
    }


def scaling_rows(case: Case, row: dict[str, Any], timing: dict[str, Any]) -> list[dict[str, Any]]:
    """Time of the network with one thread against that of its row, for us and the best rival."""
    names = [name for name in (row["best_rival"], OURS) if name in row["times"]]
    torch.set_num_threads(1)
    try:
        single = replace(case, threads=1)
        for files in ("onnx_files", "effdet_files"):
            if files in vars(case):  # the export is the same for any number of threads
                vars(single)[files] = vars(case)[files]
        calls, _, _ = single.checked_calls("network", names)
        times = measure(calls, **timing)
    finally:
        torch.set_num_threads(case.threads)
    return [
        {
            "model": row["model"],
            "dtype": row["dtype"],
            "name": name,
            "one_ms": times[name]["median_ms"],
            "all_ms": row["times"][name]["median_ms"],
        }
        for name in times
    ]


def memory_rows(case: Case, names: Sequence[str]) -> list[dict[str, Any]]:
    """Peak resident memory of each variant's network, each in a process of its own."""
    rows = []
    for name in names:
        try:
            file = case.onnx_file(name, "network") if name in rivals.ONNX_RIVALS else ""
        except rivals.Unavailable:  # the rows say why
            continue
        spec = {
            "rival": name,
            "model": case.ours.config.name,
            "image_size": case.ours.config.image_size,
            "dtype": case.dtype_name,
            "threads": case.threads,
            "onnx": str(file),
        }
        done = subprocess.run(
            [sys.executable, rivals.__file__, json.dumps(spec)], capture_output=True, text=True
        )
        if done.returncode:
            log(f"  memory of {name}: {(done.stderr.strip().splitlines() or ['failed'])[-1]}")
            continue
        found = json.loads(done.stdout.splitlines()[-1])
        rows.append({"model": spec["model"], "dtype": spec["dtype"], "name": name, **found})
    return rows


def published_fusion(
    inputs: Sequence[Tensor],
    edge_weights: Tensor,
    *,
    size: tuple[int, int],
    fusion: str,
    pool: str,
    activation: str,
) -> Tensor:
    """Weighted fusion with the operations of EfficientDet's published code, for maps in PyTorch.

    Softmax: the resized maps are stacked, multiplied by softmax(w) and summed over the new axis;
    fast: each map is multiplied by its weight and divided by Σ relu(w) + 1e-4, then all are added.
    """
    maps = [reference.resize(x, size, pool) for x in inputs]
    if fusion == "softmax":
        total = (torch.stack(maps, -1) * edge_weights.softmax(0).to(maps[0].dtype)).sum(-1)
    else:
        weights = edge_weights.relu().to(maps[0].dtype)
        norm = weights.sum() + reference.FAST_EPSILON
        terms = [x * w / norm for x, w in zip(maps, weights.unbind(), strict=True)]
        total = terms[0]
        for term in terms[1:]:
            total = total + term
    return reference.activate(total, activation)


def fusion_rows(case: Case, timing: dict[str, Any]) -> list[dict[str, Any]]:
    """Softmax against fast fusion in the whole BiFPN (paper, table 6): eager twice, and ours."""
    if case.ours.config.fusion != "fast":
        return []  # its checkpoints have no edge weights
    softmax = EfficientDet(
        replace(case.ours.config, fusion="softmax"),
        backbone=case.ours.backbone,
        backbone_channels=case.ours.fpn.in_channels,
    )
    prepare(softmax, torch.device("cpu"), case.dtype)
    softmax.load_state_dict(case.ours.state_dict())
    calls: dict[str, Call] = {}
    for fusion, model in (("softmax", softmax.freeze()), ("fast", case.ours.freeze())):
        eager, exact_call = (
            case.part("bifpn", copied) for copied in (eager_copy(model), eager_copy(model).double())
        )

        def published(call: Call = eager) -> list[Tensor]:
            with mock.patch.object(reference, "weighted_fusion", published_fusion):
                return call()

        variants = {
            "eager, as published": published,
            "eager, weights normalised first": eager,
            OURS: case.part("bifpn", model),
        }
        with torch.inference_mode():
            exact = exact_call()
            error = relative_difference(eager(), exact)
            errors = {name: relative_difference(call(), exact) for name, call in variants.items()}
        what = f"{case.ours.config.name}, {fusion} fusion"
        check_errors(what, errors, error, case.dtype, factor=OP_FACTOR)
        calls |= {f"{name}/{fusion}": call for name, call in variants.items()}
    times = measure(calls, **timing)
    names = [name.removesuffix("/fast") for name in calls if name.endswith("/fast")]
    return [
        {
            "model": case.ours.config.name,
            "name": name,
            "fast": times[f"{name}/fast"],
            "softmax": times[f"{name}/softmax"],
            "ratio": report.ratios(
                times[f"{name}/softmax"]["samples_ms"], times[f"{name}/fast"]["samples_ms"]
            ),
        }
        for name in names
    ]
