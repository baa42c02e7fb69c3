"""Loads the module that emulates the CUDA kernels and puts them in the place of the CPU's."""

import functools
import importlib.util
import os
from pathlib import Path

import torch

from edet_kernels import operators

ROOT = Path(__file__).resolve().parents[1]

#: What the emulated launchers believe: an H200's blocks may have 227 KiB of shared memory.
MULTIPROCESSORS, SHARED_BYTES = 4, 227 * 1024


@functools.cache
def module():
    """The module edet_emulation of ``EDET_EMULATED`` or of the newest build, None without any."""
    built = sorted(ROOT.glob("build/*/edet_emulation.so"), key=lambda path: path.stat().st_mtime)
    if os.environ.get("EDET_EMULATED"):
        built = [Path(os.environ["EDET_EMULATED"])]
    if not built:
        return None
    spec = importlib.util.spec_from_file_location("edet_emulation", built[-1])
    found = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(found)
    found.set_device(MULTIPROCESSORS, SHARED_BYTES)
    operators.register("edet_emulation")
    return found


def replace_kernels(monkeypatch):
    """Makes every op of :mod:`edet_kernels` run its emulated CUDA kernel; gives the module."""
    emulation = module()
    monkeypatch.setenv("EDET_BACKEND", "cpu")
    monkeypatch.setattr(torch.ops, "edet_kernels", torch.ops.edet_emulation)
    emulation.set_device(MULTIPROCESSORS, SHARED_BYTES)
    emulation.set_seed(0)
    return emulation
