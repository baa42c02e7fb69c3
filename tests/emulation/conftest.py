"""The CUDA kernels on the host: the module that emulates them, and ops that run on it."""

import importlib.util
import os
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "tests" / "kernels"))  # for op_utils

# Read at the first allocation: a pixel that is never written shows up as NaN.
os.environ.setdefault("EDET_POISON", "1")

#: What the emulated launchers believe: an H200's blocks may have 227 KiB of shared memory.
MULTIPROCESSORS, SHARED_BYTES = 4, 227 * 1024


@pytest.fixture(scope="session")
def emulation():
    """The module edet_emulation of the newest build."""
    built = sorted(ROOT.glob("build/*/edet_emulation.so"), key=lambda path: path.stat().st_mtime)
    if not built:
        pytest.skip("needs the emulation: EDET_EMULATION=1 python setup.py build_ext --inplace")
    spec = importlib.util.spec_from_file_location("edet_emulation", built[-1])
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def emulated(emulation, monkeypatch):
    """The module, while every op of :mod:`edet_kernels` runs its emulated CUDA kernel."""
    monkeypatch.setenv("EDET_BACKEND", "cpu")
    monkeypatch.setattr(torch.ops, "edet_kernels", torch.ops.edet_emulation)
    emulation.set_device(MULTIPROCESSORS, SHARED_BYTES)
    emulation.set_seed(0)
    return emulation


@pytest.fixture(autouse=True)
def one_thread():
    """The maps are small: eager PyTorch wastes most of its time on waking threads."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)
