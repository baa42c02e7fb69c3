"""The CUDA kernels as ptxas sees them, without a GPU: for 7.5 and 9.0, or every architecture.

No spills, no local memory, registers within the budget at the top of each file, and tensor cores
where it says so.
"""

from __future__ import annotations

import importlib.util
import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest

from benchmarks.gpu_model import sass

ROOT = Path(__file__).resolve().parents[2]
SOURCES = sorted((ROOT / "csrc/cuda").glob("*.cu"))
WHEEL_ARCHS = ("75", "80", "86", "89", "90", "100", "120")
# all of them take a quarter of an hour; these two have the most different instructions
ARCHS = WHEEL_ARCHS if os.environ.get("EDET_TEST_ARCHS") == "all" else ("75", "90")


def budget(source: Path) -> tuple[int, bool]:
    """The most registers of a thread, and whether the kernels use tensor cores."""
    found = re.search(r"^// Budget: (\d+) registers(, tensor cores)?\.$", source.read_text(), re.M)
    assert found, f"{source.name} must say '// Budget: N registers[, tensor cores].'"
    return int(found[1]), bool(found[2])


def find_cuobjdump(nvcc: str) -> str | None:
    """The disassembler: of CUDA, or of the package triton."""
    beside = Path(nvcc).resolve().with_name("cuobjdump")
    if beside.is_file():
        return str(beside)
    triton = importlib.util.find_spec("triton")
    if triton and triton.origin:
        packed = Path(triton.origin).parent / "backends/nvidia/bin/cuobjdump"
        if packed.is_file():
            return str(packed)
    return shutil.which("cuobjdump")


@pytest.mark.parametrize("source", SOURCES, ids=lambda p: p.stem)
def test_every_file_has_a_budget(source):
    registers, _ = budget(source)
    assert registers <= 255


@pytest.mark.slow
@pytest.mark.parametrize("arch", ARCHS)
@pytest.mark.parametrize("source", SOURCES, ids=lambda p: p.stem)
def test_kernels_stay_in_their_budget(source, arch, script, monkeypatch):
    nvcc = script.find_nvcc(os.environ)
    if nvcc is None:
        pytest.skip("needs nvcc")
    monkeypatch.setenv("NVCC", nvcc)
    try:  # once for all tests: the gauge's are of the same code
        cubin = sass.compile_source(source, int(arch), ROOT / "build" / "gpu-model")
    except RuntimeError as error:
        if "Unsupported gpu architecture" in str(error):
            pytest.skip(f"this nvcc does not know sm_{arch}")
        raise
    said = cubin.with_suffix(".txt").read_text()
    most, tensor_cores = budget(source)
    frames = re.findall(r"(\d+) bytes stack frame, (\d+) .*stores, (\d+) .*loads", said)
    registers = [int(number) for number in re.findall(r"Used (\d+) registers", said)]
    assert frames and len(frames) == len(registers)
    assert set(frames) == {("0", "0", "0")}
    assert max(registers) <= most
    assert not re.search(r"\d+ bytes smem", said)  # shared memory is the launcher's

    cuobjdump = find_cuobjdump(nvcc) if tensor_cores else None
    if cuobjdump is None:
        return
    listing = subprocess.run([cuobjdump, "-sass", str(cubin)], capture_output=True, text=True)
    assert listing.returncode == 0, listing.stderr
    kernels = re.split(r"^\s*Function : ", listing.stdout, flags=re.M)[1:]
    assert len(kernels) == len(registers)
    for kernel in kernels:
        name = kernel.split("\n", 1)[0]
        if "tf32" in name:
            assert (" HMMA." in kernel and ".TF32" in kernel) == (arch != "75"), name
            continue
        # squeeze-excite's two layers, of one pixel; weights that become operands; what Turing does
        # not run, because it lacks asynchronous copies
        if re.search("5gatesI|6narrowI", name) or (arch == "75" and "gemm_cu" in name):
            assert "HMMA" not in kernel, name
            continue
        # floats are multiplied by FMA, and Turing's tensor cores know no bfloat16
        wanted = "__half" in name or ("bfloat16" in name and arch != "75")
        assert ("HMMA" in kernel) == wanted, name
