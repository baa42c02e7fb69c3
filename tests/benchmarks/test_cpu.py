"""benchmarks/: statistics, the result file, its table, the correctness gate and one tiny run."""

from __future__ import annotations

import copy
import json
import re
from functools import partial
from typing import Any

import pytest
import torch

import edet
from benchmarks import cpu, rivals, update_readme
from edet.bench import report
from edet.models.bifpn import BiFPN
from edet_kernels.testing.numeric import CheckFailed


def _row(stage: str = "BiFPN") -> dict[str, Any]:
    times = {"eager": report.summary([4.0, 6.0, 5.0]), "ours": report.summary([2.0, 2.0, 2.5])}
    best, ratios = report.compare(times)
    return {
        "model": "tf_efficientdet_d0",
        "image_size": [512, 512],
        "dtype": "float32",
        "stage": stage,
        "macs": 136_000_000,
        "rounds": 3,
        "times": times,
        "unavailable": {"OpenVINO": "not\n today"},
        "best_rival": best,
        "ratios": ratios,
        "peak_fraction": {"eager": 0.1, "ours": 0.25},
    }


@pytest.fixture
def result() -> dict[str, Any]:
    """A result such as a run gives, with round numbers."""
    times = _row()["times"]
    return {
        "schema": report.SCHEMA,
        "date": "2026-01-02T03:04:05+00:00",
        "revision": None,
        "machine": {"cpu": "A CPU", "cores": 2, "isa": "avx512"},
        "versions": {"torch": "2.13.0", "onnxruntime": "1", "openvino": "not installed"},
        "threads": 2,
        "settings": {},
        "peak_gflops": {"float32": 500.0},
        "rows": [_row()],
        "scaling": [
            {"model": "m", "dtype": "float32", "name": "ours", "one_ms": 3.0, "all_ms": 2.0}
        ],
        "memory": [
            {
                "model": "m",
                "dtype": "float32",
                "name": "ours",
                "imports_mib": 100.0,
                "once_mib": 150.0,
                "ten_times_mib": 151.0,
            }
        ],
        "fusion": [
            {
                "model": "m",
                "name": "ours",
                "fast": times["ours"],
                "softmax": times["ours"],
                "ratio": {"of_medians": 1.0, "paired": 1.0},
            }
        ],
    }


def test_summary_gives_median_and_quartiles():
    found = report.summary([5.0, 1.0, 3.0, 2.0, 4.0])
    assert (found["q1_ms"], found["median_ms"], found["q3_ms"]) == (2.0, 3.0, 4.0)
    assert report.summary([7.0])["q1_ms"] == report.summary([7.0])["q3_ms"] == 7.0
    with pytest.raises(ValueError, match="samples"):
        report.summary([])


def test_ratio_of_medians_and_median_of_ratios_are_different_things():
    found = report.ratios([2.0, 8.0, 9.0], [1.0, 2.0, 9.0])
    assert found == {"of_medians": 4.0, "paired": 2.0}
    with pytest.raises(ValueError, match="rounds"):
        report.ratios([1.0], [1.0, 2.0])


def test_best_rival_is_the_fastest_other_one():
    times = {name: report.summary([t]) for name, t in (("a", 6.0), ("b", 3.0), ("ours", 1.0))}
    best, ratios = report.compare(times)
    assert best == "b"
    assert {name: r["of_medians"] for name, r in ratios.items()} == {"a": 6.0, "b": 3.0}
    assert report.compare({"ours": times["ours"]}) == (None, {})


def test_result_file_is_read_as_written(result, tmp_path):
    report.write(result, tmp_path / "cpu.json")
    assert report.read(tmp_path / "cpu.json") == result
    assert [file.name for file in tmp_path.iterdir()] == ["cpu.json"]


@pytest.mark.parametrize("key", ["schema", "rows", "peak_gflops"])
def test_incomplete_result_is_refused(result, tmp_path, key):
    del result[key]
    with pytest.raises(ValueError, match=key):
        report.write(result, tmp_path / "cpu.json")
    assert not list(tmp_path.iterdir())


def test_incomplete_row_is_refused(result):
    del result["rows"][0]["macs"]
    with pytest.raises(ValueError, match=r"rows\[0\]\.macs"):
        report.check(result)


def test_markdown_holds_every_figure(result):
    text = report.markdown(json.loads(json.dumps(result)))
    assert "| D0 512×512 | BiFPN | 5.0 (2.5×) | **2.00** | **2.50×** | 25% |" in text
    assert "Not in this table, OpenVINO: not today" in text
    assert "| m | float32 | ours | 3.00 | 2.00 | 1.50× |" in text
    assert "| m | float32 | ours | 100 | 150 | 151 |" in text
    for table in (block for block in text.split("\n\n") if block.startswith("|")):
        assert len({line.count("|") for line in table.splitlines()}) == 1


def test_readme_gets_the_first_table_and_the_page_all(result, tmp_path):
    file = tmp_path / "a.json"
    report.write(result, file)
    readme = f"a\n{update_readme.BEGIN}\nold\n{update_readme.END}\nb"
    short, whole = (
        update_readme.updated(readme, [update_readme.table(file, tmp_path / "b.md", whole=whole)])
        for whole in (False, True)
    )
    for text in (short, whole):
        assert "old" not in text and "| D0 512×512 | BiFPN |" in text
        assert text.startswith("a\n") and text.endswith("\nb")
    assert "1 thread, ms" in whole and "1 thread, ms" not in short


def test_plot_is_written_whole(result, tmp_path):
    pytest.importorskip("matplotlib", reason="needs the extra plot")
    report.plot_ratios(result, tmp_path / "cpu.png")
    assert (tmp_path / "cpu.png").read_bytes().startswith(b"\x89PNG")
    assert len(list(tmp_path.iterdir())) == 1


SMALL = {"size": 128, "threads": 1, "rounds": 1, "seconds": 0.0, "memory": False, "fusion": False}


def test_wrong_rival_is_left_out(monkeypatch):
    monkeypatch.setattr(
        rivals, "compiled", lambda name, call: lambda: [x + 0.01 * x.abs().max() for x in call()]
    )
    names = ["eager", "torch.compile", "ours"]
    found = cpu.run(["tf_efficientdet_lite0"], stages=["network"], names=names, **SMALL)
    row = found["rows"][0]
    assert set(row["times"]) == {"eager", "ours"}
    assert "must differ" in row["unavailable"]["torch.compile"]


def test_ways_of_ours_are_compared():
    names = ["eager", "ours"]
    stages = ["nodes", "predictor"]
    found = cpu.run(["tf_efficientdet_lite0"], stages=stages, names=names, **SMALL)
    nodes, predictor = found["rows"]
    assert set(nodes["times"]) == {"node by node", "ours"}
    assert set(predictor["times"]) == {"its kernels", "ours"}
    assert nodes["times"]["ours"]["error"] < 1e-4 and predictor["times"]["ours"]["error"] < 1e-4
    assert "| predictor |" in report.markdown(found)


def test_wrong_results_of_ours_are_not_timed(monkeypatch):
    own = cpu.Case.part

    def wrong(self, stage, model):
        call = own(self, stage, model)
        return (lambda: [1.1 * x for x in call()]) if model is self.ours else call

    monkeypatch.setattr(cpu.Case, "part", wrong)
    with pytest.raises(CheckFailed, match=r"ours must differ .* no times are reported"):
        cpu.run(["tf_efficientdet_lite0"], stages=["heads"], names=["eager", "ours"], **SMALL)


def test_wrong_boxes_are_not_timed(monkeypatch):
    monkeypatch.setattr(rivals, "compiled", lambda name, call: call)
    right = cpu.Case.detections
    monkeypatch.setattr(
        cpu.Case, "detections", lambda self, outputs: [right(self, outputs)[0] + 1,
                                                       *right(self, outputs)[1:]]
    )  # fmt: skip
    monkeypatch.setattr(
        cpu.Case, "reference_detections", lambda self, outputs: right(self, outputs)
    )
    names = ["eager", "torch.compile", "ours"]
    with pytest.raises(CheckFailed, match="no times are reported"):
        cpu.run(["tf_efficientdet_lite0"], stages=["network+post"], names=names, **SMALL)


def test_a_rival_that_cannot_run_is_listed(monkeypatch):
    def missing(name: str, call: Any) -> Any:
        raise rivals.Unavailable("there is no compiler")

    monkeypatch.setattr(rivals, "compiled", missing)
    found = cpu.run(
        ["tf_efficientdet_lite0"], stages=["bifpn"], names=["eager", "torch.compile", "ours"],
        size=128, threads=1, rounds=1, seconds=0.0, memory=False, fusion=False,
    )  # fmt: skip
    assert found["rows"][0]["unavailable"] == {"torch.compile": "there is no compiler"}
    assert set(found["rows"][0]["times"]) == {"eager", "ours"}


def test_weights_are_packed_once_and_macs_are_those_of_the_model(monkeypatch):
    packed = []
    pack = BiFPN.pack
    monkeypatch.setattr(BiFPN, "pack", lambda self, dtype: packed.append(0) or pack(self, dtype))
    found = cpu.run(
        ["tf_efficientdet_lite0"], stages=["bifpn", "heads", "network"], names=["eager", "ours"],
        size=128, threads=1, rounds=2, seconds=0.0, memory=False, fusion=False,
    )  # fmt: skip
    assert len(packed) == 1
    macs = edet.count_macs(edet.create_model("tf_efficientdet_lite0", image_size=128))
    expected = [macs.fpn, macs.class_net + macs.box_net, macs.total]
    assert [row["macs"] for row in found["rows"]] == expected and min(expected) > 0
    assert all(row["peak_fraction"]["ours"] > 0 for row in found["rows"])


def test_rows_of_larger_batches():
    names, model = ["eager", "ours"], "tf_efficientdet_lite0"
    found = cpu.run([model], stages=["heads", "predictor"], names=names, batches=[1, 3], **SMALL)
    assert [row["batch_size"] for row in found["rows"]] == [1, 1, 3, 3]
    assert found["rows"][2]["macs"] == 3 * found["rows"][0]["macs"]
    text = report.markdown(found)
    assert "| LITE0 128×128, batch 3 | heads |" in text and "| images/s |" in text


@pytest.mark.parametrize(
    ("program", "reason"),
    [
        (None, "no Python with effdet was given: see --effdet"),
        ("", "effdet cannot be run: .* No such file or directory.*"),
        ("echo 'a warning' >&2; echo \"no module named 'effdet'\" >&2; exit 1",
         "effdet cannot be exported: no module named 'effdet'"),
    ],
)  # fmt: skip
def test_an_export_of_effdet_that_cannot_be_had_is_listed(tmp_path, program, reason):
    python = None if program is None else tmp_path / "python"
    if program:
        python.write_text(f"#!/bin/sh\n{program}\n")
        python.chmod(0o755)
    name = "ONNX Runtime, effdet's export"
    found = cpu.run(
        ["tf_efficientdet_lite0"], stages=["heads"], names=["eager", name, "ours"],
        effdet=python, **SMALL,
    )  # fmt: skip
    assert re.fullmatch(reason, found["rows"][0]["unavailable"][name])
    assert set(found["rows"][0]["times"]) == {"eager", "ours"}


def test_an_export_of_effdet_is_timed_and_checked(tmp_path, monkeypatch):
    """A stand-in for effdet's export and ONNX Runtime; a network of other weights is refused."""
    given = {}

    def export(python, model, images, folder):
        given.update(model=model, images=images, folder=folder)
        return {part: folder / f"{part}.onnx" for part in rivals.ONNX_PARTS}

    def runtime(file, arrays, threads, dtype, *, scale=1):
        assert file == given["folder"] / "heads.onnx" and dtype == "float32"
        maps = [scale * torch.from_numpy(x) for x in arrays]
        model = given["model"]
        return lambda: [x.numpy() for x in [*model.class_net(maps), *model.box_net(maps)]]

    name = "ONNX Runtime, effdet's export"
    monkeypatch.setattr(rivals, "export_effdet", export)
    monkeypatch.setitem(rivals.ONNX_RIVALS, name, runtime)
    run = partial(cpu.run, ["tf_efficientdet_lite0"], stages=["heads"],
                  names=["eager", name, "ours"], effdet=tmp_path, **SMALL)  # fmt: skip
    assert set(run()["rows"][0]["times"]) == {"eager", name, "ours"}
    assert given["images"].shape == (1, 3, 128, 128)
    monkeypatch.setitem(rivals.ONNX_RIVALS, name, partial(runtime, scale=1.1))
    row = run()["rows"][0]
    assert name not in row["times"] and "must differ" in row["unavailable"][name]


def test_a_case_is_not_made_in_inference_mode(tmp_path):
    with torch.inference_mode(), pytest.raises(RuntimeError, match="inference mode"):
        cpu.Case.create("tf_efficientdet_lite0", 64, torch.float32, 1, tmp_path)


@pytest.mark.parametrize("argument", ["stages", "names"])
def test_unknown_names_are_refused(argument):
    with pytest.raises(ValueError, match="got 'nonsense'"):
        cpu.run(["tf_efficientdet_lite0"], **{argument: ["nonsense"]})


def test_tiny_run_from_the_command_line(tmp_path, capsys):
    pytest.importorskip("matplotlib", reason="needs the extra plot")
    output = tmp_path / "cpu.json"
    arguments = "--models tf_efficientdet_lite0 --size 128 --dtype float32 --threads 1 --rounds 1"
    arguments += " --seconds 0 --rivals eager --no-memory --no-fusion --output"
    cpu.main([*arguments.split(), str(output)])
    result = report.read(output)
    assert [row["stage"] for row in result["rows"]] == list(cpu.STAGES.values())
    for row in result["rows"]:
        rival = {"BiFPN nodes": "node by node", "predictor": "its kernels"}.get(row["stage"])
        rival = rival or "eager"
        assert set(row["times"]) == {rival, "ours"} and row["best_rival"] == rival
        assert len(row["times"]["ours"]["samples_ms"]) == row["rounds"] >= 1
    assert result["peak_gflops"]["float32"] > 0
    assert report.markdown(copy.deepcopy(result)) in capsys.readouterr().out
    assert output.with_suffix(".png").is_file()
