"""The emulated CUDA kernels compiled with AddressSanitizer and UBSan: what the emulator cannot see.

An index beyond a thread's own array, a shift too far, an overflow: accesses of memory that do not
go through the door, and arithmetic.
"""

import os

import pytest

import sanitizers

#: Every op in every dtype, the probes, and products that only some GPUs have.
CHOICE = "order_of_threads or test_emulator or test_turing or test_tf32_of"


@pytest.fixture(scope="module")
def sanitized(emulation):
    """The file of the module with sanitizers, beside the other one; the glue has none."""
    folder = sanitizers.Path(emulation.__file__).parent
    sanitizers.build(folder, "edet_emulation_sanitized")
    return {"EDET_EMULATED": str(folder / "sanitized" / "edet_emulation.so")}


@pytest.mark.slow
def test_kernels_under_sanitizers(sanitized):
    here = sanitizers.Path(__file__).parent
    options = ["--ignore", __file__, "-k", CHOICE]
    sanitizers.assert_tests_pass(here, *options, **sanitized)


@pytest.mark.slow
def test_the_sanitizer_is_on(sanitized):
    code = (
        "import emulated, numpy\n"
        "emulated.module().reverse(numpy.zeros(64, numpy.float32), 64, 'local_overrun')\n"
    )
    paths = [str(sanitizers.Path(sanitizers.__file__).parent), os.environ.get("PYTHONPATH", "")]
    done = sanitizers.python("-c", code, PYTHONPATH=os.pathsep.join(paths), **sanitized)
    assert done.returncode != 0
    assert "out of bounds" in done.stderr or "stack-buffer-overflow" in done.stderr, done.stderr
