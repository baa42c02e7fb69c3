"""Kernel tests run on one thread, on a backend each, and allocate buffers full of NaN."""

import contextlib
import os

import pytest
import torch

from backends import BACKENDS

# Read by the library once, at its first allocation: a pixel that is never written shows up as NaN.
os.environ.setdefault("EDET_POISON", "1")

# Read when Triton is imported: without a GPU its kernels are interpreted.
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")


@pytest.fixture(autouse=True)
def threads():
    """Sets the number of threads: 1 unless the test asks for more, and as before afterwards.

    The maps are small, and eager PyTorch, the yardstick, wastes most of its time on waking threads.
    """
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield torch.set_num_threads
    torch.set_num_threads(before)


@pytest.fixture
def kernels_only(monkeypatch):
    """Makes a missing kernel an error, not a reason to run the reference."""
    monkeypatch.setenv("EDET_BACKEND", "cpu")


@pytest.fixture(params=["cpu", "reference", "emulated"])
def backend(request, kernels_only, monkeypatch):
    """Runs a test on one backend, a :class:`backends.Backend`; skips it where that is not there."""
    name = request.param
    device = contextlib.nullcontext()
    if name == "triton":
        pytest.importorskip("triton", exc_type=ImportError)
        monkeypatch.setenv("EDET_BACKEND", "triton")
        if torch.cuda.is_available():
            device = torch.device("cuda")
            # eager, the measure, without what it may do by itself and the kernels do not
            monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)
        else:
            large_tiles(monkeypatch)
    elif name == "emulated":
        import emulated

        if not emulated.module():
            pytest.skip("needs the emulation: EDET_EMULATION=1 python setup.py build_ext --inplace")
        emulated.replace_kernels(monkeypatch)
    else:
        monkeypatch.setenv("EDET_BACKEND", name)
    with device:
        yield BACKENDS[name]


def large_tiles(monkeypatch):
    """Makes Triton's programs few and their loops short: interpreted, each step takes its time."""
    from edet_kernels.triton import configs

    find, large = configs.find, {"BLOCK_P": 256, "BLOCK_N": 256, "BLOCK_K": 256}

    def find_large(*arguments):
        found = find(*arguments)
        return found | {name: size for name, size in large.items() if name in found}

    monkeypatch.setattr(configs, "find", find_large)
