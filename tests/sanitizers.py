"""What tests of builds with sanitizers share: CMake, and pytest in their environment."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PATH = f"{Path(sys.executable).parent}:{os.environ['PATH']}"


def run(command: Sequence[str | Path], **variables: str) -> subprocess.CompletedProcess[str]:
    """Runs a command in the project's folder, with the best instruction set of its library."""
    inherited = {name: value for name, value in os.environ.items() if name != "EDET_CPU_ISA"}
    return subprocess.run(
        [str(part) for part in command], env={**inherited, **variables}, cwd=ROOT,
        capture_output=True, text=True, check=False,
    )  # fmt: skip


def cmake(*arguments: str | Path) -> None:
    """Runs CMake; skips the test where there is none, or no compiler."""
    program = shutil.which("cmake", path=PATH)
    if program is None or shutil.which(os.environ.get("CXX", "g++")) is None:
        pytest.skip("needs cmake and g++")
    done = run([program, *arguments])
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]


def build(folder: Path, *target: str) -> None:
    """Builds a configured folder, or a target of it."""
    named = ["--target", *target] if target else []
    cmake("--build", folder, "--parallel", str(os.cpu_count() or 1), *named)


def python(*arguments: str | Path, **variables: str) -> subprocess.CompletedProcess[str]:
    """Runs Python with the sanitizers' libraries, which must be loaded before anything else."""
    compiler = os.environ.get("CXX", "g++")
    names = ("libasan.so", "libubsan.so")
    runtimes = [run([compiler, f"-print-file-name={name}"]).stdout.strip() for name in names]
    return run(
        [sys.executable, *arguments],
        LD_PRELOAD=" ".join(runtimes),
        ASAN_OPTIONS="detect_leaks=0",  # Python itself leaks at exit
        **variables,
    )


def assert_tests_pass(*arguments: str | Path, **variables: str) -> None:
    """Runs pytest as :func:`python` does."""
    options = ["-q", "-x", "-p", "no:cacheprovider"]
    done = python("-m", "pytest", *options, *arguments, **variables)
    assert done.returncode == 0, done.stdout[-5000:] + done.stderr[-5000:]
    assert " passed" in done.stdout
