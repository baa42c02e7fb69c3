"""The documented command of benchmarks/test_ops.py, with each op run once instead of timed."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]

#: In pytest-benchmark's place.
STAND_IN = """
import pytest


class Once:
    group = ""

    def __call__(self, function, *arguments, **options):
        return function(*arguments, **options)


@pytest.fixture
def benchmark():
    return Once()
"""


@pytest.mark.slow
def test_every_variant_of_an_op_runs(tmp_path):
    (tmp_path / "stand_in.py").write_text(STAND_IN)
    guide = (ROOT / "docs/guide.md").read_text(encoding="utf-8")
    [command] = re.findall(r"^    pytest (\S+) ", guide, re.MULTILINE)
    plugins = ("-p", "stand_in", "-p", "no:benchmark", "-p", "no:cacheprovider")
    path = os.pathsep.join([str(tmp_path), os.environ.get("PYTHONPATH", "")])
    ran = subprocess.run(
        [sys.executable, "-m", "pytest", command, *plugins, "-k", "weighted_fusion-d0-fast"],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": path},
        capture_output=True,
        text=True,
        check=False,
    )
    assert ran.returncode == 0, ran.stdout
    assert "3 passed" in ran.stdout
