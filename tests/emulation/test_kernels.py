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
def test_kernels():
    # "strips": large maps; "threads": the emulation has none; "misleads": how the CPU finds the
    # best logits; training_node: no CUDA kernel yet
    left_out = ("maps_of_many_strips", "threads", "sample_misleads", "training_node")
    result = run(
        "test_nms.py", "test_detect.py", "test_ops.py",
        "-k", " and ".join(f"not {name}" for name in left_out),
    )  # fmt: skip
    assert result.returncode == 0, result.stdout[-5000:] + result.stderr
