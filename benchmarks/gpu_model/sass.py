"""Reads the machine code of CUDA kernels: instructions, scheduling fields, source functions.

Fields of a 128-bit instruction (from sm_70 on): stall cycles in bits 105-108, yield in 109, the
scoreboard that its result sets in 110-112 (7: none), the one that reading its operands sets in
113-115, the scoreboards it waits for in 116-121.
"""

from __future__ import annotations

import fcntl
import functools
import hashlib
import importlib.util
import os
import pickle
import re
import shutil
import subprocess
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
SOURCES = ROOT / "csrc" / "cuda"
NONE = 7  # no scoreboard


@dataclass(frozen=True)
class Instruction:
    """One instruction; ``functions`` are the source functions it is of, outermost first."""

    address: int
    guard: str  # of its predicate: "", "P0", "!P0", "UP1" …
    name: str  # with its modifiers
    operands: tuple[str, ...]
    stall: int
    sets: int
    read_sets: int
    waits: int
    functions: tuple[str, ...]
    targets: tuple[str, ...] = ()  # labels of an indirect branch

    @functools.cached_property
    def op(self) -> str:
        """Its name without modifiers."""
        return self.name.split(".")[0]


@dataclass
class Kernel:
    """One compiled kernel."""

    symbol: str
    name: str  # demangled, without namespaces: ``node<Product<f16, 1, 2>>``
    arch: int
    registers: int
    code: list[Instruction] = field(default_factory=list)
    labels: dict[str, int] = field(default_factory=dict)  # of the code's addresses
    jump_table: bytes = b""
    actions: list[Any] = field(default_factory=list)  # of the code, once it has been executed

    @functools.cached_property
    def index(self) -> dict[int, int]:
        """Of an address in the code."""
        return {at.address: i for i, at in enumerate(self.code)}


def find_disassembler() -> str | None:
    """``nvdisasm``: of CUDA, or of the package triton; None where there is none."""
    if found := shutil.which("nvdisasm"):
        return found
    triton = importlib.util.find_spec("triton")
    if triton and triton.origin:
        packed = Path(triton.origin).parent / "backends/nvidia/bin/nvdisasm"
        if packed.is_file():
            return str(packed)
    return None


def find_compiler() -> str | None:
    """``nvcc``: NVCC, of CUDA_HOME or of the path; None where there is none."""
    for candidate in (os.environ.get("NVCC"), f"{os.environ.get('CUDA_HOME', '')}/bin/nvcc"):
        if candidate and Path(candidate).is_file():
            return candidate
    return shutil.which("nvcc")


def plain_name(symbol: str) -> str:
    """A demangled kernel without return type, parameters and namespaces.

    The same for the kernel as nvcc and as the emulation's compiler call it.
    """
    name = symbol.split("(edet::cuda::(anonymous namespace)::")[0]
    name = re.sub(r"\((?!anonymous)[^()]*\)$", "", name)  # a parameter that is in no namespace
    name = re.sub(r"edet::(cuda|emulation)::|\(anonymous namespace\)::|_GLOBAL__N__\w+::", "", name)
    name = name.removeprefix("void ").replace("__half", "f16").replace("__nv_bfloat16", "bf16")
    return re.sub(r"\s*([<>,])\s*", r"\1", re.sub(r"\((?:int|bool|FuseKind)\)", "", name)).replace(
        ",", ", "
    )


def demangle(symbols: list[str]) -> list[str]:
    """What c++filt makes of the symbols."""
    done = subprocess.run(
        ["c++filt"], input="\n".join(symbols), capture_output=True, text=True, check=True
    )
    return done.stdout.splitlines()


# ---- which function a line belongs to ----

_FUNCTION = re.compile(r"\s*(EDET_DEVICE|EDET_EVERYWHERE|constexpr EDET_DEVICE)\b|\w+\(EDET_PARAMS")
_NOT_FUNCTIONS = {"if", "for", "while", "switch", "return", "EDET_KERNEL", "EDET_BLOCKS"}


@functools.cache
def _functions(path: str) -> tuple[tuple[int, int, str], ...]:
    """First line, last line and name of each function of a source in the project's format."""
    try:
        lines = Path(path).read_text(encoding="utf-8").splitlines()
    except OSError:
        return ()
    found: list[tuple[int, int, str]] = []
    for i, line in enumerate(lines):
        indent = len(line) - len(line.lstrip())
        if indent > 2 or line.lstrip().startswith(("//", "#")):
            continue
        if not _FUNCTION.match(line):
            continue
        names = [n for n in re.findall(r"(\w+)\(", line) if n not in _NOT_FUNCTIONS]
        if not names:
            continue
        end = i
        if line.count("{") != line.count("}") or "{" not in line:
            closing = f"{' ' * indent}}}"
            end = next((j for j in range(i + 1, len(lines)) if lines[j].startswith(closing)), i)
        found.append((i + 1, end + 1, names[0]))
    return tuple(found)


def function_of(path: str, line: int) -> str:
    """The function around a line of a source; empty where there is none."""
    inside = [f for f in _functions(path) if f[0] <= line <= f[1]]
    return max(inside)[2] if inside else ""


# ---- disassembly ----

_TEXT = re.compile(r"^\.text\.(\S+):")
_LABEL = re.compile(r"^\s*(\.L_x_\d+|\$\S+):")
_PLACE = re.compile(r'//## File "([^"]+)", line (\d+)( inlined at)?')
_CODE = re.compile(r"^\s*/\*([0-9a-f]{4,})\*/\s+(.*?)\s*;?\s*/\* 0x([0-9a-f]{16}) \*/")
_HIGH = re.compile(r"/\* 0x([0-9a-f]{16}) \*/")
_PARTS = re.compile(r"(?:@(!?U?P\w+)\s+)?(\S+)\s*(.*)")


def _operands(text: str) -> tuple[str, ...]:
    """The operands, apart from commas within brackets."""
    return tuple(part.strip().replace(".reuse", "") for part in re.split(r",(?![^\[]*\])", text)
                 if part.strip())  # fmt: skip


def _instruction(match: re.Match[str], high: int, functions: tuple[str, ...]) -> Instruction:
    def bits(first: int, count: int) -> int:
        return high >> (first - 64) & ((1 << count) - 1)

    text = match[2]
    targets = tuple(re.findall(r"\.L_x_\d+", text)) if "BRANCH_TARGETS" in text else ()
    parts = _PARTS.match(re.sub(r"\(\*.*?\*\)", "", text).rstrip(" ;"))
    assert parts, text
    return Instruction(
        int(match[1], 16), parts[1] or "", parts[2], _operands(parts[3]),
        bits(105, 4), bits(110, 3), bits(113, 3), bits(116, 6), functions, targets,
    )  # fmt: skip


def parse(listing: str, arch: int, registers: dict[str, int], wanted: str = "") -> list[Kernel]:
    """The kernels of a listing of ``nvdisasm -hex -gi -c`` that have ``wanted`` in their symbol."""
    kernels: list[Kernel] = []
    pending: list[str] = []
    places: list[tuple[str, int]] = []
    functions: tuple[str, ...] = ()
    after_code = True  # whether a place begins a new list
    lines = iter(listing.splitlines())
    skipping = True
    for line in lines:
        if match := _TEXT.match(line):
            skipping = wanted not in match[1]
            if skipping:
                continue
            kernels.append(Kernel(match[1], "", arch, registers.get(match[1], 0)))
            functions, places = (), []
        elif skipping:
            continue
        elif match := _PLACE.search(line):
            places = [] if after_code else places
            places.append((match[1], int(match[2])))
            after_code = False
        elif match := _LABEL.match(line):
            pending.append(match[1])
        elif match := _CODE.match(line):
            if not after_code:
                named = [function_of(*place) for place in reversed(places)]
                functions = tuple(name for name in named if name)
                after_code = True
            high = _HIGH.search(next(lines))
            assert high, line
            kernels[-1].labels.update(dict.fromkeys(pending, int(match[1], 16)))
            pending = []
            kernels[-1].code.append(_instruction(match, int(high[1], 16), functions))
    for kernel, name in zip(kernels, demangle([k.symbol for k in kernels]), strict=True):
        kernel.name = plain_name(name)
    return kernels


def _section(cubin: bytes, name: str) -> bytes:
    """A section of an ELF file, empty where it has none."""

    def number(at: int, size: int) -> int:
        return int.from_bytes(cubin[at : at + size], "little")

    headers, size, count, names = number(40, 8), number(58, 2), number(60, 2), number(62, 2)
    strings = number(headers + names * size + 24, 8)
    for i in range(count):
        header = headers + i * size
        at = strings + number(header, 4)
        if cubin[at : cubin.index(b"\0", at)] == name.encode():
            begin = number(header + 24, 8)
            return cubin[begin : begin + number(header + 32, 8)]
    return b""


def compile_source(source: Path, arch: int, folder: Path) -> Path:
    """Compiles a .cu to a cubin in ``folder``, unless it is there: named by all sources' content.

    Beside it lies what ptxas says. Raises RuntimeError when the compiler fails or is missing.
    """
    nvcc = find_compiler()
    if nvcc is None:
        raise RuntimeError("needs nvcc: set CUDA_HOME to the folder of a CUDA toolkit from 12.0 on")
    content = hashlib.sha256()
    for path in sorted([*SOURCES.glob("*.*h"), *(ROOT / "csrc/core").glob("*.h"), source]):
        content.update(path.read_bytes())
    cubin = folder / f"{source.stem}-{arch}-{content.hexdigest()[:16]}.cubin"
    if cubin.is_file():
        return cubin
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / f"{source.stem}-{arch}.lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # another process may be compiling it
        if not cubin.is_file():
            _compile(nvcc, source, arch, cubin)
    return cubin


def _compile(nvcc: str, source: Path, arch: int, cubin: Path) -> None:
    """Writes ``cubin`` and, beside it, what ptxas says."""
    made = cubin.with_suffix(".part")
    done = subprocess.run(
        [nvcc, "-std=c++17", "-O3", "-lineinfo", f"-arch=sm_{arch}", "-Xptxas=-v", "-cubin",
         str(source), "-o", str(made)],
        capture_output=True,
        text=True,
        check=False,
    )  # fmt: skip
    if done.returncode:
        raise RuntimeError(f"{source.name} does not compile for sm_{arch}:\n{done.stderr}")
    cubin.with_suffix(".txt").write_text(done.stderr)
    made.rename(cubin)


def read_kernels(source: Path, arch: int, folder: Path, wanted: str = "") -> dict[str, Kernel]:
    """The kernels of a .cu, by name, compiled for ``sm_<arch>``; see :func:`compile_source`.

    Only those with ``wanted`` in their symbol: ``__half`` for maps of float16.
    """
    disassembler = find_disassembler()
    if disassembler is None:
        raise RuntimeError("needs nvdisasm: of CUDA, or of the package triton")
    cubin = compile_source(source, arch, folder)
    kept = cubin.with_suffix(f".{wanted or 'all'}.pickle")
    if kept.is_file():
        found: dict[str, Kernel] = pickle.loads(kept.read_bytes())
        return found
    said = cubin.with_suffix(".txt").read_text()
    registers = {
        name: int(count)
        for name, count in re.findall(
            r"Compiling entry function '(\S+)'.*?Used (\d+) registers", said, re.S
        )
    }
    listing = subprocess.run(
        [disassembler, "-hex", "-gi", "-c", str(cubin)], capture_output=True, text=True, check=True
    ).stdout
    kernels = parse(listing, arch, registers, wanted)
    content = cubin.read_bytes()
    for kernel in kernels:
        kernel.jump_table = _section(content, f".nv.constant2.{kernel.symbol}")
    found = {kernel.name: kernel for kernel in kernels}
    kept.write_bytes(pickle.dumps(found))
    return found
