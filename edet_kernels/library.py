"""Finds and loads the compiled op library; says exactly what is missing and what to do about it.

Nothing here runs at import, and nothing here raises because of a missing or unusable library: every
op has a reference to fall back on. ``EDET_LIBRARY`` names another file to load; 0 means none.
Python that runs in a source folder imports the package from there: the library of an installed copy
of the same version is taken then.
"""

from __future__ import annotations

import ctypes
import functools
import importlib.metadata
import inspect
import os
import platform
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from .fakes import fake_kernel

FILE_NAME = "libedet_kernels.so"

_BUILD = "run 'make build' (or 'pip install .') in the source tree"
#: ELF's e_machine for what platform.machine() says.
_ELF_MACHINES = {"x86_64": 62, "aarch64": 183}


@dataclass(frozen=True)
class BuildInfo:
    """What a compiled library holds.

    Attributes:
        version: of edet-kernels.
        cpu: instruction sets of the CPU kernels, e.g. ("baseline", "avx2", "avx512").
        cuda: version of nvcc, or "" for a library without CUDA kernels.
        cuda_archs: compute capabilities as CMake writes them: "90-real" is machine code,
            "120-virtual" is PTX, "120" is both.
        sanitize: the sanitizers it was compiled with.
    """

    version: str
    cpu: tuple[str, ...]
    cuda: str
    cuda_archs: tuple[str, ...]
    sanitize: tuple[str, ...]


def path() -> Path | None:
    """The file to load: ``EDET_LIBRARY``, else the one beside this module, else an installed one.

    None when disabled; the place beside this module when there is none.
    """
    setting = os.environ.get("EDET_LIBRARY", "")
    if setting == "0":
        return None
    if setting:
        return Path(setting)
    own = Path(__file__).with_name(FILE_NAME)
    return own if own.is_file() else _installed() or own


def _installed() -> Path | None:
    """The library of an installed copy of this version, where the package is imported from here."""
    from . import __version__  # not at the top: the package imports this module

    for distribution in importlib.metadata.distributions(name="edet-kernels"):
        file = Path(str(distribution.locate_file(f"{__package__}/{FILE_NAME}")))
        if distribution.version == __version__ and file.is_file():
            return file
    return None


def _unfit(file: Path) -> str:
    """Why this machine's loader must not even try ``file``; empty when its ELF header is right."""

    def field(start: int, stop: int) -> int:
        return int.from_bytes(header[start:stop], "little")

    with file.open("rb") as stream:
        header = stream.read(64)
    if header[:4] != b"\x7fELF" or len(header) < 64:
        return "it is not a shared library of this system"
    machine = field(18, 20)
    if machine != _ELF_MACHINES.get(platform.machine(), machine):
        return f"it was built for another processor than this {platform.machine()}"
    # the table of sections is what a linker writes last; the loader would crash on missing pages
    if file.stat().st_size < field(40, 48) + field(58, 60) * field(60, 62):
        return "it is incomplete"
    return ""


def _explain(error: str) -> str:
    """The loader's error message in plain words."""
    symbol = re.search(r"undefined symbol: (\w+)", error)
    if symbol:
        return (
            f"it was built for another torch: torch {torch.__version__} has no {symbol[1]} "
            "(torch >= 2.10 is needed)"
        )
    version = re.search(r"version `(\S+)' not found", error)
    if version:
        return f"it was built on a newer system: this one lacks {version[1]}"
    return error


def _read_build_info(file: Path) -> BuildInfo:
    """What ``file``, which the loader accepts, says of itself."""
    function = ctypes.CDLL(str(file)).edet_build_info
    function.restype = ctypes.c_char_p
    fields = dict(line.split("=", 1) for line in function().decode().splitlines())
    cuda, _, archs = fields["cuda"].partition(" ")
    return BuildInfo(
        version=fields["version"],
        cpu=tuple(fields["cpu"].split(",")),
        cuda="" if cuda == "none" else cuda,
        cuda_archs=tuple(archs.split(",")) if archs else (),
        sanitize=tuple(name for name in fields["sanitize"].split(",") if name),
    )


@functools.cache
def _attempt() -> BuildInfo | str:
    """Loads the library, once per process: what it holds, or why it cannot be used."""
    from . import __version__  # not at the top: the package imports this module

    file = path()
    if file is None:
        return "the op library is switched off by EDET_LIBRARY=0"
    if not file.is_file():
        if os.environ.get("EDET_LIBRARY"):
            return f"EDET_LIBRARY names {file}, which is not a file"
        return f"the op library is not built ({file} is missing): {_BUILD}"
    try:
        reason = _unfit(file)
        if not reason:
            torch.ops.load_library(file)
            info = _read_build_info(file)
            if info.version == __version__:
                return info
            reason = f"it is of edet-kernels {info.version}, this is {__version__}"
    except (AttributeError, OSError, RuntimeError) as error:
        reason = _explain(str(error.__cause__ or error))  # torch wraps the loader's own words
    return f"{file} cannot be used: {reason}. To mend it, {_BUILD}"


def load() -> bool:
    """Loads the op library, once per process; whether its ops are there."""
    return isinstance(_attempt(), BuildInfo)


def symbol(name: str) -> Any:
    """A C function of the loaded library.

    Raises:
        AttributeError: it has none of that name.
    """
    return getattr(ctypes.CDLL(str(path())), name)


def has_op(name: str) -> bool:
    """Whether the loaded library holds the op; an old build may lack one that Python has.

    Or have it with other arguments: the op's fake kernel tells how many it gets today.
    """
    if not load() or not hasattr(torch.ops.edet_kernels, name):
        return False
    schema = getattr(torch.ops.edet_kernels, name).default._schema
    try:
        inspect.signature(fake_kernel(name)).bind(*schema.arguments)
    except TypeError:
        return False
    return True


def missing(op: str) -> str:
    """Why the library has no kernel for ``op``, if nobody asked for that; or ""."""
    if not load():
        return "" if os.environ.get("EDET_LIBRARY") == "0" else status()
    return "" if has_op(op) else f"{path()} is older than this package: {_BUILD}"


def build_info() -> BuildInfo | None:
    """What the loaded library holds; None when there is none."""
    attempt = _attempt()
    return attempt if isinstance(attempt, BuildInfo) else None


def _runs_on(arch: str, capability: tuple[int, int]) -> bool:
    """Whether code for ``arch`` runs on a GPU: machine code in its major version, PTX upwards."""
    number, _, kind = arch.partition("-")
    built = divmod(int(number.rstrip("af")), 10)
    if number[-1].isalpha():  # architecture-specific code runs on nothing else
        return built == capability
    machine_code = kind != "virtual" and built[0] == capability[0] and built <= capability
    return machine_code or (kind != "real" and built <= capability)


def cuda_refusal(capability: tuple[int, int]) -> str:
    """Why the library's CUDA kernels do not run on a GPU; empty when they do.

    Args:
        capability: the GPU's compute capability, as ``torch.cuda.get_device_capability`` gives it.
    """
    info = _attempt()
    if isinstance(info, str):
        return info
    if not info.cuda:
        return "the op library was built without CUDA kernels: build it where nvcc is installed"
    if any(_runs_on(arch, capability) for arch in info.cuda_archs):
        return ""
    number = f"{capability[0]}{capability[1]}"
    return (
        f"the op library was built for compute capabilities {', '.join(info.cuda_archs)}, this GPU "
        f"has {number}: build it with EDET_CUDA_ARCHS={number}"
    )


def status() -> str:
    """One sentence: the library loaded and what it holds, or what is missing and what to do."""
    info = _attempt()
    if isinstance(info, str):
        return info
    cuda = f"CUDA {info.cuda} for {', '.join(info.cuda_archs)}" if info.cuda else "no CUDA kernels"
    sanitize = f", sanitizers {', '.join(info.sanitize)}" if info.sanitize else ""
    return f"loaded {path()}: CPU kernels {', '.join(info.cpu)}; {cuda}{sanitize}"
