"""Runs the models on a CPU against their rivals: checked first, then timed in turns in one process.

``make bench-cpu`` runs it with everything installed; docs/benchmarks.md says how it measures.
"""

from __future__ import annotations

import argparse
import datetime
import itertools
import os
import platform
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))  # as a program, only this file's own folder is searched

import edet_kernels  # noqa: E402
from benchmarks import rivals  # noqa: E402
from benchmarks.case import STAGES, Case, log  # noqa: E402
from benchmarks.cpu_rows import fusion_rows, memory_rows, scaling_rows, stage_row  # noqa: E402
from edet.bench import report  # noqa: E402
from edet.bench.measure import machine_name  # noqa: E402
from edet.bench.result import OURS  # noqa: E402
from edet_kernels import library  # noqa: E402
from edet_kernels.testing import timing as timer  # noqa: E402
from edet_kernels.testing.numeric import (  # noqa: E402
    CheckFailed,
)
from edet_kernels.testing.timing import CPU_SIDES, TURN_SECONDS  # noqa: E402


def machine() -> dict[str, Any]:
    """The processor and the instruction set that our kernels were chosen for."""
    info = library.build_info()
    capability = torch.backends.cpu.get_cpu_capability()
    usable = {"AVX512": "avx512", "AVX2": "avx2"}.get(capability, "baseline")
    if usable == "avx512" and torch.cpu._is_avx512_bf16_supported():
        usable = "amx" if torch.cpu._is_amx_tile_supported() else "avx512_bf16"
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


def cases(
    models: Sequence[str], dtypes: Sequence[str], batches: Sequence[int], *,
    size: int | None, threads: int, effdet: Path | None,
) -> Iterator[Case]:  # fmt: skip
    """A case of each dtype, model and batch, one after the other; its files go with it."""
    torch.set_num_threads(threads)
    for dtype, model, batch in itertools.product(dtypes, models, batches):
        with tempfile.TemporaryDirectory() as folder:
            torch._dynamo.reset()  # what was compiled for other cases is not needed any more
            kind, path = getattr(torch, dtype), Path(folder)
            yield Case.create(model, size, kind, threads, path, batch=batch, effdet=effdet)


def check_only(given: Iterable[Case], stages: Sequence[str], names: Sequence[str]) -> list[str]:
    """Checks everything and times nothing; the messages of what :func:`run` would refuse."""
    refused = []
    for case in given:
        for stage in stages:
            log(f"{case.title}: checking {stage}")
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
    batches: Sequence[int] = (1,),
    effdet: Path | None = None,
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
        "settings": {
            **timing,
            "turn_seconds": TURN_SECONDS,
            "peak": "fastest of torch.mm and the pointwise product",
        },
        "peak_gflops": peaks,
        "rows": [],
        "scaling": [],
        "memory": [],
        "fusion": [],
    }
    for case in cases(models, dtypes, batches, size=size, threads=threads, effdet=effdet):
        # arithmetic in bfloat16 that is emulated is bounded by that in float32
        for kind in {torch.float32, case.dtype}:
            peak = timer.product_peak(torch.device("cpu"), kind, CPU_SIDES)
            peaks[case.dtype_name] = max(peaks[case.dtype_name], 1e-9 * peak)
        first = len(case.images) == batches[0]
        for stage in stages:
            log(f"{case.title}: {stage}")
            row = stage_row(case, stage, names, timing)
            result["rows"].append(row)
            if stage == "network" and scaling and threads > 1 and first:
                result["scaling"] += scaling_rows(case, row, timing)
        if memory and first:
            log(f"{case.title}: memory")
            result["memory"] += memory_rows(case, names)
        if fusion and first and case.dtype == torch.float32:
            log(f"{case.title}: softmax and fast fusion")
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
    python = ROOT / ".venv-peers" / "bin" / "python"
    parser = argparse.ArgumentParser(
        description="Times EfficientDet on this CPU against its rivals.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    add: Callable[..., Any] = parser.add_argument
    add("--models", nargs="+", default=defaults)
    add("--size", type=int, help="side of the image instead of the model's own")
    add("--dtype", nargs="+", default=["float32", "bfloat16"], choices=["float32", "bfloat16"])
    add("--batch-size", nargs="+", type=int, default=[1], help="images at once; "
        "the first also gives the rows of scaling, memory and fusion")  # fmt: skip
    add("--effdet", type=Path, default=python if python.exists() else None,
        help="a Python with effdet, onnx and onnxscript; its export is a rival")  # fmt: skip
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
    if min(args.batch_size) < 1:
        parser.error(f"--batch-size must be at least 1, got {min(args.batch_size)}")
    if not library.load():
        log(f"warning: {library.status()}")
    if args.check:
        names = (*args.rivals, OURS)
        given = cases(args.models, args.dtype, args.batch_size, size=args.size,
                      threads=args.threads, effdet=args.effdet)  # fmt: skip
        refused = check_only(given, args.stages, names)
        sys.exit("\n".join(refused) or 0)
    try:
        result = run(
            args.models,
            args.dtype,
            threads=args.threads,
            stages=args.stages,
            names=(*args.rivals, OURS),
            size=args.size,
            batches=args.batch_size,
            effdet=args.effdet,
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
