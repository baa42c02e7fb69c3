"""benchmarks/gpu.py and gpu_check.py as far as they go without a GPU: cases, arguments, steps."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

import edet_kernels
from benchmarks import gpu, gpu_check
from edet.bench import report
from edet.models.configs import get_config
from edet_kernels import current_backend
from edet_kernels.testing.numeric import CheckFailed
from edet_kernels.testing.samples import Call, Maker, tensors


@pytest.mark.parametrize("title", gpu.CASES)
def test_a_case_is_right_and_knows_its_cost(title):
    torch.manual_seed(0)
    shapes = gpu.shapes_of(replace(get_config("tf_efficientdet_d0"), image_size=(64, 96)))
    case = gpu.CASES[title](Maker(torch.float32, 1), shapes)
    with torch.inference_mode():
        judge = gpu.Judge(title, case, torch.float32)
        found = tensors(case())
        assert judge.check("ours", found) < 1e-4
        with pytest.raises(CheckFailed, match=f"{title}.*(must differ|other boxes)"):
            judge.check("ours", [1.01 * x for x in found])
    assert case.bytes > 0
    assert (case.operations > 0) == (title != "detect")


def test_launches_are_compared_for_graphs_of_nodes(monkeypatch):
    monkeypatch.delenv("EDET_CUDA_LAUNCH", raising=False)
    for name in gpu.VARIANTS:
        with gpu.launched(name):
            wanted = os.environ["EDET_CUDA_LAUNCH"]
        assert wanted in ("auto", *gpu.LAUNCHES)
        assert (f"ours, {wanted}" in name) == (wanted != "auto")
    assert "EDET_CUDA_LAUNCH" not in os.environ
    nodes = gpu.shapes_of(get_config("tf_efficientdet_d7x")).graph.nodes
    assert len(nodes) == 80
    assert nodes[:2] == [(4, 5), (3, 6)]


def test_cost_of_a_node():
    shapes = gpu.shapes_of(get_config("tf_efficientdet_d0"))
    case = gpu.CASES["fusion_node, P3 of 2"](Maker(torch.float16, 2), shapes)
    maps = 2 * 2 * 64 * (64 * 64 + 32 * 32 + 64 * 64)
    assert case.bytes == maps + 4 * (2 + 64 * (9 + 64 + 2))
    assert case.operations == 2 * 2 * 64 * 64 * 64 * (9 + 64)


def test_arguments(tmp_path):
    args = gpu.parse(["--models", "tf_efficientdet_d0", "--output", str(tmp_path / "a.json")])
    assert args.models == ["tf_efficientdet_d0"]
    assert args.batches == [1, 8, 64]
    for wrong in (["--batches", "0"], ["--output", str(tmp_path / "no" / "a.json")]):
        with pytest.raises(SystemExit):
            gpu.parse(wrong)


def test_markdown_and_softmax_ratio():
    def row(case, ms):
        times = {"ours": report.summary([ms]), "eager": report.summary([1.0])}
        return {"case": case, "model": "d0", "batch": 1, "dtype": "float16", "cache": "warm",
                "bytes": 10**6, "operations": 10**6, "times": times}  # fmt: skip

    rows = [row("fusion_node, P3 of 2", 0.010), row("fusion_node, softmax", 0.011)]
    assert gpu.softmax_ratio(rows) == pytest.approx(1.1)
    assert gpu.softmax_ratio(rows[:1]) is None
    ceilings = {"float16": {"bytes_per_second": 1e12, "operations_per_second": 1e15}}
    text = gpu.markdown({"device": "A GPU", "torch": "2", "date": "2026-01-01T00:00:00",
                         "ceilings": ceilings, "rows": rows, "left_out": []})  # fmt: skip
    assert "| fusion_node, P3 of 2 | d0 | 1 | float16 | warm | 10.0 | 1000.0 | 10% | 0% |" in text


@pytest.fixture
def on_cpu(monkeypatch):
    """The benchmark on the CPU's kernels, each call timed once; a graph is what it is made of."""
    monkeypatch.setattr(gpu, "DEVICE", "cpu")
    monkeypatch.setattr(gpu, "COLD_BYTES", 1)
    monkeypatch.setattr(gpu, "_graph", lambda call: call)
    monkeypatch.setattr(gpu, "ceilings", lambda dtype: {"bytes_per_second": 1e12,
                                                        "operations_per_second": 1e15})  # fmt: skip
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    timed = []

    def measure(calls, seconds):
        timed.append([call() for call in calls])
        return report.summary([1.0])

    monkeypatch.setattr(gpu, "measure", measure)
    small = replace(get_config("tf_efficientdet_d0"), image_size=(64, 64))
    monkeypatch.setattr(gpu, "get_config", lambda name: small)
    return timed


def benchmark(tmp_path, *arguments):
    """The result file of a run on D0, batch 1, fp16."""
    output = tmp_path / "gpu.json"
    common = ["--models", "tf_efficientdet_d0", "--batches", "1", "--dtypes", "float16"]
    try:
        gpu.main([*common, *arguments, "--output", str(output)])
    finally:
        result = json.loads(output.read_text())
    return result


def test_measured_times_stand_beside_predicted_ones():
    def row(case, batch, ms, cache="warm"):
        times = {"ours, graph": {"median_ms": ms}, "eager": {"median_ms": ms / 9}}
        return {"case": case, "model": "d0", "batch": batch, "dtype": "float16", "cache": cache,
                "times": times}  # fmt: skip

    def guess(op, batch, us, calls=1):
        return {"gpu": "H100", "model": "d0", "batch": batch, "op": op, "calls": calls,
                "predicted_us": us}  # fmt: skip

    predicted = {"rows": [guess("bifpn", 1, 60.0), guess("stem", 1, 20.0),
                          guess("head", 1, 70.0, calls=2)]}  # fmt: skip
    rows = [row("bifpn", 1, 0.066), row("stem", 1, 0.027), row("stem", 1, 9.0, "cold"),
            row("head", 1, 0.5), row("bifpn", 8, 0.1)]  # fmt: skip
    text = gpu.beside_predicted(rows, "NVIDIA H100 80GB HBM3", predicted)
    assert text.splitlines()[2:4] == [
        "| bifpn, d0, batch 1 | 60.0 | 66.0 | +10% |",
        "| stem, d0, batch 1 | 20.0 | 27.0 | +35% |",
    ]
    assert text.endswith("Off by more than 30%: stem, d0, batch 1")
    assert len(text.splitlines()) == 6
    assert gpu.beside_predicted(rows, "NVIDIA A100", predicted) == ""


def test_every_variant_has_its_column(on_cpu, tmp_path, monkeypatch, capsys):
    asked = []
    run = Call.__call__

    def spy(call, *arguments):
        asked.append(current_backend())
        with edet_kernels.backend("cpu"):
            return run(call, *arguments)

    monkeypatch.setattr(Call, "__call__", spy)
    monkeypatch.setattr(torch, "compile", lambda function, **options: function)
    monkeypatch.setattr(torch.compiler, "reset", lambda: None)
    result = benchmark(tmp_path, "--cases", "fusion_node, P3 of 2")
    assert "triton" in asked and "cpu" in asked
    assert [row["cache"] for row in result["rows"]] == ["warm", "cold"]
    for row in result["rows"]:
        # a node is no graph of nodes: it has one way to be launched
        expected = [v for v in gpu.VARIANTS if not any(launch in v for launch in gpu.LAUNCHES)]
        assert list(row["times"]) == expected and row["unavailable"] == {}
        assert set(row["errors"]) == set(expected)
    assert result["failures"] == {} and result["left_out"] == []
    assert "| L2 | ours | ours, graph | Triton | Triton, graph |" in capsys.readouterr().out
    # calls are checked, then timed: the second time with several arguments
    assert [len(calls) for calls in on_cpu] == [1, 2] * len(expected)


def test_what_a_variant_cannot_do_is_listed(on_cpu, tmp_path):
    arguments = ["--cases", "stem", "--variants", "ours", "Triton", "--caches", "warm"]
    (row,) = benchmark(tmp_path, *arguments)["rows"]
    assert set(row["times"]) == {"ours"}
    assert "there is no Triton kernel" in row["unavailable"]["Triton"]


def test_a_failed_case_costs_no_other_its_times(on_cpu, tmp_path, monkeypatch):
    def out_of_memory(make, shapes):
        raise RuntimeError("CUDA out of memory.\nTried to allocate 1 TiB")

    monkeypatch.setitem(gpu.CASES, "lateral", out_of_memory)
    arguments = ["--cases", "lateral", "stem", "--variants", "ours", "--caches", "warm"]
    with pytest.raises(SystemExit, match=r"lateral, .*: CUDA out of memory\.$"):
        benchmark(tmp_path, *arguments)
    result = json.loads((tmp_path / "gpu.json").read_text())
    assert [row["case"] for row in result["rows"]] == ["stem"]
    assert list(result["failures"].values()) == ["CUDA out of memory."]


def test_it_ends_in_time_and_says_what_is_missing(on_cpu, tmp_path):
    arguments = ["--cases", "lateral", "stem", "--variants", "ours", "compile", "--limit", "-1"]
    result = benchmark(tmp_path, *arguments)
    assert result["rows"] == []
    assert result["left_out"] == ["ours: 2 of 2 cases", "compile: 2 of 2 cases"]


def test_steps_can_be_chosen(tmp_path):
    plan = gpu_check.plan(gpu_check.STEPS, tmp_path, "/sanitizer")
    assert tuple(plan) == gpu_check.STEPS
    assert [part.name for part in plan["sanitize"]] == ["memcheck", "racecheck", "synccheck"]
    assert [part.variables for part in plan["sanitize"]][1:] == [{}, {}]
    assert list(gpu_check.plan(["test"], tmp_path, None)) == ["test"]
    assert gpu_check.plan(["sanitize"], tmp_path, None) == {}
    assert sum(gpu_check.LIMITS.values()) + 100 < gpu_check.TOTAL < 600


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
