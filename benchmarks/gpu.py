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
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))  # as a program, only this file's own folder is searched

import edet_kernels  # noqa: E402
from benchmarks.cpu import gate  # noqa: E402
from edet.bench import report  # noqa: E402
from edet.bench.report import OURS  # noqa: E402
from edet.bench.stages import (  # noqa: E402
    check_detections,
    machine_name,
    relative_difference,
)
from edet.fused.cells import graph_of  # noqa: E402
from edet.models.bifpn import bifpn_nodes  # noqa: E402
from edet.models.configs import ModelConfig, get_config  # noqa: E402
from edet_kernels import library, reference  # noqa: E402

SCHEMA = "edet-bench-gpu/1"
MODELS = tuple(f"tf_efficientdet_d{i}" for i in (*range(8), "7x"))
DTYPES = {"float16": torch.float16, "bfloat16": torch.bfloat16}
#: How a graph of nodes can be launched (EDET_CUDA_LAUNCH), and the ops that are one.
LAUNCHES = ("nodes", "pdl", "persistent")
GRAPH_OPS = ("bifpn", "head")
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


@dataclass
class Case:
    """A call of an op at the shapes of a model, and the least it can cost."""

    op: str
    arguments: tuple[Any, ...]
    options: dict[str, Any] = field(default_factory=dict)
    bytes: int = 0
    operations: int = 0
    #: For the reference, where it would unpack weights that our op takes packed only.
    unpacked: tuple[Any, ...] | None = None

    def run(self, module: Any) -> list[Tensor]:
        """The op's results, by ``edet_kernels`` or by ``edet_kernels.reference``."""
        unpacked = self.unpacked if module is reference else None
        arguments = self.arguments if unpacked is None else unpacked
        return self.listed(getattr(module, self.op)(*arguments, **self.options))

    @staticmethod
    def listed(found: Any) -> list[Tensor]:
        """An op's result as a list."""
        return [found] if isinstance(found, Tensor) else list(found)

    def to(self, dtype: torch.dtype) -> Case:
        """The same call with every float tensor in ``dtype``."""

        def cast(x: Any) -> Any:
            if isinstance(x, Tensor):
                return x.to(dtype) if x.is_floating_point() else x
            return type(x)(cast(y) for y in x) if isinstance(x, (list, tuple)) else x

        options = {name: cast(value) for name, value in self.options.items()}
        if "dtype" in options:
            options["dtype"] = dtype
        return Case(self.op, cast(self.arguments), options, unpacked=cast(self.unpacked))


@dataclass
class Maker:
    """Random arguments on a device."""

    config: ModelConfig
    batch: int
    dtype: torch.dtype
    device: torch.device

    def size(self, level: int) -> tuple[int, int]:
        """Rows and columns of the pyramid's map ``level`` steps above its finest."""
        h, w = self.config.image_size
        for _ in range(self.config.min_level + level):
            h, w = -(-h // 2), -(-w // 2)
        return h, w

    def map(self, channels: int, size: tuple[int, int]) -> Tensor:
        x = torch.randn(self.batch, channels, *size, device=self.device, dtype=self.dtype)
        return x.contiguous(memory_format=torch.channels_last)

    def weight(self, *shape: int, scale: float = 1.0) -> Tensor:
        return (torch.randn(shape, device=self.device) * scale).to(self.dtype).float()

    def separable(self, c: int, c_out: int) -> tuple[Tensor, ...]:
        return (
            self.weight(c, 1, 3, 3, scale=1 / 3),
            self.weight(c_out, c, 1, 1, scale=c**-0.5),
            self.weight(c_out),
            self.weight(c_out),
        )


def _cost(case: Case, results: Sequence[tuple[int, ...]], operations: int) -> Case:
    """Sets the least bytes: every argument once and results, in the maps' type, once."""
    tensors: list[Tensor] = []

    def collect(x: Any) -> None:
        if isinstance(x, Tensor):
            tensors.append(x)
        elif isinstance(x, (list, tuple)):
            for y in x:
                collect(y)

    collect(case.arguments)
    element = min(t.element_size() for t in tensors if t.is_floating_point())
    case.bytes = sum(t.numel() * t.element_size() for t in tensors)
    case.bytes += element * sum(torch.Size(shape).numel() for shape in results)
    case.operations = operations
    return case


def _node(make: Maker, level: int, inputs: Sequence[int], fusion: str = "fast") -> Case:
    c, (h, w) = make.config.width, make.size(level)
    maps = [make.map(c, make.size(i)) for i in inputs]
    edges = torch.ones(len(maps), device=make.device)
    case = Case("fusion_node", (maps, edges, *make.separable(c, c)))
    case.options = {"size": (h, w), "fusion": fusion}
    return _cost(case, [(make.batch, c, h, w)], 2 * make.batch * h * w * c * (9 + c))


def _layer(make: Maker) -> Case:
    c, levels = make.config.width, make.config.levels
    sizes = [make.size(level) for level in range(levels)]
    maps = [make.map(c, size) for size in sizes]
    pixels = make.batch * sum(h * w for h, w in sizes)
    case = Case("separable_conv", (maps, *make.separable(c, c)))
    return _cost(case, [(make.batch, c, *size) for size in sizes], 2 * pixels * c * (9 + c))


def _bifpn(make: Maker) -> Case:
    c, levels = make.config.width, make.config.levels
    graph = graph_of([bifpn_nodes(levels)] * make.config.cells, levels)
    count, sizes = len(graph.nodes), make.config.level_sizes
    maps = [make.map(c, size) for size in sizes]
    edges = None
    if make.config.fusion != "sum":
        edges = torch.ones(count, max(map(len, graph.edges)), device=make.device)
    dw, pw, scales, shifts = zip(*(make.separable(c, c) for _ in range(count)), strict=True)
    scale, shift = torch.stack(scales), torch.stack(shifts)
    packed = [torch.stack([edet_kernels.pack_depthwise(w) for w in dw]),
              torch.stack([edet_kernels.pack_pointwise(w) for w in pw])]  # fmt: skip
    case = Case("bifpn", (maps, edges, *packed, scale, shift))
    rows = [] if edges is None else [edges[i, : len(ids)] for i, ids in enumerate(graph.edges)]
    case.unpacked = (maps, rows or None, list(dw), list(pw), scale, shift)
    node_sizes = [sizes[node.level] for node in graph.nodes]
    case.options = {"nodes": graph.edges, "sizes": node_sizes, "outputs": graph.outputs,
                    "fusion": make.config.fusion}  # fmt: skip
    pixels = make.batch * sum(h * w for h, w in node_sizes)
    shapes = [(make.batch, c, *size) for size in sizes]
    return _cost(case, shapes, 2 * pixels * c * (9 + c))


def _head(make: Maker) -> Case:
    c, levels = make.config.width, make.config.levels
    sizes = [make.size(level) for level in range(levels)]
    outs = [c] * make.config.head_repeats + [9 * 90]
    layers = zip(*(make.separable(c, c_out) for c_out in outs), strict=True)
    case = Case("head", ([make.map(c, size) for size in sizes], *map(list, layers)))
    pixels = make.batch * sum(h * w for h, w in sizes)
    shapes = [(make.batch, outs[-1], *size) for size in sizes]
    return _cost(case, shapes, 2 * pixels * c * sum(9 + c_out for c_out in outs))


def _lateral(make: Maker) -> Case:
    c_in, c, size = 320, make.config.width, make.size(2)
    count, pixels = 3, make.batch * size[0] * size[1]
    weights = [make.separable(c_in, c)[1:] for _ in range(count)]
    case = Case("lateral", (make.map(c_in, size), *(list(w) for w in zip(*weights, strict=True))))
    return _cost(case, [(make.batch, c, *size)] * count, 2 * pixels * c_in * c * count)


def _stem(make: Maker) -> Case:
    h, w = make.config.image_size
    image = torch.randint(256, (make.batch, 3, h, w), device=make.device, dtype=torch.uint8)
    weights = (make.weight(32, 3, 3, 3, scale=0.2), make.weight(32), make.weight(32))
    out = (make.batch, 32, -(-h // 2), -(-w // 2))
    case = Case("stem", (image, *weights), {"dtype": make.dtype})
    return _cost(case, [out], 2 * 27 * torch.Size(out).numel())


def _mbconv(make: Maker) -> Case:
    c, middle, size = 40, 240, make.size(0)
    norm = (make.weight(middle), make.weight(middle))
    squeeze = (make.weight(10, middle, 1, 1), make.weight(10))
    excite = (make.weight(middle, 10, 1, 1), make.weight(middle))
    arguments = (
        make.map(c, size),
        (make.weight(middle, c, 1, 1, scale=c**-0.5), *norm),
        (make.weight(middle, 1, 5, 5, scale=0.2), *norm),
        (*squeeze, *excite),
        (make.weight(c, middle, 1, 1, scale=middle**-0.5), make.weight(c), make.weight(c)),
    )
    pixels = make.batch * size[0] * size[1]
    case = Case("mbconv", arguments, {"residual": True})
    return _cost(case, [(make.batch, c, *size)], 2 * pixels * middle * (2 * c + 25))


def _detect(make: Maker) -> Case:
    sizes = [make.size(level) for level in range(make.config.levels)]
    anchors = torch.rand(9 * sum(h * w for h, w in sizes), 4, device=make.device) * 64
    anchors[:, 2:] += anchors[:, :2] + 16
    classes = [make.map(9 * 90, size) for size in sizes]
    boxes = [0.1 * make.map(9 * 4, size) for size in sizes]
    return _cost(Case("detect", (classes, boxes, anchors)), [], 0)


#: What is timed: rows of the table.
CASES: dict[str, Callable[[Maker], Case]] = {
    "fusion_node, P3 of 2": lambda make: _node(make, 0, (0, 1)),
    "fusion_node, P4 of 3": lambda make: _node(make, 1, (1, 1, 0)),
    "fusion_node, softmax": lambda make: _node(make, 0, (0, 1), "softmax"),
    "bifpn": _bifpn,
    "head": _head,
    "separable_conv": _layer,
    "lateral": _lateral,
    "stem": _stem,
    "mbconv": _mbconv,
    "detect": _detect,
}


class Judge:
    """The right result of a case, and how far from it a variant may be.

    Args:
        what: the case, for messages.
        case: its arguments.
        dtype: of the maps.
    """

    def __init__(self, what: str, case: Case, dtype: torch.dtype) -> None:
        self.what, self.op, self.dtype = what, case.op, dtype
        if case.op == "detect":
            self.expected, self.eager = case.run(reference), 0.0
            return
        self.expected = case.to(torch.float64).run(reference)
        self.eager = relative_difference(case.to(dtype).run(reference), self.expected)

    def check(self, name: str, found: Sequence[Tensor]) -> float:
        """The error of the variant ``name`` as a fraction of the largest value.

        Raises:
            CheckFailed: it is wrong.
        """
        if self.op == "detect":
            check_detections(f"{self.what}, {name}", found, self.expected)
            return 0.0
        error = relative_difference(found, self.expected)
        gate(self.what, {name: error}, self.eager, self.dtype)
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


def variant(name: str, op: str) -> Callable[[Case], list[Tensor]]:
    """What one of :data:`VARIANTS` does with a case of ``op``; compiled once for all its cases."""
    if name.startswith(OURS):
        return lambda case: case.run(edet_kernels)
    if name.startswith("Triton"):

        def by_triton(case: Case) -> list[Tensor]:
            with edet_kernels.backend("triton"):
                return case.run(edet_kernels)

        return by_triton
    if not name.startswith("compile"):
        return lambda case: case.run(reference)
    mode = "max-autotune" if name.endswith("max-autotune") else None
    function = torch.compile(getattr(reference, op), mode=mode, fullgraph=True, dynamic=False)

    def compiled(case: Case) -> list[Tensor]:
        arguments = case.arguments if case.unpacked is None else case.unpacked
        return Case.listed(function(*arguments, **case.options))

    return compiled


def measure(calls: Sequence[Callable[[], Any]], seconds: float) -> dict[str, Any]:
    """Times ``calls`` in turn by device events; several when the cache is to be cold."""
    for call in calls:
        call()
    torch.cuda.synchronize()
    samples: list[float] = []
    while len(samples) < 20 or (sum(samples) < 1e3 * seconds and len(samples) < 1000):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        for call in calls:
            call()
        end.record()
        end.synchronize()
        samples.append(start.elapsed_time(end) / len(calls))
    return report.summary(samples)


def ceilings(dtype: torch.dtype) -> dict[str, float]:
    """Measured bytes per second of a large copy and operations per second of a large product."""
    x = torch.empty(2**29, dtype=torch.uint8, device="cuda")
    y = torch.empty_like(x)
    copy = measure([lambda: y.copy_(x)], 0.3)["median_ms"]
    a, b = (torch.randn(8192, 8192, device="cuda", dtype=dtype) for _ in range(2))
    product = measure([lambda: a @ b], 0.3)["median_ms"]
    return {
        "bytes_per_second": 2e3 * x.numel() / copy,
        "operations_per_second": 2e3 * 8192**3 / product,
    }


def rows(
    title: str, make: Maker, names: Sequence[str], caches: Sequence[str], seconds: float
) -> list[dict[str, Any]]:
    """The op at one model's shapes, every variant that runs and is right: a row for each cache.

    Raises:
        CheckFailed: ours is wrong.
        RuntimeError: ours cannot run.
    """
    if any(name.startswith("compile") for name in names):
        torch.compiler.reset()  # or the compiler would make one program for the shapes of all rows
    case = CASES[title](make)
    judge = Judge(title, case, make.dtype)
    copies = max(2, min(64, COLD_BYTES // max(case.bytes, 1))) if "cold" in caches else 1
    cases = [case] + [CASES[title](make) for _ in range(copies - 1)]
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
            "model": make.config.name,
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
        (title, Maker(get_config(model), batch, DTYPES[dtype], torch.device(DEVICE)))
        for model in args.models
        for batch in args.batches
        for dtype in args.dtypes
        for title in args.cases
    ]
    found: dict[tuple[Any, ...], dict[str, Any]] = {}
    for compiled in (False, True):
        names = [name for name in args.variants if name.startswith("compile") == compiled]
        for i, (title, make) in enumerate(cases if names else []):
            what = f"{title}, {make.config.name}, batch {make.batch}, {make.dtype}"
            if time.monotonic() > end:
                rest = len(cases) - i
                result["left_out"].append(f"{', '.join(names)}: {rest} of {len(cases)} cases")
                break
            try:
                for row in rows(title, make, names, args.caches, args.seconds):
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
            args.output.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")


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
    args.output.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    print(markdown(result))
    if result["failures"]:
        sys.exit("\n".join(f"{what}: {why}" for what, why in result["failures"].items()))


if __name__ == "__main__":
    main()
