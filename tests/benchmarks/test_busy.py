"""The benchmark of a busy machine: its rows, a wrong network, and the page's figures."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from benchmarks import busy

pytest.importorskip("onnxruntime", reason="needs the extra bench")
pytest.importorskip("onnxscript", reason="needs the extra bench")

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning")

ARGUMENTS = ["--model", "tf_efficientdet_lite0", "--image-size", "64", "--rounds", "2"]


def test_rows(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    settings = (busy.Setting(1), busy.Setting(2, neighbours=1), busy.Setting(1, quota=0.5))
    monkeypatch.setattr(busy, "SETTINGS", settings)
    file = tmp_path / "busy.json"
    busy.main([*ARGUMENTS, "--calls", "2", "--json", str(file)])
    result = json.loads(file.read_text())
    labels = [row["label"] for row in result["rows"]]
    left_out = "quota of 0.5 cores: left out" in capsys.readouterr().out
    assert labels[:2] == ["1 thread", "2 threads, 1 neighbour"]
    assert labels[2:] == ([] if left_out else ["1 thread, quota of 0.5 cores"])
    for row in result["rows"]:
        for found in row["runtimes"].values():
            assert 0 < found["median_ms"] <= found["p90_ms"] and found["cpu_ms"] > 0
    assert not list(Path("/sys/fs/cgroup").glob("**/edet-busy-*"))


def test_another_network_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(busy, "SETTINGS", (busy.Setting(1),))
    export = busy.eager_copy

    def other(network: torch.nn.Module) -> torch.nn.Module:
        copy = export(network)
        with torch.no_grad():
            copy.box_net.predict.conv_pw.bias.add_(1)
        return copy

    monkeypatch.setattr(busy, "eager_copy", other)
    with pytest.raises(ValueError, match="different numbers"):
        busy.main([*ARGUMENTS, "--calls", "1"])


def test_the_figures_of_the_page_are_the_result_files() -> None:
    result = json.loads((busy.ROOT / "benchmarks/results/busy-cpu.json").read_text())
    page = (busy.ROOT / "docs/serving.md").read_text(encoding="utf-8")
    assert "\n".join(busy.markdown(result)) in page
