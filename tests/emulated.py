"""Loads the module that emulates the CUDA kernels and puts them in the place of the CPU's."""

import functools

import torch

from benchmarks.gpu_model.launches import emulation

#: What the emulated launchers believe: an H200's blocks may have 227 KiB of shared memory.
MULTIPROCESSORS, SHARED_BYTES = 4, 227 * 1024


@functools.cache
def module():
    """The module edet_emulation of ``EDET_EMULATED`` or of the newest build, None without any."""
    try:
        found = emulation()  # which is loaded once, also for the gauge's tests
    except RuntimeError:
        return None
    found.set_device(MULTIPROCESSORS, SHARED_BYTES)
    return found


def replace_kernels(monkeypatch):
    """Makes every op of :mod:`edet_kernels` run its emulated CUDA kernel; gives the module."""
    found = module()
    monkeypatch.setenv("EDET_BACKEND", "cpu")
    monkeypatch.setattr(torch.ops, "edet_kernels", torch.ops.edet_emulation)
    found.set_device(MULTIPROCESSORS, SHARED_BYTES)
    found.set_seed(0)
    return found
