"""The op tests again, on CPU kernels compiled with AddressSanitizer and UBSan."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parents[2]
FILES = ("test_ops.py", "test_bifpn.py", "test_nms.py", "test_detect.py")


def _runtimes() -> list[str]:
    """The sanitizers' libraries, which must be loaded before anything else."""
    compiler = os.environ.get("CXX", "g++")
    return [
        subprocess.run(
            [compiler, f"-print-file-name={name}"], capture_output=True, text=True, check=True
        ).stdout.strip()
        for name in ("libasan.so", "libubsan.so")
    ]


@pytest.fixture(scope="module")
def sanitized() -> Path:
    cmake = shutil.which("cmake", path=f"{Path(sys.executable).parent}:{os.environ['PATH']}")
    if cmake is None or shutil.which(os.environ.get("CXX", "g++")) is None:
        pytest.skip("needs cmake and g++")
    if not (ROOT / "CMakeLists.txt").is_file():
        pytest.skip("needs the source tree")
    folder = ROOT / "build" / "sanitized"
    ninja = shutil.which("ninja", path=f"{Path(sys.executable).parent}:{os.environ['PATH']}")
    options = [
        "-DEDET_CUDA=OFF",
        "-DEDET_SANITIZE=address,undefined",
        "-DEDET_ISAS=baseline",  # the same source; intrinsics are not looked into anyway
        "-DCMAKE_CXX_FLAGS=-DEDET_BF16_PAIRS",  # as CPUs with bf16 instructions multiply
        f"-DEDET_TORCH_DIR={Path(torch.__file__).parent}",
        *(["-G", "Ninja", f"-DCMAKE_MAKE_PROGRAM={ninja}"] if ninja else []),
    ]
    for command in (
        [cmake, "-S", str(ROOT), "-B", str(folder), *options],
        [cmake, "--build", str(folder), "--parallel", str(os.cpu_count() or 1)],
    ):
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return folder / "libedet_kernels.so"


def _environment(path: Path) -> dict[str, str]:
    return {
        **os.environ,
        "LD_PRELOAD": " ".join(_runtimes()),
        "ASAN_OPTIONS": "detect_leaks=0",  # Python itself leaks at exit
        "EDET_LIBRARY": str(path),
    }


@pytest.mark.slow
def test_ops_under_sanitizers(sanitized: Path) -> None:
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider"]
    command += ["-k", "not triton and not emulated and not reference"]  # of the backends
    files = [str(Path(__file__).parent / name) for name in FILES]
    done = subprocess.run(
        [*command, *files],
        env=_environment(sanitized), cwd=ROOT, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-5000:] + done.stderr[-5000:]
    assert " passed" in done.stdout


@pytest.mark.slow
def test_the_sanitizer_is_on(sanitized: Path) -> None:
    code = (
        "import torch, edet_kernels\n"
        "weight = torch.zeros(1, 27, 16)\n"
        "weight.untyped_storage().resize_(64)\n"  # the kernel will read past its end
        "assert edet_kernels.library.load(), edet_kernels.library.status()\n"
        "torch.ops.edet_kernels.stem(torch.zeros(1, 3, 8, 8), weight, torch.zeros(16),\n"
        "    torch.zeros(16), None, None, [0, 0], [4, 4], 0, torch.float32)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code],
        env=_environment(sanitized), cwd=ROOT, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode != 0
    assert "AddressSanitizer: heap-buffer-overflow" in done.stderr, done.stderr[-3000:]
