"""The CPU kernels' own tests once more, on the emulated CUDA kernels."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

HERE = Path(__file__).parent

pytestmark = pytest.mark.usefixtures("emulation")


def run(*arguments):
    """Runs tests of tests/kernels in a process in which all kernels are the emulated ones."""
    path = os.pathsep.join([str(HERE), os.environ.get("PYTHONPATH", "")])
    return subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-x", "-p", "emulated", "-p", "no:cacheprovider",
         *arguments],
        cwd=HERE.parent / "kernels",
        env={**os.environ, "PYTHONPATH": path},
        capture_output=True,
        text=True,
        check=False,
    )  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("file", ["test_nms.py", "test_detect.py", "test_ops.py"])
def test_kernels(file):
    # "threads": the emulation has none; "strips": large maps; training_node: no CUDA kernel yet
    result = run(file, "-k", "not maps_of_many_strips and not threads and not training_node")
    assert result.returncode == 0, result.stdout[-5000:] + result.stderr
