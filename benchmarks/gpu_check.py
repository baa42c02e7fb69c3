"""Everything that only a GPU can tell, in one command: build, test, sanitize, time.

``make gpu-check`` runs it with the Python at hand, which needs torch ≥ 2.10, cmake, ninja and
pytest; no network. Results go to one folder; the GPU's settings are left as they are.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
STEPS = ("build", "test", "sanitize", "benchmark")
TOOLS = ("memcheck", "racecheck", "synccheck")


def plan(steps: Sequence[str], folder: Path, sanitizer: str | None) -> list[tuple[str, list[str]]]:
    """The commands of ``steps``, in order, each with a name for its log."""
    python = sys.executable
    pytest = [python, "-m", "pytest", "-q", "-m", "gpu", "-p", "no:cacheprovider"]
    commands: list[tuple[str, list[str]]] = []
    if "build" in steps:
        commands.append(("build", [python, "setup.py", "--quiet", "build_ext", "--inplace"]))
    if "test" in steps:
        commands.append(("test", pytest))
    if "sanitize" in steps and sanitizer:
        small = [*pytest, "tests/kernels/test_gpu.py", "-k", "sanitize"]
        for tool in TOOLS:
            command = [sanitizer, "--tool", tool, "--error-exitcode", "1", *small]
            commands.append((f"sanitize-{tool}", command))
    if "benchmark" in steps:
        command = [python, "benchmarks/gpu.py", "--models", "tf_efficientdet_d0",
                   "tf_efficientdet_d3", "--batches", "1", "64", "--dtypes", "float16",
                   "--output", str(folder / "gpu.json")]  # fmt: skip
        commands.append(("benchmark", command))
    return commands


def find_sanitizer() -> str | None:
    """compute-sanitizer, from PATH or the CUDA toolkit."""
    homes = [os.environ.get(name, "") for name in ("CUDA_HOME", "CUDA_PATH")]
    folders = [os.environ.get("PATH", ""), *(f"{home}/bin" for home in homes if home)]
    return shutil.which(
        "compute-sanitizer", path=os.pathsep.join([*folders, "/usr/local/cuda/bin"])
    )


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
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
    }


def main(argv: Sequence[str] | None = None) -> None:
    """Runs from the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--steps", nargs="+", default=list(STEPS), choices=STEPS)
    parser.add_argument("--output", type=Path, default=ROOT / "gpu-check")
    args = parser.parse_args(argv)
    found = device()
    args.output.mkdir(parents=True, exist_ok=True)
    sanitizer = find_sanitizer()
    if "sanitize" in args.steps and sanitizer is None:
        print("compute-sanitizer was not found: that step is left out")
    env = {**os.environ, "EDET_CUDA": "1", "EDET_CUDA_ARCHS": str(found["capability"])}
    env["PYTHONPATH"] = os.pathsep.join([str(ROOT), str(ROOT / "python")])
    results: dict[str, object] = {"device": found, "steps": {}}
    failed = []
    for name, command in plan(args.steps, args.output, sanitizer):
        print(f"{name} …", flush=True)
        start = time.monotonic()
        with (args.output / f"{name}.log").open("w") as log:
            code = subprocess.run(
                command, cwd=ROOT, env=env, stdout=log, stderr=subprocess.STDOUT, check=False
            ).returncode
        steps = results["steps"]
        assert isinstance(steps, dict)
        steps[name] = {"code": code, "seconds": round(time.monotonic() - start, 1)}
        (args.output / "result.json").write_text(json.dumps(results, indent=1) + "\n")
        if code:
            failed.append(name)
            if name == "build":
                break
    if failed:
        sys.exit(f"failed: {', '.join(failed)}; see the logs in {args.output}")
    print(f"all passed; results in {args.output}")


if __name__ == "__main__":
    main()
