"""The op tests again, on CPU kernels compiled with AddressSanitizer and UBSan.

They are compiled to multiply bfloat16 by instructions that this CPU may lack, in plain code.
"""

import shutil
from pathlib import Path

import pytest
import torch

import sanitizers

FILES = ("test_ops.py", "test_bifpn.py", "test_nms.py", "test_detect.py")

#: What the compiler is told to have bfloat16 multiplied as AVX512-BF16 and as AMX do.
PRODUCTS = {"pairs": "-DEDET_BF16_PAIRS", "tiles": "-DEDET_BF16_PAIRS -DEDET_EMULATED_TILES"}


def build_sanitized(products: str) -> Path:
    """Returns the library that multiplies so, compiled with sanitizers."""
    if not (sanitizers.ROOT / "CMakeLists.txt").is_file():
        pytest.skip("needs the source tree")
    folder = sanitizers.ROOT / "build" / f"sanitized-{products}"
    ninja = shutil.which("ninja", path=sanitizers.PATH)
    options = [
        "-DEDET_CUDA=OFF",
        "-DEDET_SANITIZE=address,undefined",
        "-DEDET_ISAS=baseline",  # the same source; intrinsics are not looked into anyway
        f"-DCMAKE_CXX_FLAGS={PRODUCTS[products]}",
        f"-DEDET_TORCH_DIR={Path(torch.__file__).parent}",
        *(["-G", "Ninja", f"-DCMAKE_MAKE_PROGRAM={ninja}"] if ninja else []),
    ]
    sanitizers.cmake("-S", sanitizers.ROOT, "-B", folder, *options)
    sanitizers.build(folder)
    return folder / "libedet_kernels.so"


@pytest.fixture(scope="module")
def sanitized() -> Path:
    return build_sanitized("pairs")


@pytest.mark.slow
def test_ops_under_sanitizers(sanitized: Path) -> None:
    files = [Path(__file__).parent / name for name in FILES]
    # this backend; float32 and bfloat16 between them take all paths but a conversion
    choice = ("-k", "not triton and not emulated and not reference and not torch.float16")
    variables = {"EDET_LIBRARY": str(sanitized), "EDET_BF16_PRODUCTS": "pairs"}
    sanitizers.assert_tests_pass(*files, *choice, **variables)


@pytest.mark.slow
def test_ops_in_tiles_under_sanitizers() -> None:
    names = ("test_ops.py", "test_bifpn.py", "test_int8.py")
    files = [Path(__file__).parent / name for name in names]
    choice = "not triton and not emulated and (bfloat16 or subnormal or test_int8)"
    variables = {"EDET_LIBRARY": str(build_sanitized("tiles")), "EDET_BF16_PRODUCTS": "tiles"}
    sanitizers.assert_tests_pass(*files, "-k", choice, **variables)


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
    done = sanitizers.python("-c", code, EDET_LIBRARY=str(sanitized))
    assert done.returncode != 0
    assert "AddressSanitizer: heap-buffer-overflow" in done.stderr, done.stderr[-3000:]
