"""Loads the module that emulates the CUDA kernels; as a pytest plugin (``-p emulated``) it puts
them in the place of the CPU's kernels for a whole run."""

import functools
import importlib.util
import os
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parents[2]

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
    return found


def pytest_configure(config):
    """Emulates for the whole run."""
    if module() is None:
        pytest.exit("the emulation is not built", 1)
    torch.ops.edet_kernels = torch.ops.edet_emulation
