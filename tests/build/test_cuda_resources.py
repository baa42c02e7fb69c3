"""The CUDA kernels as ptxas sees them, without a GPU: no spills, no local memory, few registers."""

from __future__ import annotations

import os
import re
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
MOST_REGISTERS = 64  # 4 blocks of 256 threads on a multiprocessor


@pytest.mark.slow
@pytest.mark.parametrize("arch", ["75", "90", "120"])
@pytest.mark.parametrize("source", sorted((ROOT / "csrc/cuda").glob("*.cu")), ids=lambda p: p.stem)
def test_kernels_stay_in_registers(source, arch, tmp_path, script):
    nvcc = script.find_nvcc(os.environ)
    if nvcc is None:
        pytest.skip("needs nvcc")
    compiled = subprocess.run(
        [nvcc, "-std=c++17", "-O3", f"-arch=sm_{arch}", "-Xptxas=-v", "-cubin", str(source),
         "-o", str(tmp_path / "a.cubin")],
        capture_output=True,
        text=True,
        check=False,
    )  # fmt: skip
    if "Unsupported gpu architecture" in compiled.stderr:
        pytest.skip(f"this nvcc does not know sm_{arch}")
    assert compiled.returncode == 0, compiled.stderr
    frames = re.findall(r"(\d+) bytes stack frame, (\d+) .*stores, (\d+) .*loads", compiled.stderr)
    registers = [int(number) for number in re.findall(r"Used (\d+) registers", compiled.stderr)]
    assert frames and len(frames) == len(registers)
    assert set(frames) == {("0", "0", "0")}
    assert max(registers) <= MOST_REGISTERS
