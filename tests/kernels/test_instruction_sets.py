"""The op tests under every instruction set this CPU has; the variable is read once per process."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

#: Instruction sets, and what PyTorch calls the CPUs that have them.
SETS = {
    "baseline": ("DEFAULT", "AVX2", "AVX512"),
    "avx2": ("AVX2", "AVX512"),
    "avx512": ("AVX512",),
    "avx512_bf16": ("AVX512",),
    "amx": ("AVX512",),
}

#: Those that differ in maps of bytes, and the flag of the CPUs that have them; None: all of x86-64.
BYTE_SETS = {
    "baseline": None,
    "avx2": "avx2",
    "avx2_vnni": "avx_vnni",
    "avx512": "avx512bw",
    "avx512_vnni": "avx512_vnni",
    "amx": "amx_int8",
}


def run(instruction_set, *arguments):
    """Runs Python with ``instruction_set`` asked for.

    All combinations of a test's values run on the best one; here each two of them meet.
    """
    environment = dict(os.environ, EDET_CPU_ISA=instruction_set, EDET_POISON="1")
    environment["EDET_TEST_CASES"] = "pairs"
    environment.pop("EDET_BACKEND", None)
    return subprocess.run(
        [sys.executable, *arguments], env=environment, capture_output=True, text=True
    )


def is_there(instruction_set):
    """Whether this CPU has ``instruction_set``; elsewhere test_sanitizers emulates the last two."""
    there = torch.backends.cpu.get_cpu_capability() in SETS[instruction_set]
    if instruction_set in ("avx512_bf16", "amx"):
        there = there and torch.cpu._is_avx512_bf16_supported()
    if instruction_set == "amx":
        there = there and torch.cpu._is_amx_tile_supported()
    return there


@pytest.mark.slow
@pytest.mark.parametrize("instruction_set", SETS)
def test_ops(instruction_set):
    if not is_there(instruction_set):
        pytest.skip(f"this CPU has no {instruction_set}")
    names = ["bifpn", "nms", "detect"]
    if any(map(is_there, list(SETS)[list(SETS).index(instruction_set) + 1 :])):
        names += ["ops", "autograd"]  # which without this variable run on the best set
    files = [str(Path(__file__).with_name(f"test_{name}.py")) for name in names]
    options = ["-q", "-x", "-p", "no:cacheprovider"]
    options += ["-k", "not triton and not emulated and not reference"]  # of the backends
    result = run(instruction_set, "-m", "pytest", *options, *files)
    assert result.returncode == 0, result.stdout[-5000:] + result.stderr


@pytest.mark.slow
@pytest.mark.parametrize("instruction_set", BYTE_SETS)
def test_ops_on_bytes(instruction_set):
    flag, info = BYTE_SETS[instruction_set], Path("/proc/cpuinfo")
    if flag is not None and (not info.is_file() or f" {flag} " not in info.read_text()):
        pytest.skip(f"this CPU has no {instruction_set}")
    options = ["-q", "-x", "-p", "no:cacheprovider"]
    file = str(Path(__file__).with_name("test_int8.py"))
    result = run(instruction_set, "-m", "pytest", *options, file)
    assert result.returncode == 0, result.stdout[-5000:] + result.stderr


@pytest.mark.slow
def test_an_unknown_instruction_set_is_refused():
    code = """
import torch, edet_kernels
maps = [torch.zeros(1, 8, 4, 4)]
calls = (
    lambda: edet_kernels.weighted_fusion(maps, fusion="sum"),
    lambda: edet_kernels.detect(maps, maps, torch.zeros(32, 4)),  # throws inside its tasks
)
for call in calls * 2:  # not only the first time
    try:
        call()
    except ValueError as error:
        print(error)
"""
    result = run("avx1024", "-c", code)
    assert result.returncode == 0, result.stderr
    lines = result.stdout.splitlines()
    assert len(lines) == 4
    for line in lines:
        assert line.startswith("EDET_CPU_ISA must be one of ")
        assert line.endswith("baseline on this CPU, got 'avx1024'")
