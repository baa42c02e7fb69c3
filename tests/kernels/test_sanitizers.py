"""The op tests again, on CPU kernels compiled with AddressSanitizer and UBSan.

They are compiled to multiply bfloat16 by instructions that this CPU may lack, in plain code.
"""

import shutil
from pathlib import Path

import pytest
import torch

import sanitizers

FILES = ("test_ops.py", "test_bifpn.py", "test_nms.py", "test_detect.py")


@pytest.fixture(scope="module")
def sanitized() -> dict[str, str]:
    """Libraries by how they multiply bfloat16, as AVX512-BF16 or AMX do: pairs and tiles."""
    if not (sanitizers.ROOT / "CMakeLists.txt").is_file():
        pytest.skip("needs the source tree")
    folder = sanitizers.ROOT / "build" / "sanitized"
    ninja = shutil.which("ninja", path=sanitizers.PATH)
    options = [
        "-DEDET_CUDA=OFF",
        "-DEDET_SANITIZE=address,undefined",
        "-DEDET_ISAS=baseline",  # the same source; intrinsics are not looked into anyway
        "-DEDET_EMULATED_PRODUCTS=ON",
        f"-DEDET_TORCH_DIR={Path(torch.__file__).parent}",
        *(["-G", "Ninja", f"-DCMAKE_MAKE_PROGRAM={ninja}"] if ninja else []),
    ]
    sanitizers.cmake("-S", sanitizers.ROOT, "-B", folder, *options)
    names = {"pairs": "edet_kernels", "tiles": "edet_kernels_tiles"}
    sanitizers.build(folder, *names.values())
    return {products: str(folder / f"lib{name}.so") for products, name in names.items()}


@pytest.mark.slow
def test_ops_under_sanitizers(sanitized: dict[str, str]) -> None:
    files = [Path(__file__).parent / name for name in FILES]
    # this backend; float32 and bfloat16 between them take all paths but a conversion
    choice = ("-k", "not triton and not emulated and not reference and not torch.float16")
    variables = {"EDET_LIBRARY": sanitized["pairs"], "EDET_BF16_PRODUCTS": "pairs"}
    sanitizers.assert_tests_pass(*files, *choice, **variables)


@pytest.mark.slow
def test_ops_in_tiles_under_sanitizers(sanitized: dict[str, str]) -> None:
    names = ("test_ops.py", "test_bifpn.py", "test_int8.py")
    files = [Path(__file__).parent / name for name in names]
    choice = "not triton and not emulated and not reference and "
    choice += "(bfloat16 or subnormal or test_int8)"
    variables = {"EDET_LIBRARY": sanitized["tiles"], "EDET_BF16_PRODUCTS": "tiles"}
    sanitizers.assert_tests_pass(*files, "-k", choice, **variables)


@pytest.mark.slow
def test_the_sanitizer_is_on(sanitized: dict[str, str]) -> None:
    code = (
        "import torch, edet_kernels\n"
        "weight = torch.zeros(1, 27, 16)\n"
        "weight.untyped_storage().resize_(64)\n"  # the kernel will read past its end
        "assert edet_kernels.library.load(), edet_kernels.library.status()\n"
        "torch.ops.edet_kernels.stem(torch.zeros(1, 3, 8, 8), weight, torch.zeros(16),\n"
        "    torch.zeros(16), None, None, [0, 0], [4, 4], 0, torch.float32)\n"
    )
    done = sanitizers.python("-c", code, EDET_LIBRARY=sanitized["pairs"])
    assert done.returncode != 0
    assert "AddressSanitizer: heap-buffer-overflow" in done.stderr, done.stderr[-3000:]
