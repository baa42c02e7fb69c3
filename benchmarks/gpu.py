"""Times whole models and each op's CUDA kernels on a GPU against PyTorch: checked, then timed.

``make gpu-check`` runs it; docs/cuda.md says how it measures. Nothing here changes the GPU's
settings.
"""

from __future__ import annotations

import argparse
import contextlib
import datetime
import itertools
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
from benchmarks import gpu_launches, gpu_models, gpu_tables, gpu_timing  # noqa: E402
from edet.bench.measure import machine_name  # noqa: E402
from edet.bench.result import OURS  # noqa: E402
from edet.files import replacing  # noqa: E402
from edet.fused.cells import graph_of  # noqa: E402
from edet.models.bifpn import bifpn_nodes  # noqa: E402
from edet.models.configs import ModelConfig, get_config  # noqa: E402
from edet_kernels import library, reference  # noqa: E402
from edet_kernels.testing.model_samples import MODEL_SAMPLES as CASES  # noqa: E402
from edet_kernels.testing.model_samples import Shapes  # noqa: E402
from edet_kernels.testing.numeric import (  # noqa: E402
    OP_FACTOR,
    check_detections,
    check_errors,
    relative_difference,
)
from edet_kernels.testing.samples import Call, Graph, Maker, tensors  # noqa: E402

SCHEMA = "edet-bench-gpu/2"
MODELS = tuple(f"tf_efficientdet_d{i}" for i in (*range(8), "7x"))
DTYPES = {"float16": torch.float16, "bfloat16": torch.bfloat16}
#: How a graph of nodes can be launched (EDET_CUDA_LAUNCH), and the ops that are one.
LAUNCHES = ("nodes", "pdl", "persistent")
GRAPH_OPS = ("bifpn", "head")
#: What the gauge predicts.
PREDICTED = ROOT / "benchmarks" / "results" / "gpu-model.json"
#: Variants: ours by its CUDA and by its Triton kernels and eager, as they are and in a CUDA graph,
#: ours for each launch too, and what torch.compile makes of eager.
OP_VARIANTS = (
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
VARIANTS = tuple(dict.fromkeys((*gpu_models.VARIANTS, *OP_VARIANTS)))


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


def variant(name: str, op: str) -> Callable[[Call], Any]:
    """What one of :data:`OP_VARIANTS` does with a call of ``op``, compiled once for all calls."""
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


def rows(
    title: str,
    shapes: Shapes,
    make: Maker,
    names: Sequence[str],
    caches: Sequence[str],
    effort: gpu_timing.Effort,
) -> list[dict[str, Any]]:
    """The op at one model's shapes, every variant that runs and is right: a row for each cache.

    The row of the warm cache has the launches of ours.

    Raises:
        CheckFailed: ours is wrong.
        RuntimeError: ours cannot run.
    """
    if any(name.startswith("compile") for name in names):
        torch.compiler.reset()  # or the compiler would make one program for the shapes of all rows
    case = CASES[title](make, shapes)
    judge = Judge(title, case, make.dtype)
    copies = max(2, min(64, gpu_timing.COLD_BYTES // max(case.bytes, 1))) if "cold" in caches else 1
    cases = [case] + [CASES[title](make, shapes) for _ in range(copies - 1)]
    cast = [c if c.op == "detect" else c.to(make.dtype) for c in cases]  # weights too, for PyTorch
    times: dict[str, dict[str, Any]] = {cache: {} for cache in caches}
    errors: dict[str, float] = {}
    unavailable: dict[str, str] = {}
    ours: dict[str, Callable[[], Any]] = {}
    for name in names:
        if case.op not in GRAPH_OPS and any(launch in name for launch in LAUNCHES):
            continue
        try:
            run = variant(name, case.op)
            mine = cases if name.startswith((OURS, "Triton")) else cast
            with launched(name):
                with gpu_timing.within(
                    effort.compile_seconds if name.startswith("compile") else math.inf
                ):
                    result = run(mine[0])
                errors[name] = judge.check(name, result)
                calls: list[Callable[[], Any]] = [partial(run, c) for c in mine]
                if name.endswith("graph"):
                    calls = [gpu_timing.Graph(call) for call in calls]
                for cache in caches:
                    turn = calls if cache == "cold" else calls[:1]
                    times[cache][name] = gpu_timing.measure(turn, effort.seconds)
            if name in (OURS, f"{OURS}, graph"):
                ours["graph" if name.endswith("graph") else "call"] = calls[0]
        except Exception as reason:
            if name == OURS:
                raise
            unavailable[name] = gpu_timing.first_line(reason)
    seen = gpu_launches.of_variants(ours) if effort.launches else {}
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
            **(seen if cache == "warm" else {}),
        }
        for cache in caches
    ]


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
    add("--parts", nargs="*", default=list(gpu_models.PARTS), choices=gpu_models.PARTS,
        help="of whole models; none: no whole models")  # fmt: skip
    add("--cases", nargs="*", default=list(CASES), choices=list(CASES),
        help="ops by themselves; none: no ops")  # fmt: skip
    add("--dtypes", nargs="+", default=list(DTYPES), choices=list(DTYPES))
    add("--batches", nargs="+", type=int, default=[1, 8, 64])
    add("--variants", nargs="+", default=list(VARIANTS), choices=VARIANTS)
    add("--caches", nargs="+", default=["warm", "cold"], choices=["warm", "cold"])
    add("--compile-models", nargs="*", default=["tf_efficientdet_d0"], choices=MODELS,
        help="whole models compiled too, in a minute or two for each part and mode")  # fmt: skip
    add("--compile-batches", nargs="+", type=int, default=[1])
    add("--compile-parts", nargs="+", default=["network"], choices=gpu_models.PARTS[:-1])
    add("--compile-seconds", type=float, default=180, help="that one compilation may take")
    add("--launches", action=argparse.BooleanOptionalAction, default=True,
        help="list the launches of ours, by the profiler")  # fmt: skip
    add("--seconds", type=float, default=0.1, help="of each figure")
    add("--limit", type=float, default=math.inf, help="seconds after which nothing new is begun")
    add("--output", type=Path, default=ROOT / "benchmarks" / "results" / "gpu.json")
    add("--update", action="store_true",
        help="measure nothing: fill docs/cuda.md from --output")  # fmt: skip
    args = parser.parse_args(argv)
    for name in ("batches", "compile_batches"):
        if min(getattr(args, name)) < 1:
            option = "--" + name.replace("_", "-")
            parser.error(f"{option} must be positive, got {min(getattr(args, name))}")
    if not args.output.parent.is_dir():
        parser.error(f"the folder of --output does not exist: {args.output.parent}")
    return args


class Run:
    """Fills a result and writes it after each case, so that nothing that was measured is lost.

    Args:
        args: of the command line.
        result: as :func:`main` begins it.
    """

    def __init__(self, args: argparse.Namespace, result: dict[str, Any]) -> None:
        self.args, self.result = args, result
        self.end = time.monotonic() + args.limit
        self.found: dict[str, dict[Any, dict[str, Any]]] = {"models": {}, "rows": {}}

    @property
    def left(self) -> float:
        """Seconds until nothing new is begun."""
        return self.end - time.monotonic()

    def effort(self) -> gpu_timing.Effort:
        """What a row may take now."""
        compile_seconds = max(1.0, min(self.args.compile_seconds, self.left))
        return gpu_timing.Effort(self.args.seconds, compile_seconds, self.args.launches)

    def add(self, section: str, key: Any, row: dict[str, Any]) -> None:
        """Adds a row, or to that of the same what it has more, and writes the result."""
        known = self.found[section].setdefault(key, row)
        for name in ("times", "errors", "unavailable"):
            known[name].update(row[name])
        self.result[section] = list(self.found[section].values())
        self.result["softmax_ratio"] = softmax_ratio(self.result["rows"])
        _write(self.args.output, self.result)

    def cases(self, what: str, cases: Sequence[tuple[str, Callable[[], None]]]) -> None:
        """Does the cases, each with its name, as far as there is time; notes which fail.

        Raises:
            GpuLost: the GPU answers no more.
        """
        for i, (title, case) in enumerate(cases):
            if self.left < 0:
                self.result["left_out"].append(f"{what}: {len(cases) - i} of {len(cases)} cases")
                break
            start = time.monotonic()
            try:
                case()
            except Exception as error:
                self.result["failures"][title] = gpu_timing.first_line(error)
                if not gpu_timing.usable():
                    raise GpuLost(title) from error
            print(f"{title}: {time.monotonic() - start:.1f} s", file=sys.stderr, flush=True)
        _write(self.args.output, self.result)

    def models(self, names: Sequence[str], *, compiled: bool) -> None:
        """Rows of whole models: a case is one model at one batch, with all its parts."""
        args = self.args
        parts = [p for p in args.parts if not compiled or p in args.compile_parts]
        models = args.compile_models if compiled else args.models
        batches = args.compile_batches if compiled else args.batches
        if not names or not parts:
            return

        def case(model: str, batch: int, dtype: str) -> None:
            size = get_config(model).image_size
            subject = gpu_models.Subject(model, batch, DTYPES[dtype], size)
            wrong = []
            for part in parts:
                if self.left < 0:
                    self.result["left_out"].append(f"{part} and all after it of {subject.what}")
                    break
                try:
                    row = gpu_models.row_of(subject, part, names, self.effort())
                except Exception as error:  # costs no other part its times
                    wrong.append(gpu_timing.first_line(error))
                else:
                    self.add("models", (model, batch, dtype, part), row)
            if wrong:
                raise RuntimeError("; ".join(wrong))

        self.cases(
            f"whole models, {', '.join(names)}",
            [
                (f"{model}, batch {batch}, {dtype}", partial(case, model, batch, dtype))
                for model, batch, dtype in itertools.product(models, batches, args.dtypes)
            ],
        )

    def ops(self, names: Sequence[str]) -> None:
        """Rows of ops by themselves."""
        args = self.args
        if not names:
            return

        def case(title: str, shapes: Shapes, make: Maker) -> None:
            key = title, shapes.name, make.batch, make.dtype
            for row in rows(title, shapes, make, names, args.caches, self.effort()):
                self.add("rows", (*key, row["cache"]), row)

        cases: list[tuple[str, Callable[[], None]]] = []
        for model, batch, dtype in itertools.product(args.models, args.batches, args.dtypes):
            shapes = shapes_of(get_config(model))
            make = Maker(DTYPES[dtype], batch, torch.device(gpu_timing.DEVICE))
            cases += [
                (f"{title}, {model}, batch {batch}, {make.dtype}",
                 partial(case, title, shapes, make))
                for title in args.cases
            ]  # fmt: skip
        self.cases(", ".join(names), cases)

    def all(self) -> None:
        """Everything asked for: first without torch.compile, which takes longer than all else."""
        try:
            for compiled in (False, True):
                models, ops = (
                    [name for name in known
                     if name in self.args.variants and name.startswith("compile") == compiled]
                    for known in (gpu_models.VARIANTS, OP_VARIANTS)
                )  # fmt: skip
                self.models(models, compiled=compiled)
                self.ops(ops)
        except GpuLost as error:
            self.result["left_out"].append(f"all after {error}: the GPU answers no more")
            _write(self.args.output, self.result)


class GpuLost(RuntimeError):
    """The GPU answers no more, after the case that the message names."""


def _write(path: Path, result: dict[str, Any]) -> None:
    """Writes a result whole or not at all: the run may be stopped at any time."""
    with replacing(path) as temporary:
        temporary.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")


def update(path: Path) -> None:
    """Fills the page from a result; see benchmarks/update_readme.py, which does so too."""
    from benchmarks.update_readme import update_gpu

    update_gpu(path)


@torch.inference_mode()
def main(argv: Sequence[str] | None = None) -> None:
    """Runs from the command line."""
    args = parse(argv)
    if args.update:
        update(args.output)
        return
    if not torch.cuda.is_available():
        sys.exit("torch finds no CUDA GPU: nothing is measured")
    if not library.load():
        sys.exit(library.status())
    torch.manual_seed(0)
    torch.backends.cudnn.allow_tf32 = False
    result: dict[str, Any] = {
        "schema": SCHEMA,
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "device": machine_name(torch.device(gpu_timing.DEVICE)),
        "torch": torch.__version__,
        "library": library.status().replace(f"{ROOT}/", ""),
        "ceilings": {name: gpu_timing.ceilings(DTYPES[name]) for name in args.dtypes},
        "softmax_ratio": None,
        "models": [],
        "rows": [],
        "failures": {},
        "left_out": [],
    }
    with edet_kernels.backend(gpu_timing.DEVICE):
        Run(args, result).all()
    _write(args.output, result)
    print(gpu_tables.markdown(result))
    predicted = json.loads(PREDICTED.read_text(encoding="utf-8"))
    print("\n" + gpu_tables.beside_predicted(result, predicted))
    if result["failures"]:
        sys.exit("\n".join(f"{what}: {why}" for what, why in result["failures"].items()))


if __name__ == "__main__":
    main()
