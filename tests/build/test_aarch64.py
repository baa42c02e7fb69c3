"""The CPU kernels are plain C++ that also compiles for 64-bit Arm."""

import os
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
COMPILER = os.environ.get("EDET_AARCH64_CXX", "aarch64-linux-gnu-g++")


@pytest.mark.slow
def test_kernels_compile(tmp_path: Path) -> None:
    if shutil.which(COMPILER) is None:
        pytest.skip(f"needs {COMPILER}")
    options = ["-std=c++17", "-O1", "-Wall", "-Wextra", "-Werror", "-Icsrc", "-DEDET_ISA=baseline"]
    info = ("EDET_VERSION", "EDET_CPU_INFO", "EDET_CUDA_INFO", "EDET_SANITIZE_INFO")
    options += [f'-D{name}=""' for name in info]
    for source in sorted([*ROOT.glob("csrc/cpu/*.cpp"), *ROOT.glob("csrc/core/*.cpp")]):
        command = [COMPILER, *options, "-c", str(source), "-o", str(tmp_path / "object.o")]
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr[-3000:]
