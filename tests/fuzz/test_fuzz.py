"""A few seconds of the fuzzing that ``tests/fuzz/run.py`` does for as long as one likes."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

TARGETS = ("picture", "checkpoint", "class_names", "detections", "arguments")
RUNS = 300

#: Of the arguments, whose first byte chooses one of twenty ops.
ARGUMENT_RUNS = 2000


@pytest.mark.parametrize("name", TARGETS)
def test_no_input_does_harm(tmp_path, name):
    pytest.importorskip("atheris", reason="needs atheris, a fuzzer for Python")
    runs = ARGUMENT_RUNS if name == "arguments" else RUNS
    run = [sys.executable, Path(__file__).with_name("run.py"), name, "--runs", str(runs)]
    result = subprocess.run([*run, "--findings", tmp_path], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr[-3000:]
    [done] = re.findall(r"Done (\d+) runs", result.stderr)
    assert int(done) >= runs  # and the seeds
    assert list(tmp_path.iterdir()) == []
