"""Everything that only a GPU can tell, in one command and ten minutes: build, test, sanitize, time.

``make gpu-check`` runs it with the Python at hand, which needs torch ≥ 2.10, cmake, ninja and
pytest; no network. Results go to one folder; the GPU's settings are left as they are. A step that
fails or takes too long costs no other its results. Arguments after ``--`` are the benchmark's:

    python benchmarks/gpu_check.py --steps test benchmark -- --models tf_efficientdet_d0 --cases
"""

from __future__ import annotations

import argparse
import contextlib
import importlib.util
import json
import os
import platform
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "python")]  # as a program, only its own folder is searched
STEPS = ("build", "test", "triton", "sanitize", "benchmark")
#: The steps without any asked for; the kernels' own tests on Triton take a while.
DEFAULT_STEPS = ("build", "test", "sanitize", "benchmark")
#: Of compute-sanitizer. initcheck follows what is written by all kernels, PyTorch's too: a report
#: is about ours only where it names one of edet::cuda.
TOOLS = ("memcheck", "racecheck", "synccheck", "initcheck")
#: Seconds that all steps may take, and each; the benchmark, which is last, may take what is left.
TOTAL, LIMITS = 570, {"build": 180, "test": 100, "triton": 120, "sanitize": 100}
#: Processes that run tests at once, at most: each holds a part of the GPU's memory.
WORKERS = 12
#: Seconds of one test; the compiler takes most of them.
TEST_SECONDS = 80
#: Of these the benchmark keeps some to end by itself, with what it has.
SPARE = 20
#: Bytes of a log that are kept: its end.
LOG_BYTES = 2**20
#: Files that hold tests for a GPU: the others may need packages that are not there.
TESTS = (
    "tests/kernels/test_gpu.py",
    "tests/fused/test_module.py",
    "tests/models/test_on_gpu.py",
    "tests/detection/test_on_gpu.py",
    "tests/training/test_on_gpu.py",
    "tests/dropin/test_on_gpu.py",
)
#: Files whose tests of Triton's kernels run on a GPU where there is one, else interpreted.
TRITON_TESTS = ("tests/kernels/test_ops.py", "tests/kernels/test_autograd.py")
#: What is timed unless asked for otherwise.
BENCHMARK = [
    *("--models", "tf_efficientdet_d0", "tf_efficientdet_d3", "--batches", "1", "64"),
    *("--dtypes", "float16"),
]


@dataclass
class Part:
    """A command of a step, and what its environment has more."""

    name: str
    command: list[str]
    variables: dict[str, str] = field(default_factory=dict)


def has(module: str) -> bool:
    """Whether a module can be imported."""
    return importlib.util.find_spec(module) is not None


def pytest_command(*, parallel: bool) -> list[str]:
    """pytest, without what a machine with another torch would warn of.

    Args:
        parallel: whether several processes share the tests, where pytest-xdist is installed, and
            a test has a limit, where pytest-timeout is; a sanitizer slows some of them too much.
    """
    command = [sys.executable, "-m", "pytest", "-q", "-W", "default", "-p", "no:cacheprovider"]
    if parallel and has("xdist"):
        command += ["-n", str(max(1, min(WORKERS, (os.cpu_count() or 1) - 2)))]
    if parallel and has("pytest_timeout"):
        command += ["--timeout", str(TEST_SECONDS)]
    return command


def plan(
    steps: Sequence[str],
    folder: Path,
    sanitizer: str | None,
    benchmark: Sequence[str] = (),
    tools: Sequence[str] = TOOLS,
) -> dict[str, list[Part]]:
    """The commands of each of ``steps``, in order; those of a step run at once.

    Args:
        steps: of :data:`STEPS`.
        folder: for results.
        sanitizer: compute-sanitizer; without it the step is left out.
        benchmark: arguments of benchmarks/gpu.py; :data:`BENCHMARK` when empty.
        tools: of :data:`TOOLS`.
    """
    commands: dict[str, list[Part]] = {}
    if "build" in steps:
        command = [sys.executable, "setup.py", "--quiet", "build_ext", "--inplace"]
        commands["build"] = [Part("build", command)]
    if "test" in steps:
        tests = [*pytest_command(parallel=True), "-m", "gpu", *TESTS]
        commands["test"] = [Part("test", tests)]
    if "triton" in steps:
        tests = [*pytest_command(parallel=True), "-k", "triton", *TRITON_TESTS]
        commands["triton"] = [Part("triton", tests)]
    if "sanitize" in steps and sanitizer:
        small = [*pytest_command(parallel=False), "-m", "gpu", "-k", "sanitize", TESTS[0]]
        # torch's allocator hands out parts of blocks, whose ends memcheck would not see, nor
        # initcheck what of them was written before
        whole = {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
        commands["sanitize"] = [
            Part(
                tool,
                [sanitizer, "--tool", tool, "--error-exitcode", "1", *small],
                whole if tool in ("memcheck", "initcheck") else {},
            )
            for tool in tools
        ]
    if "benchmark" in steps:
        command = [sys.executable, "benchmarks/gpu.py", *(benchmark or BENCHMARK),
                   "--output", str(folder / "gpu.json")]  # fmt: skip
        commands["benchmark"] = [Part("benchmark", command)]
    return commands


def find_sanitizer() -> str | None:
    """compute-sanitizer, from PATH or the CUDA toolkit."""
    homes = [os.environ.get(name, "") for name in ("CUDA_HOME", "CUDA_PATH")]
    folders = [os.environ.get("PATH", ""), *(f"{home}/bin" for home in homes if home)]
    return shutil.which(
        "compute-sanitizer", path=os.pathsep.join([*folders, "/usr/local/cuda/bin"])
    )


def driver() -> str:
    """What nvidia-smi says of the driver, clocks and limits; or why it says nothing."""
    keys = "name,driver_version,clocks.max.sm,clocks.max.mem,power.limit,mig.mode.current"
    command = ["nvidia-smi", f"--query-gpu={keys}", "--format=csv"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=20, check=False)
    except (OSError, subprocess.TimeoutExpired) as error:
        return f"nvidia-smi: {error}"
    return (done.stdout or done.stderr).strip()


def device() -> dict[str, object]:
    """The GPU, as torch sees it.

    Raises:
        SystemExit: there is none.
    """
    import torch

    if not torch.cuda.is_available():
        sys.exit("torch finds no CUDA GPU: nothing is checked")
    properties = torch.cuda.get_device_properties(0)
    return {
        "name": properties.name,
        "capability": f"{properties.major}{properties.minor}",
        "multiprocessors": properties.multi_processor_count,
        "memory": properties.total_memory,
        "driver": driver(),
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "python": platform.python_version(),
        "cores": os.cpu_count(),
    }


def end(process: subprocess.Popen[bytes]) -> None:
    """Ends a process and all it has started."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def run(parts: Sequence[Part], log: Path, env: dict[str, str], limit: float) -> dict[str, object]:
    """Runs the commands of a step at once; their exit codes, or "too long" after ``limit`` seconds.

    Their outputs go to ``log``, one after the other, each cut to its end.
    """
    start = time.monotonic()
    running = []
    for part in parts:
        own = log.with_suffix(f".{part.name}")
        with own.open("wb") as stream:
            running.append(
                (part, own, subprocess.Popen(
                    part.command, cwd=ROOT, env={**env, **part.variables}, stdout=stream,
                    stderr=subprocess.STDOUT, stdin=subprocess.DEVNULL, start_new_session=True,
                ))
            )  # fmt: skip
    codes: dict[str, int | str] = {}
    try:
        for part, _, process in running:
            try:
                left = max(0.0, start + limit - time.monotonic())
                codes[part.name] = process.wait(timeout=left)
            except subprocess.TimeoutExpired:
                codes[part.name] = "too long"
    finally:
        for _, _, process in running:
            end(process)
    with log.open("wb") as whole:
        for part, own, _ in running:
            whole.write(f"=== {part.name}: {codes[part.name]}\n".encode())
            output = own.read_bytes()
            whole.write(output[-LOG_BYTES:] + b"\n")
            own.unlink()
    return {"codes": codes, "seconds": round(time.monotonic() - start, 1)}


def parse(argv: Sequence[str]) -> tuple[argparse.Namespace, list[str]]:
    """The command line: its own arguments, and the benchmark's.

    Raises:
        SystemExit: one is wrong, also of the benchmark, which would be the last to say so.
    """
    own, benchmark = list(argv), list[str]()
    if "--" in own:
        at = own.index("--")
        own, benchmark = own[:at], own[at + 1 :]
    parser = argparse.ArgumentParser(
        description=__doc__.splitlines()[0] if __doc__ else None,
        usage="%(prog)s [options] [-- arguments of benchmarks/gpu.py]",
    )
    add = parser.add_argument
    built = [step for step in DEFAULT_STEPS if step != "build" or "EDET_LIBRARY" not in os.environ]
    add("--steps", nargs="+", default=built, choices=STEPS,
        help="all but triton; build not where EDET_LIBRARY names a library")  # fmt: skip
    add("--tools", nargs="+", default=list(TOOLS), choices=TOOLS, help="of compute-sanitizer")
    add("--output", type=Path, default=ROOT / "gpu-check")
    add("--seconds", type=float, default=TOTAL, help="for all steps together")
    args = parser.parse_args(own)
    for option in ("--output", "--limit"):
        if option in benchmark:
            parser.error(f"{option} of the benchmark is given by --output and --seconds")
    if benchmark:
        from benchmarks import gpu

        gpu.parse(benchmark)
    return args, benchmark


def main(argv: Sequence[str] | None = None) -> None:
    """Runs from the command line."""
    args, benchmark = parse(sys.argv[1:] if argv is None else argv)
    start = time.monotonic()
    found = device()
    args.output.mkdir(parents=True, exist_ok=True)
    sanitizer = find_sanitizer()
    if "sanitize" in args.steps and sanitizer is None:
        print("compute-sanitizer was not found: that step is left out")
    env = {**os.environ, "EDET_CUDA": "1", "EDET_CUDA_ARCHS": str(found["capability"])}
    env["PYTHONPATH"] = os.pathsep.join([str(ROOT), str(ROOT / "python")])
    steps: dict[str, object] = {}
    failed = []
    commands = plan(args.steps, args.output.resolve(), sanitizer, benchmark, args.tools)
    for name, parts in commands.items():
        left = start + args.seconds - time.monotonic()
        limit = min(LIMITS.get(name, left), left)
        if name == "benchmark":
            parts[0].command += ["--limit", str(max(0.0, limit - SPARE))]
        print(f"{name} (at most {max(limit, 0):.0f} s) …", flush=True)
        outcome = run(parts, args.output / f"{name}.log", env, limit)
        steps[name] = outcome
        failed += [part for part, code in outcome["codes"].items() if code != 0]  # type: ignore[attr-defined]
        text = json.dumps({"device": found, "steps": steps}, indent=1) + "\n"
        (args.output / "result.json").write_text(text, encoding="utf-8")
        if name in failed and name == "build":
            break  # an older library, if any, is not what is to be checked
    if failed:
        sys.exit(f"failed: {', '.join(failed)}; see the logs in {args.output}")
    print(f"all passed; results in {args.output}")


if __name__ == "__main__":
    main()
