"""benchmarks/gpu_check.py as far as it goes without a GPU: steps, arguments, limits, logs."""

from __future__ import annotations

import json
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from benchmarks import gpu, gpu_check


def test_steps_can_be_chosen(tmp_path):
    plan = gpu_check.plan(gpu_check.STEPS, tmp_path, "/sanitizer")
    assert tuple(plan) == gpu_check.STEPS
    variables = {part.name: part.variables for part in plan["sanitize"]}
    assert tuple(variables) == gpu_check.TOOLS
    assert variables["racecheck"] == variables["synccheck"] == {}
    assert variables["memcheck"] == {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
    assert variables["initcheck"] == variables["memcheck"]
    assert list(gpu_check.plan(["test"], tmp_path, None)) == ["test"]
    assert gpu_check.plan(["sanitize"], tmp_path, None) == {}
    tools = gpu_check.plan(["sanitize"], tmp_path, "/s", tools=["racecheck"])["sanitize"]
    assert [part.name for part in tools] == ["racecheck"]
    limits = sum(gpu_check.LIMITS[step] for step in gpu_check.DEFAULT_STEPS[:-1])
    assert limits + 100 < gpu_check.TOTAL < 600


def test_arguments_after_two_dashes_are_the_benchmarks(tmp_path, monkeypatch, capsys):
    monkeypatch.delenv("EDET_LIBRARY", raising=False)
    args, rest = gpu_check.parse(["--steps", "benchmark", "--", "--batches", "1", "--cases"])
    assert args.steps == ["benchmark"] and rest == ["--batches", "1", "--cases"]
    [part] = gpu_check.plan(args.steps, tmp_path, None, rest)["benchmark"]
    assert part.command[2:] == [*rest, "--output", str(tmp_path / "gpu.json")]
    args, rest = gpu_check.parse([])
    assert args.steps == list(gpu_check.DEFAULT_STEPS) and rest == []
    [part] = gpu_check.plan(args.steps, tmp_path, None)["benchmark"]
    assert part.command[2:4] == ["--models", "tf_efficientdet_d0"]
    gpu.parse(gpu_check.BENCHMARK)
    for wrong, message in ((["--models", "d0"], "invalid choice: 'd0'"),
                           (["--output", "a.json"], "--output of the benchmark")):  # fmt: skip
        with pytest.raises(SystemExit):
            gpu_check.parse(["--", *wrong])
        assert message in capsys.readouterr().err


def test_commands_of_the_page_are_understood():
    page = (Path(__file__).resolve().parents[2] / "docs" / "cuda.md").read_text()
    checks = re.findall(r'^    make gpu-check GPU_CHECK="(.*?)"', page, re.MULTILINE)
    runs = re.findall(r"^    python benchmarks/gpu.py (.*?)(?:  +#.*)?$", page, re.MULTILINE)
    assert len(checks) == 2 and len(runs) == 2
    for words in checks:
        gpu_check.parse(shlex.split(words))
    for words in runs:
        gpu.parse(shlex.split(words))


def test_a_carried_library_is_not_built_again(monkeypatch):
    monkeypatch.setenv("EDET_LIBRARY", "/a/library.so")
    assert "build" not in gpu_check.parse([])[0].steps
    assert gpu_check.parse(["--steps", "build"])[0].steps == ["build"]


def test_tests_share_processes_where_they_can(tmp_path, monkeypatch):
    def command(step):
        return gpu_check.plan([step], tmp_path, "/sanitizer")[step][0].command

    monkeypatch.setattr(os, "cpu_count", lambda: 16)
    monkeypatch.setattr(gpu_check, "has", lambda module: True)
    assert command("test")[command("test").index("-n") + 1] == "12"
    assert command("triton")[-4:] == ["-k", "triton", *gpu_check.TRITON_TESTS]
    assert "--timeout" in command("test") and not {"-n", "--timeout"} & {*command("sanitize")}
    monkeypatch.setattr(os, "cpu_count", lambda: 2)
    assert command("test")[command("test").index("-n") + 1] == "1"
    monkeypatch.setattr(gpu_check, "has", lambda module: False)
    assert not {"-n", "--timeout"} & {*command("test"), *command("triton")}


def test_gpu_tests_are_all_run():
    root = Path(__file__).resolve().parents[2]
    marked = {
        str(path.relative_to(root))
        for path in (root / "tests").rglob("test_*.py")
        if "pytest.mark." + "gpu" in path.read_text(encoding="utf-8")
    }
    assert marked == set(gpu_check.TESTS)


@pytest.fixture
def check(tmp_path, monkeypatch, capsys):
    """Runs gpu_check on small programs in the place of its commands; exit, results, files."""

    def run(**steps):
        found = {"name": "A GPU", "capability": "90"}
        parts = {
            step: [gpu_check.Part(name, [sys.executable, "-c", code]) for name, code in one.items()]
            for step, one in steps.items()
        }
        monkeypatch.setattr(gpu_check, "device", lambda: found)
        monkeypatch.setattr(gpu_check, "find_sanitizer", lambda: None)
        monkeypatch.setattr(gpu_check, "plan", lambda *arguments: parts)
        try:
            gpu_check.main(["--output", str(tmp_path / "out"), "--seconds", "60"])
            code = ""
        except SystemExit as error:
            code = str(error.code)
        files = {path.name: path.read_text() for path in (tmp_path / "out").iterdir()}
        return code, json.loads(files["result.json"]), files

    return run


def test_a_failed_step_costs_no_other_its_results(check):
    code, result, files = check(
        build={"build": "import os; print('for', os.environ['EDET_CUDA_ARCHS'])"},
        sanitize={"memcheck": "import sys; sys.exit('a leak')", "racecheck": "print('clean')"},
        benchmark={"benchmark": "import sys; print(sys.argv)"},
    )
    assert code.startswith("failed: memcheck; see the logs in")
    assert result["steps"]["sanitize"]["codes"] == {"memcheck": 1, "racecheck": 0}
    assert result["device"]["name"] == "A GPU"
    assert set(files) == {"build.log", "sanitize.log", "benchmark.log", "result.json"}
    assert "for 90" in files["build.log"]
    assert "=== memcheck: 1\na leak" in files["sanitize.log"]
    assert "=== racecheck: 0\nclean" in files["sanitize.log"]
    assert "'--limit'" in files["benchmark.log"]


def test_nothing_is_checked_after_a_failed_build(check):
    code, result, _ = check(build={"build": "raise SystemExit(2)"}, test={"test": ""})
    assert code.startswith("failed: build") and list(result["steps"]) == ["build"]


def alive(pid):
    """Whether a process computes or waits; not one that ended and was not asked for its status."""
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except FileNotFoundError:
        return False
    return state not in "ZX"


def test_a_step_that_hangs_is_ended_with_all_it_started(check, monkeypatch, tmp_path):
    monkeypatch.setitem(gpu_check.LIMITS, "test", 5)  # seconds enough to start on a busy machine
    started = tmp_path / "pid"
    child = f"import os, time; open({str(started)!r}, 'w').write(str(os.getpid())); time.sleep(900)"
    code, result, files = check(
        test={
            "hangs": f"import subprocess, sys; print('before', flush=True); "
            f"subprocess.run([sys.executable, '-c', {child!r}])"
        },
        benchmark={"benchmark": "print('x' * 2**21)"},
    )
    assert result["steps"]["test"]["codes"] == {"hangs": "too long"}
    assert "before" in files["test.log"]
    assert code.startswith("failed: hangs")
    assert result["steps"]["benchmark"]["codes"] == {"benchmark": 0}
    assert len(files["benchmark.log"]) < gpu_check.LOG_BYTES + 100
    assert not alive(int(started.read_text()))


def test_the_driver_is_described(monkeypatch, tmp_path):
    smi = tmp_path / "nvidia-smi"
    smi.write_text("#!/bin/sh\necho name, driver_version\necho A GPU, 580.1\n")
    smi.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    assert gpu_check.driver() == "name, driver_version\nA GPU, 580.1"
    monkeypatch.setenv("PATH", "")
    assert gpu_check.driver().startswith("nvidia-smi: ")


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without a GPU")
@pytest.mark.parametrize("script", ["gpu.py", "gpu_check.py"])
def test_without_a_gpu_it_says_so(script):
    result = subprocess.run(
        [sys.executable, f"benchmarks/{script}"],
        cwd=Path(__file__).resolve().parents[2],
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 1
    assert "torch finds no CUDA GPU" in result.stderr
