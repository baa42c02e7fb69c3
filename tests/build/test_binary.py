"""The compiled library as a file: what it needs and shows, and that instruction sets stay apart."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from edet_kernels import library

ROOT = Path(__file__).resolve().parents[2]

pytestmark = [
    pytest.mark.skipif(not library.load(), reason=library.status()),
    pytest.mark.skipif(shutil.which("readelf") is None, reason="needs readelf and nm (binutils)"),
]


def run(*command: str) -> str:
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def dynamic_symbols(kind: str) -> set[str]:
    """Names in the library's dynamic symbol table: kind is "defined" or "undefined"."""
    lines = run("nm", "-D", f"--{kind}-only", "--format=posix", str(library.path())).splitlines()
    return {line.split()[0].split("@")[0] for line in lines}


def test_needs_libtorch_and_nothing_that_is_not_everywhere():
    needed = set(re.findall(r"NEEDED.*\[(.*)\]", run("readelf", "-d", str(library.path()))))
    system = {"libstdc++.so.6", "libgcc_s.so.1", "libm.so.6", "libc.so.6"}
    system |= {"libpthread.so.0", "libdl.so.2", "librt.so.1"}
    loaders = {name for name in needed if name.startswith("ld-linux")}
    sanitizers = {name for name in needed if re.match(r"lib(asan|ubsan|tsan|lsan)\.", name)}
    # libtorch.so: what makes the weak CUDA stream symbol resolve
    assert "libtorch.so" in needed
    assert needed - system - loaders - sanitizers == {"libtorch.so", "libtorch_cpu.so"}


#: The newest versions of manylinux_2_28: glibc 2.28 and the libraries of GCC 8.
MANYLINUX = {"GLIBC": (2, 28), "GLIBCXX": (3, 4, 24), "CXXABI": (1, 3, 11), "GCC": (7, 0, 0)}


def test_loads_on_systems_as_old_as_manylinux_2_28():
    if library.build_info().sanitize:
        pytest.skip("sanitizers need newer symbols")
    symbols = run("objdump", "-T", str(library.path())).splitlines()
    needed = {m for s in symbols if "*UND*" in s for m in re.findall(r"\(?([A-Z]+)_([\d.]+)\)?", s)}
    assert {kind for kind, _ in needed} <= set(MANYLINUX) and len(needed) > 5
    newer = [f"{k}_{v}" for k, v in needed if tuple(map(int, v.split("."))) > MANYLINUX[k]]
    assert newer == [], [s for s in symbols if any(f"({name})" in s for name in newer)]


def test_has_no_search_path_of_the_machine_it_was_built_on():
    assert not re.search(r"\((RPATH|RUNPATH)\)", run("readelf", "-d", str(library.path())))


def test_uses_no_python():
    assert [name for name in dynamic_symbols("undefined") if re.match("_?Py", name)] == []


def test_shows_only_the_build_info():
    assert dynamic_symbols("defined") == {"edet_build_info", "edet_tile_schedule"}


def test_only_the_stream_is_asked_of_libtorch_cuda_and_only_weakly():
    lines = run("nm", "-D", "--undefined-only", "--format=posix", str(library.path())).splitlines()
    types = dict(line.split()[:2] for line in lines)
    asked = {name for name in types if re.search("cuda", name, re.IGNORECASE)}
    assert asked <= {"aoti_torch_device_type_cuda", "aoti_torch_get_current_cuda_stream"}
    assert types.get("aoti_torch_get_current_cuda_stream", "w") == "w"


def test_stable_abi_of_torch_2_10():
    pytest.importorskip("torch_abi_audit", reason="needs torch-abi-audit")
    audit = (sys.executable, "-m", "torch_abi_audit.cli", "--json")
    report = json.loads(run(*audit, str(library.path())))
    (file,) = report["bundled_libs"]
    assert file["torch"]["stable"]
    assert file["torch"]["unstable_symbols"] == file["torch"]["unknown_shim_symbols"] == []
    assert file["torch"]["min_torch_version"] == "2.10.0"


@pytest.mark.parametrize(
    ("kind", "isa"),
    [
        *(("cpu", isa) for isa in ("avx2", "avx512", "avx512_bf16", "amx")),
        *(("int8", isa) for isa in ("avx2", "avx2_vnni", "avx512", "avx512_vnni", "amx")),
    ],
)
def test_no_function_of_one_instruction_set_can_be_linked_into_another(kind, isa):
    """A weak symbol may be merged with its namesake, and AVX-512 code run where there is none."""
    pattern = f"build/*/CMakeFiles/edet_{kind}_{isa}.dir/csrc/cpu/*.cpp.o"
    objects = [path for path in ROOT.glob(pattern) if path.parts[-6] in ("cpu", "cuda")]
    if not objects:
        pytest.skip("the library was not built in this tree for this instruction set")
    for path in objects:
        symbols = run("nm", "--defined-only", "--demangle", str(path)).splitlines()
        shared = [line for line in symbols if re.match(r"\w+ [A-Zuvw] ", line)]
        assert shared, "an object without a function says nothing"
        foreign = [line for line in shared if f"edet::cpu::{isa}::" not in line]
        assert foreign == []
