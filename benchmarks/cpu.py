"""Runs the models on a CPU against their rivals: checked first, then timed in turns in one process.

``make bench-cpu`` runs it with everything installed; docs/benchmarks.md says how it measures.
"""

from __future__ import annotations

import argparse
import copy
import datetime
import json
import math
import os
import platform
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch import Tensor

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))  # as a program, only this file's own folder is searched

import edet_kernels  # noqa: E402
from benchmarks import rivals  # noqa: E402
from edet import EfficientDet, count_macs, create_model  # noqa: E402
from edet.bench import report  # noqa: E402
from edet.bench.measure import machine_name  # noqa: E402
from edet.bench.result import OURS  # noqa: E402
from edet.bench.table import PAIRS  # noqa: E402
from edet.bench.variants import (  # noqa: E402
    eager_copy,
    node_calls,
    part_calls,
    predictor_calls,
    prepare,
    set_batch_norms,
)
from edet.detection.anchors import model_anchors  # noqa: E402
from edet.detection.postprocess import postprocess  # noqa: E402
from edet_kernels import library, reference  # noqa: E402
from edet_kernels.testing import timing as timer  # noqa: E402
from edet_kernels.testing.numeric import (  # noqa: E402
    OP_FACTOR,
    CheckFailed,
    check_detections,
    check_errors,
    relative_difference,
)
from edet_kernels.testing.timing import CPU_SIDES, TURN_SECONDS, Call  # noqa: E402

#: Names on the command line and in the tables.
STAGES = {
    "bifpn": "BiFPN",
    "heads": "heads",
    "backbone": "backbone",
    "network": "network",
    "post": "post-processing",
    "network+post": "network + post-processing",
    "nodes": "BiFPN nodes",
    "predictor": "predictor",
}
#: ``edet.bench`` has another name for the network.
PART_OF_BENCH = {"network": "whole"}


def log(message: str) -> None:
    print(f"[{time.strftime('%H:%M:%S')}] {message}", file=sys.stderr, flush=True)


#: Times eager's error that the backbone or the whole network may differ by. In a deep chain the
#: layers amplify the first rounding errors all together, so that eager's own error differs tenfold
#: from one set of random weights to another (D0's network: 3.8e-6 and 3.7e-5 with seeds 0 and 1;
#: ours 1.0e-5 and 7.0e-6). Each op is held to its own factor by its tests; a chain is only to show
#: that they are put together rightly. A rival beyond the limit is left out of the row, with the
#: reason.
CHAIN_FACTOR = 8


def factor_of(stage: str) -> float:
    """Times eager's error that a stage may differ by from the float64 reference."""
    return CHAIN_FACTOR if stage in ("backbone", "network", "predictor") else OP_FACTOR


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


# Cases -------------------------------------------------------------------------------------------


@dataclass
class Case:
    """One model in one dtype, its inputs, and the calls of every variant on them."""

    ours: EfficientDet
    eager: EfficientDet
    images: Tensor
    threads: int
    folder: Path

    @classmethod
    def create(cls, model: str, size: int | None, dtype: torch.dtype, threads: int,
               folder: Path) -> Case:  # fmt: skip
        """A model with random weights and an image of noise.

        Not for inference mode: its tensors have no version, so that a model made of them cannot
        know that its packed weights are still right and packs them in every call.
        """
        if torch.is_inference_mode_enabled():
            raise RuntimeError("a case must be created outside inference mode")
        torch.manual_seed(0)
        ours = create_model(model, image_size=size).eval()
        images = torch.randn(1, 3, *ours.config.image_size)
        set_batch_norms(ours, images)
        ours = prepare(ours, torch.device("cpu"), dtype)
        images = images.to(dtype, memory_format=torch.channels_last)
        return cls(ours.freeze(), eager_copy(ours), images, threads, folder)

    @property
    def dtype(self) -> torch.dtype:
        return self.images.dtype

    @property
    def dtype_name(self) -> str:
        return str(self.dtype).removeprefix("torch.")

    @cached_property
    @torch.inference_mode()
    def features(self) -> list[Tensor]:
        return self.eager.backbone(self.images)

    @cached_property
    @torch.inference_mode()
    def pyramid(self) -> list[Tensor]:
        return self.eager.fpn(self.features)

    @cached_property
    @torch.inference_mode()
    def head_outputs(self) -> list[Tensor]:
        return self.part("network", self.eager)()

    @cached_property
    def onnx_files(self) -> dict[str, Path]:
        """The eager model with the weights of this dtype, in float32, as ONNX files."""
        log(f"{self.ours.config.name}, {self.dtype_name}: exporting to ONNX")
        eager = copy.deepcopy(self.eager).float()
        return rivals.export_onnx(eager, self.images.float().contiguous(), self.folder)

    def part(self, stage: str, model: EfficientDet) -> Call:
        """The call of a network stage on ``model``, whose parameters may be of another dtype."""
        dtype = next(model.parameters()).dtype
        calls = part_calls(
            model,
            self.images.to(dtype),
            [x.to(dtype) for x in self.features],
            [x.to(dtype) for x in self.pyramid] if stage == "heads" else self.pyramid,
        )
        name = STAGES[stage]
        return calls[PART_OF_BENCH.get(name, name)]

    @cached_property
    def anchors(self) -> Tensor:
        return model_anchors(self.ours.config)

    def detections(self, outputs: Sequence[Tensor]) -> list[Tensor]:
        """Post-processing of the network's outputs."""
        config = self.ours.config
        classes, boxes = outputs[: config.levels], outputs[config.levels :]
        return list(postprocess(classes, boxes, self.anchors, sizes=[config.image_size]))

    def reference_detections(self, outputs: Sequence[Tensor]) -> list[Tensor]:
        """:meth:`detections` by the reference in PyTorch."""
        with edet_kernels.backend("reference"):
            return self.detections(outputs)

    def call(self, name: str, stage: str) -> Call:
        """The call of one variant.

        Raises:
            Unavailable: the rival cannot run this stage or dtype.
        """
        if stage == "post":
            detect = self.detections if name == OURS else self.reference_detections
            return lambda: detect(self.head_outputs)
        if name == OURS:
            return self.part(stage, self.ours)
        if name == "eager":
            return self.part(stage, self.eager)
        if name in rivals.COMPILE_OPTIONS:
            return rivals.compiled(name, self.part(stage, self.eager))
        given = {"BiFPN": self.features, "heads": self.pyramid}.get(STAGES[stage], [self.images])
        arrays = [x.float().contiguous().numpy() for x in given]
        file = self.onnx_files[STAGES[stage]]
        run = rivals.ONNX_RIVALS[name](file, arrays, self.threads, self.dtype_name)
        return lambda: [torch.from_numpy(array) for array in run()]

    @torch.inference_mode(False)  # see create
    @torch.no_grad()
    def pair(self, stage: str) -> tuple[dict[str, Call], dict[str, float]]:
        """The calls of one of ``edet.bench.PAIRS`` and their errors.

        Raises:
            CheckFailed: they compute something else than the reference.
        """
        what = f"{self.ours.config.name}, {self.dtype_name}, {stage}"
        if stage == "predictor":
            try:
                calls, error, eager = predictor_calls(
                    self.ours, self.eager, self.ours.config.image_size, 1
                )
            except CheckFailed as failed:
                raise CheckFailed(f"{what}: {failed}") from failed
            errors = dict.fromkeys(calls, error)
            check_errors(what, errors, eager, self.dtype, factor=factor_of(stage))
            return calls, errors
        features = [x.clone() for x in self.features]
        calls = node_calls(self.ours.fpn, features)
        exact = self.part("bifpn", copy.deepcopy(self.eager).double())()
        eager = relative_difference(self.part("bifpn", self.eager)(), exact)
        errors = {name: relative_difference(call(), exact) for name, call in calls.items()}
        check_errors(what, errors, eager, self.dtype, factor=factor_of(stage))
        return calls, errors

    @torch.inference_mode()
    def checked_calls(
        self, stage: str, names: Sequence[str]
    ) -> tuple[dict[str, Call], dict[str, float], dict[str, str]]:
        """The calls of the variants that run, their errors, and why the others do not.

        Raises:
            CheckFailed: ours or eager computes something else.
        """
        if STAGES[stage] in PAIRS:
            return *self.pair(stage), {}
        if stage == "network+post":
            return self._with_detections(*self.checked_calls("network", names))
        calls: dict[str, Call] = {}
        unavailable: dict[str, str] = {}
        if stage == "post":  # the others have none of their own
            names = [name for name in names if name in (OURS, "eager")]
        outputs: dict[str, list[Tensor]] = {}
        for name in names:
            try:
                calls[name] = self.call(name, stage)
                outputs[name] = [x.clone() for x in calls[name]()]
            except Exception as error:
                if name == OURS:
                    raise
                calls.pop(name, None)
                unavailable[name] = str(error) or type(error).__name__
                log(f"  {name} is not available: {unavailable[name].splitlines()[0]}")
        if stage == "post":
            right = self.reference_detections(self.head_outputs)
            for name, found in outputs.items():
                check_detections(f"{name}, {stage}", found, right)
            return calls, {}, unavailable
        exact = self.part(stage, copy.deepcopy(self.eager).double())()
        eager = relative_difference(self.part(stage, self.eager)(), exact)
        errors = {name: relative_difference(found, exact) for name, found in outputs.items()}
        factor = factor_of(stage)
        what = f"{self.ours.config.name}, {self.dtype_name}, {stage}"
        for name in [n for n in calls if n not in (OURS, "eager")]:
            try:
                check_errors(what, {name: errors[name]}, eager, self.dtype, factor=factor)
            except CheckFailed as error:
                unavailable[name] = str(error)
                log(f"  {error}")
                del calls[name], errors[name]
        check_errors(what, errors, eager, self.dtype, factor=factor)
        return calls, errors, unavailable

    def _then_detections(self, network: Call) -> Call:
        return lambda: self.detections(network())

    @torch.inference_mode()
    def _with_detections(
        self, networks: dict[str, Call], _: dict[str, float], unavailable: dict[str, str]
    ) -> tuple[dict[str, Call], dict[str, float], dict[str, str]]:
        """Our post-processing after each checked network, checked on that network's own outputs."""
        calls = {}
        for name, network in networks.items():
            raw = [x.clone() for x in network()]
            try:
                right = self.reference_detections(raw)
                check_detections(f"{name}, network+post", self.detections(raw), right)
            except CheckFailed as error:
                if name in (OURS, "eager"):
                    raise
                unavailable[name] = str(error)
                log(f"  {error}")
                continue
            calls[name] = self._then_detections(network)
        return calls, {}, unavailable


# What is measured --------------------------------------------------------------------------------


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
        "stage": STAGES[stage],
        "macs": counts.get(stage, macs.total),
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
        if "onnx_files" in vars(case):  # the export is the same for any number of threads
            vars(single)["onnx_files"] = case.onnx_files
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
        spec = {
            "rival": name,
            "model": case.ours.config.name,
            "image_size": case.ours.config.image_size,
            "dtype": case.dtype_name,
            "threads": case.threads,
            "onnx": str(case.onnx_files["network"]) if name in rivals.ONNX_RIVALS else "",
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


def machine() -> dict[str, Any]:
    """The processor and the instruction set that our kernels were chosen for."""
    info = library.build_info()
    capability = torch.backends.cpu.get_cpu_capability()
    usable = {"AVX512": "avx512", "AVX2": "avx2"}.get(capability, "baseline")
    if usable == "avx512" and torch.cpu._is_avx512_bf16_supported():
        usable = "avx512_bf16"
    built = info.cpu if info else ()
    best = usable if usable in built else "baseline" if built else "reference"
    return {
        "cpu": machine_name(torch.device("cpu")).split(", ")[0],
        "cores": os.cpu_count(),
        "isa": os.environ.get("EDET_CPU_ISA") or best,
        "torch_capability": capability,
        "system": platform.platform(),
    }


def revision() -> str | None:
    """The commit of the source tree, with a plus sign when it was changed; None without git."""

    def git(*arguments: str) -> str:
        command = ["git", "-C", str(ROOT), *arguments]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()

    try:
        return git("rev-parse", "--short=12", "HEAD") + (
            "+" if git("status", "--porcelain") else ""
        )
    except (OSError, subprocess.CalledProcessError):
        return None


def check_only(
    models: Sequence[str], dtypes: Sequence[str], stages: Sequence[str], names: Sequence[str],
    size: int | None, threads: int,
) -> list[str]:  # fmt: skip
    """Checks everything and times nothing; the messages of what :func:`run` would refuse."""
    torch.set_num_threads(threads)
    refused = []
    for dtype in dtypes:
        for model in models:
            with tempfile.TemporaryDirectory() as folder:
                torch._dynamo.reset()
                case = Case.create(model, size, getattr(torch, dtype), threads, Path(folder))
                for stage in stages:
                    log(f"{model}, {dtype}: checking {stage}")
                    try:
                        _, errors, _ = case.checked_calls(stage, names)
                    except CheckFailed as error:
                        refused.append(str(error))
                        log(f"  refused: {error}")
                    else:
                        log("  " + (", ".join(f"{n} {e:.1e}" for n, e in errors.items()) or "ok"))
    return refused


def run(
    models: Sequence[str],
    dtypes: Sequence[str] = ("float32",),
    *,
    threads: int = 2,
    stages: Sequence[str] = tuple(STAGES),
    names: Sequence[str] = (*rivals.DEFAULT_RIVALS, OURS),
    size: int | None = None,
    rounds: int = 20,
    seconds: float = 1.0,
    limit: float = 300.0,
    scaling: bool = True,
    memory: bool = True,
    fusion: bool = True,
) -> dict[str, Any]:
    """Measures everything and returns the result; see the command line for the arguments.

    Raises:
        CheckFailed: a variant computes something else than the reference.
        ValueError: a model, stage or rival is not known.
    """
    for argument, given, known in (
        ("stages", stages, tuple(STAGES)),
        ("rivals", names, (*rivals.RIVALS, OURS)),
    ):
        if unknown := set(given) - set(known):
            raise ValueError(f"{argument} must be of {', '.join(known)}, got {min(unknown)!r}")
    timing = {"rounds": rounds, "seconds": seconds, "limit": limit}
    torch.set_num_threads(threads)
    peaks = dict.fromkeys(dtypes, 0.0)
    result: dict[str, Any] = {
        "schema": report.SCHEMA,
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "revision": revision(),
        "machine": machine(),
        "versions": {
            "python": platform.python_version(),
            "edet_kernels": edet_kernels.__version__,
            **rivals.versions(),
        },
        "threads": threads,
        "settings": {**timing, "turn_seconds": TURN_SECONDS, "peak": "largest torch.mm"},
        "peak_gflops": peaks,
        "rows": [],
        "scaling": [],
        "memory": [],
        "fusion": [],
    }
    for dtype in dtypes:
        for model in models:
            with tempfile.TemporaryDirectory() as folder:
                torch._dynamo.reset()  # what was compiled for other cases is not needed any more
                case = Case.create(model, size, getattr(torch, dtype), threads, Path(folder))
                # arithmetic in bfloat16 that is emulated is bounded by that in float32
                for kind in {torch.float32, case.dtype}:
                    peak = timer.matrix_peak(torch.device("cpu"), kind, CPU_SIDES)
                    peaks[dtype] = max(peaks[dtype], 1e-9 * peak)
                for stage in stages:
                    log(f"{model}, {dtype}: {stage}")
                    row = stage_row(case, stage, names, timing)
                    result["rows"].append(row)
                    if stage == "network" and scaling and threads > 1:
                        result["scaling"] += scaling_rows(case, row, timing)
                if memory:
                    log(f"{model}, {dtype}: memory")
                    result["memory"] += memory_rows(case, names)
                if fusion and dtype == "float32":
                    log(f"{model}, {dtype}: softmax and fast fusion")
                    result["fusion"] += fusion_rows(case, timing)
    for row in result["rows"]:
        row["peak_fraction"] = {
            name: 2e-6 * row["macs"] / times["median_ms"] / peaks[row["dtype"]]
            for name, times in row["times"].items()
            if row["macs"]
        }
    return result


def main(argv: Sequence[str] | None = None) -> None:
    """Runs the benchmark from the command line."""
    defaults = [f"tf_efficientdet_{name}" for name in ("d0", "d1", "d3")]
    parser = argparse.ArgumentParser(
        description="Times EfficientDet on this CPU against its rivals.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    add: Callable[..., Any] = parser.add_argument
    add("--models", nargs="+", default=defaults)
    add("--size", type=int, help="side of the image instead of the model's own")
    add("--dtype", nargs="+", default=["float32", "bfloat16"], choices=["float32", "bfloat16"])
    add("--threads", type=int, default=min(2, os.cpu_count() or 1))
    add("--stages", nargs="+", default=list(STAGES), choices=list(STAGES))
    add("--rivals", nargs="+", default=list(rivals.DEFAULT_RIVALS), choices=list(rivals.RIVALS))
    add("--rounds", type=int, default=20, help="at least this many for every row")
    add("--seconds", type=float, default=1.0, help="at least so long for every cell")
    add("--limit", type=float, default=300.0, help="seconds after which a row ends early")
    add("--check", action="store_true", help="check every result and time nothing")
    add("--no-scaling", action="store_true", help="leave out the network on one thread")
    add("--no-memory", action="store_true", help="leave out the peak memory")
    add("--no-fusion", action="store_true", help="leave out softmax against fast fusion")
    add("--output", type=Path, default=ROOT / "benchmarks" / "results" / "cpu.json",
        help="the result; the plot is written beside it as .png")  # fmt: skip
    args = parser.parse_args(argv)
    if not args.output.parent.is_dir():
        parser.error(f"the folder of --output does not exist: {args.output.parent}")
    if not library.load():
        log(f"warning: {library.status()}")
    if args.check:
        names = (*args.rivals, OURS)
        refused = check_only(args.models, args.dtype, args.stages, names, args.size, args.threads)
        sys.exit("\n".join(refused) or 0)
    try:
        result = run(
            args.models,
            args.dtype,
            threads=args.threads,
            stages=args.stages,
            names=(*args.rivals, OURS),
            size=args.size,
            rounds=args.rounds,
            seconds=args.seconds,
            limit=args.limit,
            scaling=not args.no_scaling,
            memory=not args.no_memory,
            fusion=not args.no_fusion,
        )
    except (CheckFailed, ValueError) as error:
        sys.exit(str(error))
    report.write(result, args.output)
    report.plot_ratios(result, args.output.with_suffix(".png"))
    print(report.markdown(result))


if __name__ == "__main__":
    main()
