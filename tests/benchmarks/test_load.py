"""The load test of a predictor: what it counts, and that lost and wrong answers show."""

from __future__ import annotations

import json

import pytest

import edet
from benchmarks import load

pytest.importorskip("PIL.Image", reason="needs the extra image")

ARGUMENTS = ["--image-size", "64", "--requests", "12", "--clients", "1,3", "--batch", "2"]


def test_all_requests_are_answered(tmp_path, capsys):
    file = tmp_path / "load.json"
    assert load.main([*ARGUMENTS, "--json", str(file)]) == 0
    rows = json.loads(file.read_text())["rows"]
    assert [row["setting"] for row in rows] == [
        {"clients": clients, "batch": 2, "threads": 1} for clients in (1, 3)
    ]
    for row in rows:
        assert row["sent"] == row["answered"] == 12 and row["wrong"] == 0
        assert 0 < row["p50_ms"] <= row["p99_ms"] <= row["max_ms"]
        assert row["images_per_second"] == pytest.approx(24 / row["seconds"])
    assert len(capsys.readouterr().out.splitlines()) == 3


def test_the_figures_of_the_page_are_the_result_files():
    result = json.loads((load.ROOT / "benchmarks/results/load-cpu.json").read_text())
    page = (load.ROOT / "docs/serving.md").read_text(encoding="utf-8")
    assert "\n".join(load.markdown(result)) in page
    assert result["machine"]["note"]  # it was not alone


def test_memory_is_taken_while_requests_run(tmp_path):
    file = tmp_path / "load.json"
    arguments = ["--image-size", "64", "--clients", "2", "--requests", "100000", "--seconds", "2"]
    assert load.main([*arguments, "--memory-every", "0.2", "--json", str(file)]) == 0
    result = json.loads(file.read_text())
    [row] = result["rows"]
    taken = row["memory_over_time"]
    assert len(taken) >= 2  # of ten, however busy the machine is
    assert [seconds for seconds, _ in taken] == sorted(seconds for seconds, _ in taken)
    assert taken[0][0] >= 0.2 and taken[-1][0] <= row["seconds"] and row["seconds"] >= 2
    assert all(10 < mib < 10_000 for _, mib in taken)
    [_, _, line] = load.over_time(result, parts=2)
    assert line.startswith(f"| {row['sent']}, {row['sent']}, 0 | 0 | ") and line.count(",") == 3


def test_the_long_run_of_the_page_is_the_result_file():
    result = json.loads((load.ROOT / "benchmarks/results/load-long-cpu.json").read_text())
    page = (load.ROOT / "docs/serving.md").read_text(encoding="utf-8")
    assert "\n".join(load.over_time(result)) in page
    [row] = result["rows"]
    assert row["sent"] == row["answered"] and row["wrong"] == 0 and row["seconds"] > 1800
    assert result["machine"]["note"]  # it was not alone


def test_answers_to_another_client_are_seen(monkeypatch, capsys):
    detect = edet.Predictor.__call__
    calls = []

    def mixed_up(self, images, **options):
        calls.append(images)
        return detect(self, images if len(calls) != 15 else images[::-1], **options)

    monkeypatch.setattr(edet.Predictor, "__call__", mixed_up)
    assert load.main([*ARGUMENTS, "--clients", "1"]) == 1
    assert capsys.readouterr().out.splitlines()[1].split()[4] == "1"


def test_a_model_that_finds_nothing_tests_nothing(monkeypatch, tmp_path):
    file = tmp_path / "untrained.pt"
    model = edet.create_model("tf_efficientdet_lite0", num_classes=1)
    edet.save_described(model.eval(), file, class_names=["thing"], category_ids=[1])
    monkeypatch.setattr(load, "pictures", lambda count: [blank()] * count)
    with pytest.raises(ValueError, match="must find something"):
        load.main([*ARGUMENTS, "--model", str(file)])


def blank() -> bytes:
    import io

    from PIL import Image

    file = io.BytesIO()
    Image.new("RGB", (64, 64)).save(file, "PNG")
    return file.getvalue()
