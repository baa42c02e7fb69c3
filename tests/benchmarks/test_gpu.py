"""benchmarks/gpu.py and gpu_check.py as far as they go without a GPU: cases, arguments, steps."""

from __future__ import annotations

import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from benchmarks import gpu, gpu_check
from edet import report
from edet.configs import get_config


@pytest.mark.parametrize("title", gpu.CASES)
def test_a_case_is_right_and_knows_its_cost(title):
    torch.manual_seed(0)
    config = replace(get_config("tf_efficientdet_d0"), image_size=(64, 96))
    case = gpu.CASES[title](gpu.Maker(config, 1, torch.float32, torch.device("cpu")))
    with torch.inference_mode():
        assert gpu.check(title, case, torch.float32) < 1e-4
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
    make = gpu.Maker(get_config("tf_efficientdet_d7x"), 1, torch.float16, torch.device("cpu"))
    nodes = gpu.graph_of(make.config).nodes
    assert len(nodes) == 80
    assert nodes[:2] == [(4, 5), (3, 6)]


def test_cost_of_a_node():
    make = gpu.Maker(get_config("tf_efficientdet_d0"), 2, torch.float16, torch.device("cpu"))
    case = gpu.CASES["fusion_node, P3 of 2"](make)
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
                         "ceilings": ceilings, "rows": rows})  # fmt: skip
    assert "| fusion_node, P3 of 2 | d0 | 1 | float16 | warm | 10.0 | 1000.0 | 10% | 0% |" in text


def test_steps_can_be_chosen():
    names = [name for name, _ in gpu_check.plan(gpu_check.STEPS, Path("out"), "/sanitizer")]
    tools = ["sanitize-memcheck", "sanitize-racecheck", "sanitize-synccheck"]
    assert names == ["build", "test", *tools, "benchmark"]
    assert [name for name, _ in gpu_check.plan(["test"], Path("out"), None)] == ["test"]
    assert gpu_check.plan(["sanitize"], Path("out"), None) == []


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
