"""Times each op's CUDA kernels on an NVIDIA GPU against PyTorch's own: checked first, then timed.

``make gpu-check`` runs it; docs/cuda.md says how it measures. Nothing here changes the GPU's
settings.
"""

from __future__ import annotations

import argparse
import contextlib
import datetime
import json
import math
import os
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))  # as a program, only this file's own folder is searched

import edet_kernels  # noqa: E402
from edet.bench import report  # noqa: E402
from edet.bench.measure import machine_name  # noqa: E402
from edet.bench.result import OURS  # noqa: E402
from edet.files import replacing  # noqa: E402
from edet.fused.cells import graph_of  # noqa: E402
from edet.models.bifpn import bifpn_nodes  # noqa: E402
from edet.models.configs import ModelConfig, get_config  # noqa: E402
from edet_kernels import library, reference  # noqa: E402
from edet_kernels.testing import timing  # noqa: E402
from edet_kernels.testing.model_samples import MODEL_SAMPLES as CASES  # noqa: E402
from edet_kernels.testing.model_samples import Shapes  # noqa: E402
from edet_kernels.testing.numeric import (  # noqa: E402
    OP_FACTOR,
    check_detections,
    check_errors,
    relative_difference,
)
from edet_kernels.testing.samples import Call, Graph, Maker, tensors  # noqa: E402

SCHEMA = "edet-bench-gpu/1"
MODELS = tuple(f"tf_efficientdet_d{i}" for i in (*range(8), "7x"))
DTYPES = {"float16": torch.float16, "bfloat16": torch.bfloat16}
#: How a graph of nodes can be launched (EDET_CUDA_LAUNCH), and the ops that are one.
LAUNCHES = ("nodes", "pdl", "persistent")
GRAPH_OPS = ("bifpn", "head")
#: What the gauge predicts, and by how much of it a measured time may differ before it is named.
PREDICTED = ROOT / "benchmarks" / "results" / "gpu-model.json"
OFF = 0.3
#: Variants: ours by its CUDA and by its Triton kernels and eager, as they are and in a CUDA graph,
#: ours for each launch too, and what torch.compile makes of eager.
VARIANTS = (
    OURS,
    "ours, graph",
    *(f"ours, {launch}{graph}" for launch in LAUNCHES for graph in ("", ", graph")),
    "Triton",
    "Triton, graph",
    "eager",
    "eager, graph",
    "compile",
    "compile, max-autotune",
)
#: Where the arguments are and the backend of ours.
DEVICE = "cuda"
#: Bytes of inputs that rotate when the second-level cache is to be cold: more than any GPU has.
COLD_BYTES = 512 * 2**20


def shapes_of(config: ModelConfig) -> Shapes:
    """What decides the shapes of a model's ops."""
    levels, sizes = config.levels, config.level_sizes
    found = graph_of([bifpn_nodes(levels)] * config.cells, levels)
    node_sizes = [sizes[node.level] for node in found.nodes]
    graph = Graph(sizes, found.edges, node_sizes, found.outputs)
    return Shapes(
        config.name, config.image_size, config.width, config.head_repeats, config.fusion, graph
    )


class Judge:
    """The right result of a call, and how far from it a variant may be.

    Args:
        what: the call, for messages.
        call: its op and arguments.
        dtype: of the maps.
    """

    def __init__(self, what: str, call: Call, dtype: torch.dtype) -> None:
        self.what, self.op, self.dtype = what, call.op, dtype
        if call.op == "detect":
            self.expected, self.eager = tensors(call.run(reference.detect)), 0.0
            return
        self.expected = tensors(call.reference(torch.float64))
        self.eager = relative_difference(tensors(call.reference(dtype)), self.expected)

    def check(self, name: str, result: Any) -> float:
        """The error of the variant ``name`` as a fraction of the largest value.

        Raises:
            CheckFailed: it is wrong.
        """
        found = tensors(result)
        if self.op == "detect":
            check_detections(f"{self.what}, {name}", found, self.expected)
            return 0.0
        error = relative_difference(found, self.expected)
        check_errors(self.what, {name: error}, self.eager, self.dtype, factor=OP_FACTOR)
        return error


@contextlib.contextmanager
def launched(name: str) -> Iterator[None]:
    """Sets how the variant ``name`` launches graphs of nodes."""
    before = os.environ.get("EDET_CUDA_LAUNCH")
    wanted = [launch for launch in LAUNCHES if launch in name.split(", ")]
    os.environ["EDET_CUDA_LAUNCH"] = wanted[0] if wanted else "auto"
    try:
        yield
    finally:
        if before is None:
            del os.environ["EDET_CUDA_LAUNCH"]
        else:
            os.environ["EDET_CUDA_LAUNCH"] = before


def _graph(call: Callable[[], Any]) -> Callable[[], Any]:
    """``call`` as a CUDA graph."""
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        for _ in range(3):
            call()
    stream.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        call()
    return graph.replay


def variant(name: str, op: str) -> Callable[[Call], Any]:
    """What one of :data:`VARIANTS` does with a call of ``op``; compiled once for all its calls."""
    if name.startswith(OURS):
        return lambda call: call()
    if name.startswith("Triton"):

        def by_triton(call: Call) -> Any:
            with edet_kernels.backend("triton"):
                return call()

        return by_triton
    function = getattr(reference, op)
    if name.startswith("compile"):
        mode = "max-autotune" if name.endswith("max-autotune") else None
        function = torch.compile(function, mode=mode, fullgraph=True, dynamic=False)
    return lambda call: call.run(function)


def measure(calls: Sequence[Callable[[], Any]], seconds: float) -> dict[str, Any]:
    """Times ``calls`` in turn by device events; several when the cache is to be cold."""

    def turn() -> None:
        for call in calls:
            call()

    turn()
    torch.cuda.synchronize()
    rounds = min(1000, max(20, math.ceil(1e3 * seconds / timing.event_clock(turn))))
    times = timing.measure({OURS: turn}, timing.event_clock, rounds=rounds)[OURS]
    return report.summary([ms / len(calls) for ms in times])


def ceilings(dtype: torch.dtype) -> dict[str, float]:
    """Measured bytes per second of a large copy and operations per second of a large product."""
    return {
        "bytes_per_second": timing.copy_bandwidth(torch.device(DEVICE)),
        "operations_per_second": timing.matrix_peak(torch.device(DEVICE), dtype),
    }


def rows(
    title: str,
    shapes: Shapes,
    make: Maker,
    names: Sequence[str],
    caches: Sequence[str],
    seconds: float,
) -> list[dict[str, Any]]:
    """The op at one model's shapes, every variant that runs and is right: a row for each cache.

    Raises:
        CheckFailed: ours is wrong.
        RuntimeError: ours cannot run.
    """
    if any(name.startswith("compile") for name in names):
        torch.compiler.reset()  # or the compiler would make one program for the shapes of all rows
    case = CASES[title](make, shapes)
    judge = Judge(title, case, make.dtype)
    copies = max(2, min(64, COLD_BYTES // max(case.bytes, 1))) if "cold" in caches else 1
    cases = [case] + [CASES[title](make, shapes) for _ in range(copies - 1)]
    cast = [c if c.op == "detect" else c.to(make.dtype) for c in cases]  # weights too, for PyTorch
    times: dict[str, dict[str, Any]] = {cache: {} for cache in caches}
    errors: dict[str, float] = {}
    unavailable: dict[str, str] = {}
    for name in names:
        if case.op not in GRAPH_OPS and any(launch in name for launch in LAUNCHES):
            continue
        try:
            run = variant(name, case.op)
            mine = cases if name.startswith((OURS, "Triton")) else cast
            with launched(name):
                errors[name] = judge.check(name, run(mine[0]))
                calls: list[Callable[[], Any]] = [partial(run, c) for c in mine]
                if name.endswith("graph"):
                    calls = [_graph(call) for call in calls]
                for cache in caches:
                    times[cache][name] = measure(calls if cache == "cold" else calls[:1], seconds)
        except Exception as reason:
            if name == OURS:
                raise
            unavailable[name] = first_line(reason)
    return [
        {
            "case": title,
            "model": shapes.name,
            "batch": make.batch,
            "dtype": str(make.dtype).removeprefix("torch."),
            "cache": cache,
            "errors": errors,
            "bytes": case.bytes,
            "operations": case.operations,
            "times": times[cache],
            "unavailable": unavailable,
        }
        for cache in caches
    ]


def first_line(error: BaseException) -> str:
    """An exception in one line."""
    return str(error).strip().splitlines()[0] if str(error).strip() else repr(error)


def markdown(result: dict[str, Any]) -> str:
    """The result as a Markdown table: microseconds, and our shares of the measured ceilings."""
    names = list(dict.fromkeys(name for r in result["rows"] for name in r["times"]))
    lines = [f"**{result['device']}**, torch {result['torch']}, {result['date'][:10]}; µs", ""]
    header = ["", "model", "batch", "dtype", "L2", *names, "of copy", "of product"]
    lines += [f"| {' | '.join(header)} |", "|" + "---|" * len(header)]
    for r in result["rows"]:
        peak = result["ceilings"][r["dtype"]]
        ours = [t["median_ms"] for name, t in r["times"].items() if name.startswith(OURS)]
        best = 1e-3 * min(ours, default=float("inf"))
        shares = [r["bytes"] / best / peak["bytes_per_second"],
                  r["operations"] / best / peak["operations_per_second"]]  # fmt: skip
        cells = [r["case"], r["model"], str(r["batch"]), r["dtype"], r["cache"]]
        cells += [
            f"{1e3 * r['times'][n]['median_ms']:.1f}" if n in r["times"] else "" for n in names
        ]
        lines.append(f"| {' | '.join([*cells, *(f'{share:.0%}' for share in shares)])} |")
    lines += [f"\nNot measured: {what}" for what in result["left_out"]]
    return "\n".join(lines)


def beside_predicted(rows: Sequence[dict[str, Any]], device: str, predicted: dict[str, Any]) -> str:
    """Measured times beside what the gauge (docs/gpu-model.md) predicts, as Markdown.

    Only of ops that a model calls once, float16 and warm, which are what the gauge predicts.

    Args:
        rows: of a result.
        device: the GPU's name, which holds that of the gauge's.
        predicted: the content of ``results/gpu-model.json``.

    Returns:
        A table, and a line that names what is off by more than :data:`OFF`; empty when nothing that
        was measured is predicted.
    """
    known = {(r["model"], r["batch"], r["op"]): r["predicted_us"] for r in predicted["rows"]
             if r["calls"] == 1 and r["gpu"] in device}  # fmt: skip
    lines, off = [], []
    for r in rows:
        us = known.get((r["model"], r["batch"], r["case"]))
        ours = [t["median_ms"] for name, t in r["times"].items() if name.startswith(OURS)]
        if us is None or not ours or (r["dtype"], r["cache"]) != ("float16", "warm"):
            continue
        measured = 1e3 * min(ours)
        what = f"{r['case']}, {r['model']}, batch {r['batch']}"
        lines.append(f"| {what} | {us:.1f} | {measured:.1f} | {measured / us - 1:+.0%} |")
        if abs(measured / us - 1) > OFF:
            off.append(what)
    if not lines:
        return ""
    head = ["| | predicted µs | measured µs | off by |", "|---|---|---|---|"]
    wrong = ", ".join(off) or "nothing"
    return "\n".join([*head, *lines, f"\nOff by more than {OFF:.0%}: {wrong}"])


def softmax_ratio(rows: Sequence[dict[str, Any]]) -> float | None:
    """How many times longer softmax takes than fast fusion: the median over rows alike else."""
    keys = ("model", "batch", "dtype", "cache")
    fast = {tuple(r[k] for k in keys): r for r in rows if r["case"] == "fusion_node, P3 of 2"}
    ratios = []
    for r in rows:
        other = fast.get(tuple(r[k] for k in keys))
        if r["case"] == "fusion_node, softmax" and other:
            name = "ours, graph" if "ours, graph" in r["times"] else OURS
            ratios.append(r["times"][name]["median_ms"] / other["times"][name]["median_ms"])
    return statistics.median(ratios) if ratios else None


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """Reads the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    add = parser.add_argument
    add("--models", nargs="+", default=list(MODELS), choices=MODELS)
    add("--cases", nargs="+", default=list(CASES), choices=list(CASES))
    add("--dtypes", nargs="+", default=list(DTYPES), choices=list(DTYPES))
    add("--batches", nargs="+", type=int, default=[1, 8, 64])
    add("--variants", nargs="+", default=list(VARIANTS), choices=VARIANTS)
    add("--caches", nargs="+", default=["warm", "cold"], choices=["warm", "cold"])
    add("--seconds", type=float, default=0.1, help="of each figure, at least 20 samples")
    add("--limit", type=float, default=math.inf, help="seconds after which nothing new is begun")
    add("--output", type=Path, default=ROOT / "benchmarks" / "results" / "gpu.json")
    args = parser.parse_args(argv)
    if min(args.batches) < 1:
        parser.error(f"--batches must be positive, got {min(args.batches)}")
    if not args.output.parent.is_dir():
        parser.error(f"the folder of --output does not exist: {args.output.parent}")
    return args


def _usable() -> bool:
    """Whether the GPU still answers: after an illegal access it does not."""
    try:
        torch.cuda.synchronize()
        torch.cuda.empty_cache()
    except RuntimeError:
        return False
    return True


def run(args: argparse.Namespace, result: dict[str, Any]) -> None:
    """Fills ``result`` and writes it after each case, so that nothing that was measured is lost.

    All cases come first without torch.compile, which takes longer than all else; a case that fails
    is noted.
    """
    end = time.monotonic() + args.limit
    cases = [
        (title, shapes, Maker(DTYPES[dtype], batch, torch.device(DEVICE)))
        for shapes in (shapes_of(get_config(model)) for model in args.models)
        for batch in args.batches
        for dtype in args.dtypes
        for title in args.cases
    ]
    found: dict[tuple[Any, ...], dict[str, Any]] = {}
    for compiled in (False, True):
        names = [name for name in args.variants if name.startswith("compile") == compiled]
        for i, (title, shapes, make) in enumerate(cases if names else []):
            what = f"{title}, {shapes.name}, batch {make.batch}, {make.dtype}"
            if time.monotonic() > end:
                rest = len(cases) - i
                result["left_out"].append(f"{', '.join(names)}: {rest} of {len(cases)} cases")
                break
            try:
                for row in rows(title, shapes, make, names, args.caches, args.seconds):
                    known = found.setdefault((what, row["cache"]), row)
                    for key in ("times", "errors", "unavailable"):
                        known[key].update(row[key])
            except Exception as error:
                result["failures"][what] = first_line(error)
                if not _usable():
                    result["left_out"].append(f"all after {what}: the GPU answers no more")
                    return
            result["rows"] = list(found.values())
            result["softmax_ratio"] = softmax_ratio(result["rows"])
            _write(args.output, result)


def _write(path: Path, result: dict[str, Any]) -> None:
    """Writes a result whole or not at all: the run may be stopped at any time."""
    with replacing(path) as temporary:
        temporary.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")


@torch.inference_mode()
def main(argv: Sequence[str] | None = None) -> None:
    """Runs from the command line."""
    args = parse(argv)
    if not torch.cuda.is_available():
        sys.exit("torch finds no CUDA GPU: nothing is measured")
    if not library.load():
        sys.exit(library.status())
    torch.manual_seed(0)
    torch.backends.cudnn.allow_tf32 = False
    result: dict[str, Any] = {
        "schema": SCHEMA,
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "device": machine_name(torch.device(DEVICE)),
        "torch": torch.__version__,
        "library": library.status(),
        "ceilings": {name: ceilings(DTYPES[name]) for name in args.dtypes},
        "softmax_ratio": None,
        "rows": [],
        "failures": {},
        "left_out": [],
    }
    with edet_kernels.backend(DEVICE):
        run(args, result)
    _write(args.output, result)
    print(markdown(result))
    predicted = json.loads(PREDICTED.read_text(encoding="utf-8"))
    print("\n" + beside_predicted(result["rows"], result["device"], predicted))
    if result["failures"]:
        sys.exit("\n".join(f"{what}: {why}" for what, why in result["failures"].items()))


if __name__ == "__main__":
    main()
