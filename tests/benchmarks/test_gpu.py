"""benchmarks/gpu.py as far as it goes without a GPU: cases, whole models, launches, tables."""

from __future__ import annotations

import json
import os
import signal
import time
from dataclasses import replace

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import edet_kernels
from benchmarks import (
    gpu,
    gpu_launches,
    gpu_models,
    gpu_tables,
    gpu_timing,
    update_readme,
)
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


def op_row(case, ms, cache="warm", batch=1, **more):
    times = {"ours, graph": report.summary([ms]), "eager": report.summary([1.0])}
    return {"case": case, "model": "d0", "batch": batch, "dtype": "float16", "cache": cache,
            "bytes": 10**6, "operations": 10**6, "times": times, "errors": {}, "unavailable": {},
            **more}  # fmt: skip


def result_of(rows=(), models=(), device="A GPU", **more):
    ceilings = {"float16": {"bytes_per_second": 1e12, "operations_per_second": 1e15}}
    return {"device": device, "torch": "2", "date": "2026-01-01T00:00:00", "ceilings": ceilings,
            "rows": list(rows), "models": list(models), "left_out": [], "failures": {},
            **more}  # fmt: skip


def model_row(part, batch=1, **times):
    found = {name.replace("_", ", "): report.summary([ms]) for name, ms in times.items()}
    return {"model": "d0", "batch": batch, "dtype": "float16", "part": part, "times": found,
            "errors": {}, "unavailable": {}}  # fmt: skip


def test_markdown_and_softmax_ratio():
    rows = [op_row("fusion_node, P3 of 2", 0.010), op_row("fusion_node, softmax", 0.011)]
    assert gpu.softmax_ratio(
        [{**r, "times": {"ours": r["times"]["ours, graph"]}} for r in rows]
    ) == pytest.approx(1.1)
    assert gpu.softmax_ratio(rows[:1]) is None
    models = [model_row("network", ours=2.0, ours_graph=0.5, eager=6.0, eager_graph=3.0)]
    text = gpu_tables.markdown(result_of(rows, models, left_out=["compile: 2 of 2 cases"]))
    op = "| fusion_node, P3 of 2 | d0 | 1 | float16 | warm | 10.0 | 1000.0 | 10% | 0% |"
    assert f"{op} **100.00×** |" in text
    assert "| d0 | 1 | float16 | network | 2000.0 | 500.0 | 6000.0 | 3000.0 | **6.00×** |" in text
    assert "2026-01-01; float16: copy 1.00 TB/s, product 1000 TFLOP/s" in text
    assert "* Not measured: compile: 2 of 2 cases" in text


def test_what_is_missing_is_named_once():
    row = model_row("network", ours=1.0)
    rows = [{**row, "batch": i, "unavailable": {"eager": "out of memory"}} for i in range(5)]
    text = gpu_tables.markdown(result_of(models=rows, failures={"d7": "boxes are wrong"}))
    assert "* Failed: d7: boxes are wrong" in text
    assert text.count("out of memory") == 1
    assert "* Without eager: out of memory (network, d0, batch 0; " in text
    assert text.endswith("network, d0, batch 2 and 2 more)")


@pytest.fixture
def on_cpu(monkeypatch):
    """The benchmark on the CPU's kernels, each call timed once; a graph is what it is made of."""
    monkeypatch.setattr(gpu_timing, "DEVICE", "cpu")
    monkeypatch.setattr(gpu_timing, "COLD_BYTES", 1)
    monkeypatch.setattr(gpu_timing, "Graph", lambda call: call)
    monkeypatch.setattr(gpu_timing, "ceilings", lambda dtype: {"bytes_per_second": 1e12,
                                                        "operations_per_second": 1e15})  # fmt: skip
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    monkeypatch.setattr(gpu_launches, "launches", lambda call: [{"kernel": "some"}])
    timed = []

    def measure(calls, seconds, clock=None):
        timed.append([call() for call in calls])
        return report.summary([1.0])

    monkeypatch.setattr(gpu_timing, "measure", measure)
    small = replace(get_config("tf_efficientdet_d0"), image_size=(64, 64))
    monkeypatch.setattr(gpu, "get_config", lambda name: small)
    return timed


def benchmark(tmp_path, *arguments):
    """The result file of a run on D0, batch 1, fp16."""
    output = tmp_path / "gpu.json"
    common = ["--models", "tf_efficientdet_d0", "--batches", "1", "--dtypes", "float16"]
    if "--parts" not in arguments:
        common += ["--parts"]  # none: ops alone
    try:
        gpu.main([*common, *arguments, "--output", str(output)])
    finally:
        result = json.loads(output.read_text())
    return result


def guess(op, us, batch=1, calls=1, kernels=()):
    return {"gpu": "H100", "model": "d0", "batch": batch, "op": op, "calls": calls,
            "predicted_us": us, "kernels": list(kernels)}  # fmt: skip


H100 = "NVIDIA H100 80GB HBM3"


def test_measured_times_stand_beside_predicted_ones():
    predicted = {"rows": [guess("bifpn", 60.0), guess("stem", 20.0), guess("lateral", 19.0),
                          guess("head", 70.0, calls=2)]}  # fmt: skip
    rows = [op_row("bifpn", 0.066), op_row("stem", 0.027), op_row("stem", 9.0, "cold"),
            op_row("head", 0.5), op_row("bifpn", 0.1, batch=8)]  # fmt: skip
    models = [model_row("BiFPN", ours=9.0, ours_graph=0.0869, eager_graph=0.01),
              model_row("heads", ours_graph=0.056), model_row("backbone", ours_graph=1.0),
              model_row("predictor", ours_graph=1.0)]  # fmt: skip
    text = gpu_tables.beside_predicted(result_of(rows, models, H100), predicted)
    assert text.splitlines()[2:] == [
        "| BiFPN, d0, batch 1 | 79.0 | 86.9 | +10% |",
        "| heads, d0, batch 1 | 70.0 | 56.0 | -20% |",
        "| bifpn, d0, batch 1 | 60.0 | 66.0 | +10% |",
        "| stem, d0, batch 1 | 20.0 | 27.0 | +35% |",
        "",
        "Off by more than 30%: stem, d0, batch 1",
    ]
    assert gpu_tables.beside_predicted(result_of(rows, models, "NVIDIA A100"), predicted) == ""


def test_kernels_stand_beside_predicted_ones():
    kernels = [{"kernel": "node<f16>", "launches": 3, "time_us": 2.0},
               {"kernel": "node<f16>", "launches": 1, "time_us": 4.0},
               {"kernel": "tail", "launches": 1, "time_us": 1.0}]  # fmt: skip
    launches = [{"kernel": "node<f16>", "launches": 4, "us": 30.0, "step_us": 12.0},
                {"kernel": "memset", "launches": 1, "us": 1.5, "step_us": 2.0}]  # fmt: skip
    predicted = {"rows": [guess("bifpn", 11.0, kernels=kernels)]}
    for launched_as, how, us, off in (
        ("graph", "", "12.0", "+20%"),
        ("call", ", *as calls*", "30.0", "+200%"),
    ):
        row = op_row("bifpn", 0.01, launches=launches, launched_as=launched_as)
        text = gpu_tables.beside_predicted(result_of([row], device=H100), predicted)
        assert f"| bifpn, d0, batch 1{how} | `node<f16>` | 4 | 4 | 10.0 | {us} | {off} |" in text
    assert "| bifpn, d0, batch 1, *as calls* | `memset` |  | 1 |  | 1.5 |  |" in text
    assert "| bifpn, d0, batch 1, *as calls* | `tail` | 1 |  | 1.0 |  |  |" in text
    page = "\n".join(gpu_tables.page(result_of([row], device=H100), predicted))
    assert "| bifpn, d0, batch 1 | 11.0 | 10.0 |" in page and "`tail`" not in page


def event(name, ts, dur, kind="kernel", **arguments):
    return {"cat": kind, "name": name, "ts": ts, "dur": dur, "args": arguments}


NODE = (
    "void edet::cuda::(anonymous namespace)::node<edet::cuda::BlockMma<__half, 1, 2> >"
    "(edet::cuda::(anonymous namespace)::Plan)"
)


def test_launches_are_summed_by_kernel_grid_and_memory():
    trace = [{"name": "a thread", "ph": "M"}]
    for start in (200.0, 0.0, 100.0):  # in no order
        trace += [
            event("Memset (Device)", start, 1.0, "gpu_memset"),
            event(NODE, start + 2, 4.0, grid=[8, 1, 1], **{"shared memory": 64}),
            event(NODE, start + 3, 6.0, grid=[8, 1, 1], **{"shared memory": 64}),  # overlaps
            event(NODE, start + 10, 2.0 + start / 100, grid=[1, 1, 1], **{"shared memory": 64}),
            event("cudaLaunchKernel", start, 50.0, "cuda_runtime"),
        ]
    assert gpu_launches.summarise(trace, 3) == [
        {"kernel": "memset", "grid": [], "shared_bytes": 0, "launches": 1, "us": 1.0,
         "step_us": 1.0},
        {"kernel": "node<BlockMma<f16, 1, 2>>", "grid": [8, 1, 1], "shared_bytes": 64,
         "launches": 2, "us": 10.0, "step_us": 8.0},
        {"kernel": "node<BlockMma<f16, 1, 2>>", "grid": [1, 1, 1], "shared_bytes": 64,
         "launches": 1, "us": 3.0, "step_us": 4.0},
    ]  # fmt: skip
    with pytest.raises(ValueError, match=r"2 calls must launch the same, got \["):
        gpu_launches.summarise(trace, 2)
    with pytest.raises(ValueError, match="3 calls must launch the same, got 0 launches"):
        gpu_launches.summarise(trace[:1], 3)


@pytest.mark.parametrize(
    ("name", "short"),
    [
        ("void edet::cuda::(anonymous namespace)::count<__nv_bfloat16>(edet::cuda::SelectParams)",
         "count<bf16>"),
        ("void at::native::elementwise_kernel<128, 2, at::native::(anonymous namespace)::f>(int)",
         "at::native::elementwise_kernel"),
        ("Memcpy HtoD (Pageable -> Device)", "memcpy"),
        ("sm90_xmma_fprop_implicit_gemm_f16f16", "sm90_xmma_fprop_implicit_gemm_f16f16"),
    ],
)  # fmt: skip
def test_kernels_have_the_names_of_the_gauge(name, short):
    assert gpu_launches.short_name(name) == short


def test_a_graph_is_profiled_where_the_profiler_sees_into_it(monkeypatch):
    def launches(call):
        if call == "blind":
            raise ValueError("8 calls must launch the same, got 0 launches")
        return [call]

    monkeypatch.setattr(gpu_launches, "launches", launches)
    both = {"call": "a call", "graph": "a graph"}
    assert gpu_launches.of_variants(both) == {"launches": ["a graph"], "launched_as": "graph"}
    both["graph"] = "blind"
    assert gpu_launches.of_variants(both) == {"launches": ["a call"], "launched_as": "call"}
    unseen = {"unseen": "8 calls must launch the same, got 0 launches"}
    assert gpu_launches.of_variants({"graph": "blind"}) == unseen
    assert gpu_launches.of_variants({}) == {}


def test_the_profilers_trace_is_read(monkeypatch):
    monkeypatch.setattr(gpu_launches, "ACTIVITY", torch.profiler.ProfilerActivity.CPU)
    monkeypatch.setattr(gpu_launches, "KINDS", ("cpu_op",))
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    x = torch.ones(64, 64)
    sine, cosine = gpu_launches.launches(lambda: (x.sin(), x.cos(), x.sin()))
    assert (sine["kernel"], sine["launches"]) == ("aten::sin", 2)
    assert (cosine["kernel"], cosine["launches"]) == ("aten::cos", 1)
    assert sine["us"] > 0 and cosine["step_us"] > 0


def test_the_page_is_filled_from_a_result(tmp_path):
    page, file = tmp_path / "cuda.md", tmp_path / "gpu.json"
    page.write_text(f"a\n\n{update_readme.GPU_BEGIN}\n\nold\n\n{update_readme.GPU_END}\n\nb\n")
    update_readme.update_gpu(file, page, check=True)  # there is no result: the page stays
    assert "old" in page.read_text()
    row = model_row("BiFPN", ours_graph=0.1, eager_graph=0.3) | {"model": "tf_efficientdet_d0"}
    file.write_text(json.dumps(result_of(models=[row], device=H100)))
    with pytest.raises(SystemExit, match=r"cuda\.md is stale"):
        update_readme.update_gpu(file, page, check=True)
    update_readme.update_gpu(file, page)
    update_readme.update_gpu(file, page, check=True)
    text = page.read_text()
    assert text.startswith("a\n\n<!-- gpu:begin -->\n\n**NVIDIA H100") and text.endswith("\nb\n")
    assert "| tf_efficientdet_d0 | 1 | float16 | BiFPN | 100.0 | 300.0 | **3.00×** |" in text
    assert "| BiFPN, tf_efficientdet_d0, batch 1 |" in text  # the gauge's file knows it
    assert "old" not in text


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
        expected = [v for v in gpu.OP_VARIANTS if not any(launch in v for launch in gpu.LAUNCHES)]
        assert list(row["times"]) == expected and row["unavailable"] == {}
        assert set(row["errors"]) == set(expected)
    assert result["failures"] == {} and result["left_out"] == []
    assert "| L2 | ours | ours, graph | Triton | Triton, graph |" in capsys.readouterr().out
    # calls are checked, then timed: the second time with several arguments
    assert [len(calls) for calls in on_cpu] == [1, 2] * len(expected)


#: The smallest network of which D0's pyramid is made.
NETWORK = (128, 128)


@pytest.fixture
def models(on_cpu, monkeypatch):
    """The benchmark of whole models on the CPU; compiled layers are the layers."""
    small = replace(get_config("tf_efficientdet_d0"), image_size=NETWORK)
    monkeypatch.setattr(gpu, "get_config", lambda name: small)
    monkeypatch.setattr(torch, "compile", lambda function, **options: function)
    monkeypatch.setattr(torch.compiler, "reset", lambda: None)
    return on_cpu


class Ours(TorchDispatchMode):
    """Whether an op of ours runs."""

    def __init__(self):
        super().__init__()
        self.ops = set()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function.namespace.startswith("edet_"):
            self.ops.add(function.overloadpacket.__name__)
        return function(*args, **(kwargs or {}))


def test_whole_models(models, tmp_path, capsys):
    arguments = ["--cases", "--parts", *gpu_models.PARTS, "--compile-models", "tf_efficientdet_d0"]
    result = benchmark(tmp_path, *arguments, "--compile-parts", "network", "heads")
    assert result["failures"] == {} and result["left_out"] == [] and result["rows"] == []
    rows = {row["part"]: row for row in result["models"]}
    assert list(rows) == list(gpu_models.PARTS)
    layers = [name for name in gpu_models.VARIANTS if not name.startswith("compile")]
    for part, row in rows.items():
        compiled = part in ("network", "heads")
        assert list(row["times"]) == list(gpu_models.VARIANTS if compiled else layers)
        assert row["unavailable"] == {}
        assert ("launches" in row) == (part in gpu_models.PROFILED)
        if part != "predictor":
            assert set(row["errors"]) == {*row["times"], "layers"}
            assert 0 < row["errors"]["ours"] < 0.02 and 0 < row["errors"]["layers"] < 0.02
    text = capsys.readouterr().out
    assert "| tf_efficientdet_d0 | 1 | float16 | predictor | 1000.0 |" in text


def test_eager_is_pytorchs_layers_and_ours_is_not(models):
    with torch.inference_mode():
        subject = gpu_models.Subject("tf_efficientdet_d0", 3, torch.float32, NETWORK)
        assert subject.compared == [0, 1, 2]
        for model, expected in ((subject.eager, set()), (subject.model, {"mbconv", "bifpn"})):
            with Ours() as ours:
                for call in subject.parts_of(model).values():
                    call()
            assert ours.ops >= expected and bool(ours.ops) == bool(expected)
        with Ours() as ours:
            detector = gpu_models.Detector(subject.eager, NETWORK, 2)
            found = detector.by_calls()
        assert ours.ops == {"detect"}  # what is around the layers
        gpu_models.check_objects("eager", found, detector.expected(2))
        gpu_models.check_objects("eager", detector.by_plan(), detector.expected(2))


def test_large_batches_are_compared_at_both_ends(models):
    with torch.inference_mode():
        subject = gpu_models.Subject("tf_efficientdet_d0", 7, torch.float32, NETWORK)
        assert subject.compared == [0, 1, 5, 6]
        result = [x.clone() for x in subject.parts_of(subject.model)["heads"]()]
        assert subject.check("heads", "ours", result) < 1e-4
        result[0][5] *= 1.01
        with pytest.raises(CheckFailed, match=r"batch 7, torch.float32, heads, ours: ours must"):
            subject.check("heads", "ours", result)


def test_wrong_boxes_are_seen(models):
    with torch.inference_mode():
        subject = gpu_models.Subject("tf_efficientdet_d0", 1, torch.float32, NETWORK)
        [(boxes, scores, labels)] = gpu_models.Detector(subject.model, NETWORK, 1).by_plan()
    right = [(boxes, scores, labels)]
    gpu_models.check_objects("ours", right, right)
    for wrong in ((boxes + 1, scores, labels), (boxes, scores, labels.flip(0)),
                  (boxes[1:], scores[1:], labels[1:])):  # fmt: skip
        with pytest.raises(CheckFailed, match="ours finds other boxes than the references"):
            gpu_models.check_objects("ours", [wrong], right)


def doubled(call):
    return lambda: [2 * x for x in call()]


def test_a_wrong_rival_is_listed(models, tmp_path, monkeypatch):
    monkeypatch.setattr(torch, "compile", lambda function, **options: doubled(function))
    arguments = ["--cases", "--parts", "BiFPN", "network", "--variants", "ours", "compile, graph"]
    bifpn, row = benchmark(tmp_path, *arguments, "--no-launches")["models"]
    assert "launches" not in bifpn
    assert list(row["times"]) == ["ours"]
    assert "network, compile, graph: ours must differ" in row["unavailable"]["compile, graph"]


def test_a_wrong_model_fails(models, tmp_path, monkeypatch):
    part_calls = gpu_models.part_calls

    def broken(model, *inputs):
        calls = part_calls(model, *inputs)
        return calls if model is not ours else {**calls, "heads": doubled(calls["heads"])}

    ours = None
    freeze = gpu_models.EfficientDet.freeze

    def remember(model):
        nonlocal ours
        ours = model
        return freeze(model)

    monkeypatch.setattr(gpu_models.EfficientDet, "freeze", remember)
    monkeypatch.setattr(gpu_models, "part_calls", broken)
    arguments = ["--cases", "--parts", "BiFPN", "heads", "backbone", "--compile-models"]
    with pytest.raises(SystemExit, match=r"^tf_efficientdet_d0, batch 1, float16: .* heads, ours"):
        benchmark(tmp_path, *arguments)
    result = json.loads((tmp_path / "gpu.json").read_text())
    assert [row["part"] for row in result["models"]] == ["BiFPN", "backbone"]


def test_what_compiles_too_long_is_ended():
    with pytest.raises(TimeoutError, match="takes longer than 0 s"), gpu_timing.within(0.05):
        for _ in range(100):
            time.sleep(0.05)
    with gpu_timing.within(60), gpu_timing.within(float("inf")):
        pass
    assert signal.getitimer(signal.ITIMER_REAL) == (0, 0)


def test_figures_are_of_enough_samples(monkeypatch):
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    for ms, samples in ((1.0, 100), (20.0, 20), (100.0, 5)):
        found = gpu_timing.measure([lambda: None] * 2, 0.1, lambda call, ms=ms: ms)
        assert found == {"median_ms": ms / 2, "q1_ms": ms / 2, "q3_ms": ms / 2,
                         "samples": samples}  # fmt: skip


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
    result = benchmark(tmp_path, *arguments, "--parts", "heads")
    assert result["rows"] == result["models"] == []
    assert result["left_out"] == [
        *("whole models, ours: 1 of 1 cases", "ours: 2 of 2 cases", "compile: 2 of 2 cases"),
    ]
