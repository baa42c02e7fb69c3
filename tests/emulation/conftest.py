"""The CUDA kernels on the host: the module that emulates them, and ops that run on it."""

import os

import pytest
import torch

import emulated as emulated_module

# Read at the first allocation: a pixel that is never written shows up as NaN.
os.environ.setdefault("EDET_POISON", "1")


@pytest.fixture(scope="session")
def emulation():
    """The module edet_emulation."""
    found = emulated_module.module()
    if found is None:
        pytest.skip("needs the emulation: EDET_EMULATION=1 python setup.py build_ext --inplace")
    return found


@pytest.fixture
def emulated(emulation, monkeypatch):
    """The module, while every op of :mod:`edet_kernels` runs its emulated CUDA kernel."""
    return emulated_module.replace_kernels(monkeypatch)


@pytest.fixture
def turing(emulated):
    """The module as :func:`emulated` gives it, for an sm_75."""
    emulated.set_device(emulated_module.MULTIPROCESSORS, 64 * 1024, 75)
    yield emulated
    emulated.set_device(emulated_module.MULTIPROCESSORS, emulated_module.SHARED_BYTES)


@pytest.fixture
def tf32(emulated, monkeypatch):
    """The module as :func:`emulated` gives it, where floats are multiplied as TF32."""
    monkeypatch.setattr(torch.ops, "edet_kernels", torch.ops.edet_emulation_tf32)
    return emulated


@pytest.fixture(autouse=True)
def one_thread():
    """The maps are small: eager PyTorch wastes most of its time on waking threads."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)
