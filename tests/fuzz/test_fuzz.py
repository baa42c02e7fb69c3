"""A few seconds of the fuzzing that ``tests/fuzz/run.py`` does for as long as one likes."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

TARGETS = ("picture", "checkpoint", "class_names", "detections", "arguments")
RUNS = 300


@pytest.mark.parametrize("name", TARGETS)
def test_no_input_does_harm(tmp_path, name):
    pytest.importorskip("atheris", reason="needs atheris, a fuzzer for Python")
    run = [sys.executable, Path(__file__).with_name("run.py"), name, "--runs", str(RUNS)]
    result = subprocess.run([*run, "--findings", tmp_path], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr[-3000:]
    [done] = re.findall(r"Done (\d+) runs", result.stderr)
    assert int(done) >= RUNS  # and the seeds
    assert list(tmp_path.iterdir()) == []
