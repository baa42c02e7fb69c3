"""Kernel tests share ``op_utils``, run on one thread, and allocate buffers full of NaN."""

import os
import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent))

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


@pytest.fixture(params=["cpu", "reference"])
def backend(request, kernels_only, monkeypatch):
    """Runs a test on the kernel and on the reference."""
    monkeypatch.setenv("EDET_BACKEND", request.param)
    return request.param
