"""What every test shares: GPU tests are skipped where there is no GPU, and seeds are fixed."""

from __future__ import annotations

import pytest
import torch


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skips tests marked gpu on a machine without one."""
    if torch.cuda.is_available():
        return
    skip = pytest.mark.skip(reason="needs an NVIDIA GPU")
    for item in items:
        if item.get_closest_marker("gpu"):
            item.add_marker(skip)


@pytest.fixture(autouse=True)
def _seed() -> None:
    """Gives every test the same random numbers, whatever ran before it."""
    torch.manual_seed(0)
