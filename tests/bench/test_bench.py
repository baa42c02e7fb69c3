"""The quick table and the demo: checks before times, and files that can be read again."""

import dataclasses
import json

import pytest
import torch
from PIL import Image

import edet
import edet_kernels
from edet import bench, demo
from edet.bench import report, stages, variants
from edet_kernels.testing.numeric import (
    NETWORK_FACTOR,
    NETWORK_FLOOR,
    CheckFailed,
    allowed,
)
from edet_kernels.testing.timing import call_seconds

MODEL = "tf_efficientdet_lite0"


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    model = edet.create_model(MODEL, fusion="fast").eval()
    bench.set_batch_norms(model, torch.randn(1, 3, 128, 128))
    return model


@pytest.fixture(scope="module")
def table(model):
    return bench.run_bench(model, images=torch.randn(1, 3, 128, 128), rounds=2)


def test_table(table):
    assert [row.part for row in table.rows] == [*bench.PARTS, *bench.PAIRS]
    assert table.variants == ["eager softmax", "eager fast", "ours"]
    for row in table.rows:
        times = row.milliseconds
        assert set(times) == (
            set(table.variants)
            if row.part in ("BiFPN", "whole")
            else {"ours"}
            if row.part.endswith("processing")
            else {"ours", bench.PAIRS[row.part]}
            if row.part in bench.PAIRS
            else {"eager fast", "ours"}
        )
        assert all(len(t) == table.rounds == 2 and min(t) > 0 for t in times.values())
        assert (
            0
            <= row.difference
            <= allowed(row.eager_difference, factor=NETWORK_FACTOR, floor=NETWORK_FLOOR)
        )
        assert row.median("nothing") is None


def test_text_fits_a_terminal(table):
    lines = str(table).splitlines()
    assert max(map(len, lines)) <= 80
    header = next(line for line in lines if line.startswith("part"))
    assert header.split()[-1] == "difference"
    assert sum(line.count("x") for line in lines if line.startswith("BiFPN ")) == 3
    assert any(
        line.startswith("predictor: ") and "; its kernels " in line and line.endswith("% of it)")
        for line in lines
    )


def test_time_inside_operators_leaves_the_rest_out(monkeypatch):
    """On a clock that every look moves on by a second, so that no other process changes it."""
    x = torch.ones(1 << 16)
    now = 0.0

    def clock():
        nonlocal now
        now += 1
        return now

    def call():
        nonlocal now
        now += 1000  # of Python
        return x.view(-1, 2).exp()

    timed = bench.KernelTime(call)
    assert torch.equal(timed(), call())
    monkeypatch.setattr("time.perf_counter", clock)
    assert call_seconds(timed) == 1  # of exp: a view does no work
    assert call_seconds(call) == 1001


def test_wrong_detections_are_not_timed(model, monkeypatch):
    right = variants.columns
    monkeypatch.setattr(variants, "columns", lambda rows: (right(rows)[0] + 1, *right(rows)[1:]))
    eager = bench.eager_copy(model)
    with torch.no_grad(), pytest.raises(CheckFailed, match="predictor finds other boxes"):
        bench.predictor_calls(model, eager, (128, 128), 1)


def test_json(table, tmp_path):
    bench.write_json(table, tmp_path / "bench.json")
    plain = report.read(tmp_path / "bench.json")
    assert plain["versions"]["torch"] == torch.__version__
    assert plain["threads"] == torch.get_num_threads()
    assert plain["settings"]["backends"] == {c.op: c.backend for c in edet_kernels.explain()}
    assert plain["peak_gflops"]["float32"] > 0 and plain["settings"]["bandwidth_gbs"] > 0
    for row, out in zip(table.rows, plain["rows"], strict=True):
        assert out["times"]["ours"]["median_ms"] == row.median("ours")
        assert out["stage"] == {"whole": "network"}.get(row.part, row.part)
        assert out["parameters"] == row.parameters and (out["macs"] > 0) == (row.bytes > 0)


def test_several_tables_make_one_result(table):
    found = bench.result([table, dataclasses.replace(table, batch_size=4)])
    assert [row["batch_size"] for row in found["rows"]] == [1] * 8 + [4] * 8
    assert report.check(found) is found


def test_plot(table, tmp_path):
    bench.plot_table(table, tmp_path / "bench.png")
    with Image.open(tmp_path / "bench.png") as picture:
        assert picture.size == (1350, 675)
    assert [p.name for p in tmp_path.iterdir()] == ["bench.png"]


def test_model_is_not_changed(model):
    before = {key: value.clone() for key, value in model.state_dict().items()}
    dtype = torch.bfloat16
    table = bench.run_bench(model, images=torch.randn(1, 3, 128, 128), rounds=1, dtype=dtype)
    assert table.dtype == "bfloat16"
    for key, value in model.state_dict().items():
        assert torch.equal(value, before[key])
    assert next(model.parameters()).dtype == torch.float32


def test_own_backbone_and_softmax_fusion():
    class Backbone(torch.nn.Module):
        channels = (8, 8, 8)

        def forward(self, images):
            x = torch.nn.functional.avg_pool2d(images, 8).repeat(1, 3, 1, 1)[:, :8]
            return [x, x[:, :, ::2, ::2], x[:, :, ::4, ::4]]

    model = edet.create_model(MODEL, backbone=Backbone(), fusion="softmax").eval()
    table = bench.run_bench(model, images=torch.randn(1, 3, 128, 128), rounds=1)
    assert table.variants == ["eager softmax", "ours"]


def test_progress(model):
    seen = []
    bench.run_bench(
        model,
        images=torch.randn(1, 3, 128, 128),
        rounds=3,
        progress=lambda done, total: seen.append((done, total)),
    )
    assert seen == [(1, 3), (2, 3), (3, 3)]


def test_wrong_results_are_not_timed(model, monkeypatch):
    def perturbed(source, copied=bench.eager_copy):
        eager = copied(source)
        with torch.no_grad():
            eager.fpn.cell[0].fnode[0].after_combine.conv.conv_pw.weight[0] += 0.1
        return eager

    monkeypatch.setattr(stages, "eager_copy", perturbed)
    monkeypatch.setattr(stages, "measure", lambda *_, **__: pytest.fail("timed"))
    with pytest.raises(CheckFailed, match=r"BiFPN: ours must differ .* no times are reported"):
        bench.run_bench(model, images=torch.randn(1, 3, 128, 128), rounds=1)


def test_wrong_boxes_are_not_timed(model, monkeypatch):
    def shifted(*arguments, right=variants.outer_calls):
        before, after, by_references = right(*arguments)
        return before, lambda: [after()[0] + 1, *after()[1:]], by_references

    monkeypatch.setattr(stages, "outer_calls", shifted)
    monkeypatch.setattr(stages, "measure", lambda *_, **__: pytest.fail("timed"))
    with pytest.raises(CheckFailed, match=r"post-processing finds other boxes"):
        bench.run_bench(model, images=torch.randn(1, 3, 128, 128), rounds=1)


@pytest.mark.parametrize("options", [{"rounds": 0}, {"batch_size": 0}])
def test_bad_arguments(options):
    with pytest.raises(ValueError, match="must be at least 1"):
        bench.run_bench(MODEL, **options)


def test_operation_counts():
    model = edet.create_model("tf_efficientdet_d0").eval()
    eager = bench.count_operations(bench.eager_copy(model))
    # effdet's D0 dispatches 238 + 415 + 70 + 70; our reference normalises a node's edge weights at
    # once instead of every edge's, which leaves 334 of the 415
    assert eager == {"backbone": 238, "fpn": 334, "class_net": 70, "box_net": 70}
    if any(c.backend == "reference" for c in edet_kernels.explain()):
        pytest.skip("an op runs its reference")
    ours = bench.count_operations(model)
    assert ours["fpn"] <= 8
    assert sum(ours.values()) < sum(eager.values()) / 3


def test_set_batch_norms_scales_every_layer():
    model = edet.create_model(MODEL).eval()
    images = torch.randn(1, 3, 128, 128)
    bench.set_batch_norms(model, images)
    assert not any(module.training for module in model.modules())
    with torch.no_grad():
        maps = model.fpn(model.backbone(images))
    for x in maps:
        assert float(x.square().mean()) == pytest.approx(1, rel=0.1)


@pytest.mark.slow
def test_demo_without_a_checkpoint(tmp_path, capsys):
    assert demo.main(["--output", str(tmp_path / "demo"), "--rounds", "1"]) == 0
    text = capsys.readouterr().out
    assert "tf_efficientdet_d0 with random weights" in text
    assert "Agreement with the float64 reference" in text
    names = {"bench.json", "bench.png", "detections.json", "detections.png"}
    assert {p.name for p in (tmp_path / "demo").iterdir()} == names
    assert all(str(tmp_path / "demo" / name) in text for name in names)
    assert "Found by edet_lite0_person: <Detections in 512x600: 1 person" in text
    found = json.loads((tmp_path / "demo" / "detections.json").read_text())
    assert [x["name"] for x in found["detections"]] == ["person"]


@pytest.mark.slow
def test_demo_with_a_checkpoint(tmp_path, capsys):
    path = tmp_path / "weights.pth"
    model = edet.create_model(demo.MODEL)
    torch.nn.init.constant_(model.class_net.predict.conv_pw.bias, 0.0)  # scores around a half
    edet.save_checkpoint(model, path)
    arguments = ["--output", str(tmp_path), "--rounds", "1", "--checkpoint", str(path)]
    assert demo.main(arguments) == 0
    text = capsys.readouterr().out
    assert "random" not in text
    assert "Found by tf_efficientdet_d0: <Detections in 512x600" in text
    found = json.loads((tmp_path / "detections.json").read_text())
    assert len(found["detections"]) == 100
    with Image.open(tmp_path / "detections.png") as picture:
        assert picture.size == (512, 600)


def test_demo_mistakes(tmp_path, capsys):
    (tmp_path / "file").touch()
    assert demo.main(["--output", str(tmp_path / "file"), "--rounds", "1"]) == 1
    assert demo.main(["--checkpoint", str(tmp_path / "none.pth"), "--rounds", "1"]) == 1
    errors = capsys.readouterr().err.splitlines()
    assert len(errors) == 2
    assert all(line.startswith("Error: ") for line in errors)
