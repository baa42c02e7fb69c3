"""Compiles the op library with CMake and ninja, and packs it; all metadata is in pyproject.toml.

Environment variables (docs/build.md explains each):
    EDET_CUDA        1: compile the CUDA kernels; 0: do not; auto (default): when nvcc works
    EDET_CUDA_ARCHS  compute capabilities to compile for, e.g. "90" or "75;80;90+PTX"
    EDET_SANITIZE    sanitizers to compile with, e.g. "address,undefined"
    EDET_EMULATION   1: also build the module that runs the CUDA kernels on the host, for the tests
    EDET_BUILD       0: install without the op library (every op then runs its PyTorch reference)
    MAX_JOBS         how many compilers run at once
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
import os
import re
import shutil
import subprocess
import sys
import sysconfig
from collections.abc import Mapping, Sequence
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_ext import build_ext
from setuptools.errors import SetupError

ROOT = Path(__file__).resolve().parent
LIBRARY = "libedet_kernels.so"
DEFAULT_CUDA_ARCHS = "75;80;86;89;90;100;120+PTX"
CUDA_ARCHS_OPTION = "-DCMAKE_CUDA_ARCHITECTURES="
OLDEST_TORCH = (2, 10)
SANITIZERS = ("address", "leak", "thread", "undefined")
GIB_PER_JOB = 2  # what one compiler may need at its worst


def find_tool(name: str, env: Mapping[str, str]) -> str:
    """Returns the path of cmake or ninja: this Python's own first, then what is on PATH."""
    path = os.pathsep.join([str(Path(sys.executable).parent), env.get("PATH", "")])
    found = shutil.which(name, path=path)
    if found is None:
        raise SetupError(f"{name} is missing. Run: {sys.executable} -m pip install {name}")
    return found


def check_compiler(env: Mapping[str, str]) -> None:
    """Raises SetupError when there is no C++ compiler that CMake would find."""
    wanted = env.get("CXX", "").split()[:1] or ["c++", "g++", "clang++"]
    if not any(shutil.which(name, path=env.get("PATH")) for name in wanted):
        raise SetupError(
            f"no C++ compiler: {', '.join(wanted)} not found on PATH. Install g++ (Debian, Ubuntu: "
            "apt install g++; Fedora: dnf install gcc-c++) or set CXX to your compiler; or set "
            "EDET_BUILD=0 to install without the op library."
        )


def find_torch() -> Path:
    """Returns the folder of the package torch, without importing it.

    An isolated build sees no packages of the environment it is for; torch is looked for there too.
    """
    folders = list(dict.fromkeys(sysconfig.get_path(name) for name in ("purelib", "platlib")))
    spec = importlib.util.find_spec("torch")
    if spec is not None and spec.submodule_search_locations:
        package = Path(spec.submodule_search_locations[0])
        version = importlib.metadata.version("torch")
    else:
        found = [d for d in importlib.metadata.distributions(name="torch", path=folders)]
        if not found:
            raise SetupError(
                f"torch is missing in {sys.executable}. A build without isolation needs it: "
                "install torch >= 2.10 first."
            )
        package, version = Path(str(found[0].locate_file("torch"))), found[0].version
    if tuple(int(part) for part in re.findall(r"\d+", version)[:2]) < OLDEST_TORCH:
        raise SetupError(f"torch {version} is too old: install torch >= 2.10 and build again.")
    return package


def find_nvcc(env: Mapping[str, str]) -> str | None:
    """Returns nvcc's path, from CUDACXX, CUDA_HOME, CUDA_PATH, PATH or /usr/local/cuda."""
    if env.get("CUDACXX"):
        return shutil.which(env["CUDACXX"], path=env.get("PATH"))
    homes = [Path(env[name]) / "bin" for name in ("CUDA_HOME", "CUDA_PATH") if env.get(name)]
    folders = [*homes, env.get("PATH", ""), "/usr/local/cuda/bin"]
    return shutil.which("nvcc", path=os.pathsep.join(map(str, folders)))


def cuda_archs(setting: str | None, known: set[str]) -> str:
    """Translates EDET_CUDA_ARCHS into CMake's CMAKE_CUDA_ARCHITECTURES.

    ``known`` holds the compute capabilities nvcc can compile for, e.g. {"75", "90", "90a"}. Without
    a setting the result is the part of DEFAULT_CUDA_ARCHS that nvcc knows.
    """
    archs = []
    for item in re.split(r"[;,\s]+", (setting or DEFAULT_CUDA_ARCHS).strip()):
        match = re.fullmatch(r"(\d{2,3}[af]?)(\+PTX)?", item)
        if match is None:
            raise SetupError(
                f"EDET_CUDA_ARCHS: {item!r} is not a compute capability. Write them without a dot, "
                "for example EDET_CUDA_ARCHS='75;80;90+PTX'."
            )
        if match[1] in known:
            archs.append(match[1] + ("" if match[2] else "-real"))
        elif setting:
            names = sorted(known, key=lambda name: (int(name.rstrip("af")), name))
            raise SetupError(
                f"EDET_CUDA_ARCHS: this nvcc cannot compile for {match[1]}. It knows "
                f"{', '.join(names)}."
            )
    if not archs:
        raise SetupError(f"this nvcc knows none of {DEFAULT_CUDA_ARCHS}: install CUDA >= 12.")
    return ";".join(archs)


def cuda_options(env: Mapping[str, str]) -> list[str]:
    """Returns the CMake options that say whether and for what the CUDA kernels are compiled."""
    setting = (env.get("EDET_CUDA") or "auto").lower()
    if setting not in ("0", "1", "auto"):
        raise SetupError(f"EDET_CUDA must be 0, 1 or auto, got {setting!r}.")
    nvcc = find_nvcc(env) if setting != "0" else None
    if nvcc is None:
        if setting == "1":
            raise SetupError(
                "EDET_CUDA=1, but nvcc was not found. Install the CUDA toolkit and set CUDA_HOME "
                "to its folder, or set EDET_CUDA=0 for a library without CUDA kernels."
            )
        return ["-DEDET_CUDA=OFF"]
    listing = subprocess.run([nvcc, "--list-gpu-code"], capture_output=True, text=True, check=False)
    archs = cuda_archs(env.get("EDET_CUDA_ARCHS"), set(re.findall(r"sm_(\w+)", listing.stdout)))
    return [
        f"-DEDET_CUDA={'ON' if setting == '1' else 'AUTO'}",
        f"-DEDET_NVCC={nvcc}",
        f"{CUDA_ARCHS_OPTION}{archs}",
    ]


def sanitizers(env: Mapping[str, str]) -> list[str]:
    """Returns the names in EDET_SANITIZE."""
    names = re.findall(r"[^,\s]+", env.get("EDET_SANITIZE", ""))
    unknown = [name for name in names if name not in SANITIZERS]
    if unknown:
        raise SetupError(
            f"EDET_SANITIZE: unknown {', '.join(unknown)}; the sanitizers are "
            f"{', '.join(SANITIZERS)}."
        )
    return names


def jobs(env: Mapping[str, str]) -> int:
    """Returns how many compilers may run at once: MAX_JOBS, or what cores and memory allow."""
    setting = env.get("MAX_JOBS")
    if setting:
        if not re.fullmatch(r"[1-9]\d*", setting):
            raise SetupError(f"MAX_JOBS must be a positive whole number, got {setting!r}.")
        return int(setting)
    gib = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / 2**30
    return max(1, min(len(os.sched_getaffinity(0)), int(gib / GIB_PER_JOB)))


def build_folder(name: str, sanitizers: Sequence[str]) -> Path:
    """Returns where a build of this name with these sanitizers lies."""
    return ROOT / "build" / "-".join([name, *sanitizers])


def compile_target(
    target: str, folder: Path, options: Sequence[str], env: Mapping[str, str]
) -> None:
    """Configures ``folder`` and compiles what of ``target`` has changed.

    Raises SetupError when CMake or a compiler fails.
    """
    cmake, ninja = find_tool("cmake", env), find_tool("ninja", env)
    configure = [cmake, "-S", str(ROOT), "-B", str(folder), "-G", "Ninja"]
    configure += [f"-DCMAKE_MAKE_PROGRAM={ninja}", *options]

    # A cache made by another cmake, ninja or torch (isolated builds have a new one each time) or
    # for another compiler is not to be trusted. For other GPUs it is: a fresh one would lose the
    # CPU's objects too.
    tools = [word for word in configure if not word.startswith(CUDA_ARCHS_OPTION)]
    stamp, signature = folder / "configure.txt", "\n".join([*tools, env.get("CXX", "")])
    if not stamp.is_file() or stamp.read_text() != signature:
        configure.append("--fresh")
    build = [cmake, "--build", str(folder), "--target", target, "--parallel", str(jobs(env))]
    try:
        subprocess.run(configure, check=True)
        stamp.write_text(signature)
        subprocess.run(build, check=True)
    except subprocess.CalledProcessError as error:
        raise SetupError(
            f"compiling {target} failed: CMake's and the compiler's own words are above. "
            "Set EDET_BUILD=0 to install without the op library."
        ) from error


def build_library(env: Mapping[str, str]) -> Path:
    """Compiles what has changed and returns the library's path, under build/.

    Where EDET_EMULATION asks for it, the emulation of the CUDA kernels too.
    """
    if sys.platform != "linux":
        raise SetupError(
            f"the op library is built on Linux only, not on {sys.platform}. Set EDET_BUILD=0 to "
            "install without it."
        )
    check_compiler(env)
    names = sanitizers(env)
    common = [f"-DEDET_TORCH_DIR={find_torch()}", f"-DEDET_SANITIZE={','.join(names)}"]
    options = [*common, *cuda_options(env)]
    cpu_only = "-DEDET_CUDA=OFF" in options
    folder = build_folder("cpu" if cpu_only else "cuda", names)
    compile_target("edet_kernels", folder, options, env)
    if env.get("EDET_EMULATION") == "1":
        # A folder of its own: neither build's configuration depends on whether the other is wanted,
        # and they share no object file.
        options = [*common, "-DEDET_CUDA=OFF", "-DEDET_EMULATION=ON"]
        options.append(f"-DPython_EXECUTABLE={sys.executable}")
        compile_target("edet_emulation", build_folder("emulation", names), options, env)
    return folder / LIBRARY


class BuildLibrary(build_ext):
    """Builds the op library where setuptools would build a Python extension module."""

    def finalize_options(self) -> None:
        super().finalize_options()
        self.force = True  # always copy: the library of another configuration may be the older file

    def get_ext_filename(self, fullname: str) -> str:
        """Names the file without a Python tag: it holds no CPython symbol."""
        return str(Path(*fullname.split(".")[:-1], LIBRARY))

    def build_extension(self, ext: Extension) -> None:
        library = build_library(os.environ)
        target = Path(self.get_ext_fullpath(ext.name))
        target.parent.mkdir(parents=True, exist_ok=True)
        self.copy_file(str(library), str(target))


class AnyPythonWheel(bdist_wheel):
    """Tags the wheel py3-none-<platform>: one for every Python."""

    def get_tag(self) -> tuple[str, str, str]:
        return "py3", "none", super().get_tag()[2]


if __name__ == "__main__":
    build = os.environ.get("EDET_BUILD", "1")
    if build not in ("0", "1"):
        raise SystemExit(f"error: EDET_BUILD must be 0 or 1, got {build!r}.")
    library = Extension("edet_kernels.libedet_kernels", sources=[])
    setup(
        ext_modules=[library] if build == "1" else [],
        cmdclass={"build_ext": BuildLibrary, "bdist_wheel": AnyPythonWheel} if build == "1" else {},
    )
