"""Tests of the benchmarks leave the number of threads as it was."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch


@pytest.fixture(autouse=True)
def threads() -> Iterator[None]:
    """The number of threads is as before after each test: benchmarks set it."""
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)
