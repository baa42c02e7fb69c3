"""Makes the folder of the benchmarks importable, which is not part of the distribution."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))


@pytest.fixture(autouse=True)
def threads() -> Iterator[None]:
    """The number of threads is as before after each test: benchmarks set it."""
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)
