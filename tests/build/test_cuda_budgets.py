"""Budgets of the compiled CUDA kernels for float16, on sm_90, without a GPU: what the machine code
of a fusion node issues for a vector of 8 channels, and what it must not contain.

Blocks are traced by the gauge (docs/gpu-model.md); a budget is what was reached, and a tenth.
"""

from __future__ import annotations

import json
import os
from collections import Counter
from pathlib import Path

import pytest
import torch

from benchmarks.gpu_model import launches, predict, rates, sass, timing

ROOT = Path(__file__).resolve().parents[2]

pytestmark = pytest.mark.slow

#: A division of floats in full precision, a jump by table, a call.
FORBIDDEN = {"FCHK", "BRX", "CALL"}
#: Conversions, of which an integer division has two.
CONVERSIONS = {"I2F", "F2I"}
WARPS = 8
#: Warp instructions for each vector of 8 channels of a pixel (32 of them, one for each lane).
DEPTHWISE, EPILOGUE = 185, 121
FUSED = {"one": 102, "down": 184, "up": 346}
#: Rows and columns of a tile by its product's rows.
TILES = {"0, 2": (4, 4), "1, 2": (4, 8)}
#: The same where pixels are many, for a tile's 64 pixels: all but the weights, which stay.
NARROW = {"one": 3030, "down": 3030, "up": 6915}


@pytest.fixture(scope="module")
def kernels():
    if sass.find_compiler() is None or sass.find_disassembler() is None:
        pytest.skip("needs nvcc and nvdisasm")
    return predict.Kernels(90, ROOT / "build" / "gpu-model")


def launch_of(kind, size, batch=1, channels=64):
    """The first launch of a node of a kind that its kernel is compiled for, which fuses."""
    if not list(ROOT.glob("build/*/edet_emulation.so")) and not os.environ.get("EDET_EMULATED"):
        pytest.skip("needs the emulation: EDET_EMULATION=1 python setup.py build_ext --inplace")
    sizes = {"one": [size], "down": [size, size // 2], "up": [size, size, 2 * size]}[kind]
    maps = [torch.empty(batch, channels, side, side, dtype=torch.half)
            .to(memory_format=torch.channels_last) for side in sizes]  # fmt: skip
    ones = torch.ones(channels)
    weights = (torch.empty(9, channels), torch.empty(channels // 16, channels, 16), ones, ones)
    recorder = launches.Recorder()
    with launches.dry(rates.gpu("H100").device), recorder:
        if kind == "one":
            torch.ops.edet_kernels.separable_conv(maps, *weights, 1)
        else:
            edges = torch.ones(len(maps))
            torch.ops.edet_kernels.fusion_node(maps, edges, *weights, [size, size], 0, 0, 1, 0)
    ((call,),) = [recorder.calls]
    return next(launch for launch in call.launches if not launch.kernel.startswith("narrow<"))


@pytest.fixture(scope="module")
def traced(kernels):
    """Traces of a block in the middle of a map, of one tile."""
    known = {}

    def trace(kind, size):
        if (kind, size) not in known:
            launch = launch_of(kind, size)
            found = kernels[launch.kernel]
            known[kind, size] = found, launch, predict.trace_tile(found, launch)
        return known[kind, size]

    return trace


# maps of few tiles, of 4×4 pixels, and of more, of 4×8; and of many pixels, with another kernel
kinds = pytest.mark.parametrize("kind", FUSED)
FEW, MANY = (32, 64), 192
sizes = pytest.mark.parametrize("size", [*FEW, MANY])


@pytest.mark.parametrize(
    ("name", "count"),
    [("node<BlockMma<f16, 1, 2>>", 8), ("narrow_node<f16, 2, 2>", 5),
     ("multiply<BlockMma<f16, 1, 2>>", 3),
     ("multiply_few<BlockMma<f16, 1, 2>>", 3),
     ("fuse_depthwise<BlockMma<f16, 1, 2>>", 3), ("fuse_depthwise_strips<f16, 2>", 3),
     ("convolve_depthwise<f16, 3, 1, true, true>", 12),
     ("multiply_pixels<unsigned char, f16>", 2)],
)  # fmt: skip
def test_no_slow_code(kernels, name, count):
    """In the whole code of the kernels for 16-bit maps, and so in their tile loops."""
    assert kernels[name]
    function = name.split("<")[0]
    found = {kernel: code for kernel, code in kernels._read.items()
             if kernel.startswith(function + "<")}  # fmt: skip
    assert len(found) == count
    for kernel, code in found.items():
        assert not FORBIDDEN & {at.op for at in code.code}, kernel


@kinds
@pytest.mark.parametrize("size", FEW)
def test_instructions_of_a_vector(traced, kind, size):
    kernel, launch, traces = traced(kind, size)
    counts = predict.phases(kernel, traces)
    rows, columns = next(TILES[name] for name in TILES if name in launch.kernel)
    # vectors of a tile, by the warp
    patch, pixels = (rows + 2) * (columns + 2) * 8 / 32, rows * columns * 8 / 32
    fused = counts["fuse"] + counts.get("activation", 0)
    # of 36 pixels one warp reads four more, and the others read theirs again
    assert fused / patch <= FUSED[kind] * (1.3 if columns == 4 else 1)
    # the more rows a warp computes, the fewer it reads twice
    assert counts["depthwise"] / pixels <= DEPTHWISE * (1.3 if columns == 4 else 1)
    assert counts["epilogue"] / pixels <= EPILOGUE * (1.2 if columns == 4 else 1)


@kinds
def test_instructions_of_many_pixels(traced, kind):
    kernel, launch, traces = traced(kind, MANY)
    assert launch.kernel.startswith("narrow_node<")
    counts = predict.phases(kernel, traces)
    rows = int(launch.kernel.rstrip(">").split(", ")[-1])  # of a warp, of 16 pixels
    found = sum(n for part, n in counts.items() if part not in ("weights", "factors"))
    assert found * 64 / (rows * WARPS * 16) <= NARROW[kind]


@kinds
@sizes
def test_no_division_of_integers_for_a_vector(traced, kind, size):
    kernel, _, traces = traced(kind, size)
    executed = Counter(
        kernel.code[i].op
        for trace in traces
        for i in trace.code
        if predict.phase_of(kernel.code[i].functions)
        in ("fuse", "depthwise", "product", "epilogue")
    )
    assert not CONVERSIONS & set(executed)


@kinds
@sizes
def test_loads_in_flight(traced, kind, size):
    """A thread waits for none of its map's vectors before 8, or all, are on their way."""
    kernel, _, traces = traced(kind, size)
    for trace in traces[: WARPS - 1]:
        code = [kernel.code[i] for i in trace.code]
        function = "fuse_patch" if size == MANY else "fuse_known"
        loads = sum(at.op == "LDG" and function in at.functions for at in code)
        assert loads
        # of a single map of many pixels, four or three; other blocks' are on their way, too
        least = 3 if size == MANY and kind == "one" else 8
        assert timing.loads_in_flight(kernel, trace, function) >= min(least, loads)


@pytest.mark.parametrize(("kind", "most"), [("one", 24), ("down", 38), ("up", 58)])
def test_instructions_of_a_wide_node(kernels, kind, most):
    """Of a thread, for each number of the first half's result: fused and convolved down strips."""
    channels, size = 384, 192
    launch = launch_of(kind, size, channels=channels)
    kernel = kernels[launch.kernel]
    assert launch.kernel.startswith("fuse_depthwise_strips<")
    traces, _, _ = predict.trace_launch(kernel, launch)
    assert predict.count(traces) * launch.grid[0] * 32 <= most * size**2 * channels
    # of a block for each multiprocessor, or of several at once
    held = timing.resident_blocks(kernel, 256, launch.shared_bytes, rates.gpu("H100"))
    assert held >= (2 if kind == "up" else 3)
    assert launch.grid[0] <= held * rates.gpu("H100").multiprocessors


@sizes
def test_two_blocks_fit_a_multiprocessor(traced, size):
    for kind in FUSED:
        kernel, launch, _ = traced(kind, size)
        # of many pixels a launch asks for the shared memory that its device has
        for name in ("H100",) if size == MANY else ("H100", "A100"):
            gpu = rates.gpu(name)
            assert timing.resident_blocks(kernel, 256, launch.shared_bytes, gpu) >= 2


def test_no_slower_than_the_recorded_table(kernels):
    """D0's BiFPN at batch 1, predicted from today's code, against benchmarks/results."""
    launch_of("one", 32)  # skips where there is no emulation
    gpu = rates.gpu("H100")
    predictor = predict.Predictor(gpu, ROOT / "build" / "gpu-model")
    calls = launches.of_model("tf_efficientdet_d0", 1, gpu.device)
    found = sum(predictor.time_us(call) for call in calls if call.op == "bifpn")
    rows = json.loads((ROOT / "benchmarks/results/gpu-model.json").read_text())["rows"]
    (recorded,) = [row for row in rows if (row["gpu"], row["model"], row["batch"], row["op"])
                   == ("H100", "tf_efficientdet_d0", 1, "bifpn")]  # fmt: skip
    assert found <= 1.05 * recorded["predicted_us"]


@pytest.mark.parametrize("batch", [1, 64])
def test_softmax_costs_what_fast_fusion_costs(kernels, batch):
    """D0's BiFPN, predicted; docs/gpu-model.md has the times."""
    launch_of("one", 32)  # skips where there is no emulation
    gpu = rates.gpu("H100")
    predictor = predict.Predictor(gpu, ROOT / "build" / "gpu-model")

    def bifpn(fusion):
        calls = launches.of_model("tf_efficientdet_d0", batch, gpu.device, fusion=fusion)
        return sum(predictor.time_us(call) for call in calls if call.op == "bifpn")

    fast = bifpn("fast")
    assert abs(bifpn("softmax") - fast) <= 0.02 * fast


@pytest.fixture(scope="module")
def detect_traces(kernels):
    """The kernels of D0's detect at batch 1, each with the traces of a block."""
    launch_of("one", 32)  # skips where there is no emulation
    calls = launches.of_model("tf_efficientdet_d0", 1, rates.gpu("H100").device)
    (call,) = [call for call in calls if call.op == "detect"]
    found = [(kernels[launch.kernel], launch) for launch in call.launches if launch.kernel]
    return {launch.kernel.split("<")[0]: (kernel, predict.trace_launch(kernel, launch)[0])
            for kernel, launch in found}  # fmt: skip


@pytest.mark.parametrize(("name", "budget"), [("count", 7.2), ("collect", 3.7)])
def test_instructions_of_a_logit(detect_traces, name, budget):
    """Each thread has 32 logits, whose four vectors are on their way together."""
    kernel, traces = detect_traces[name]
    count = sum("visit_vector" in kernel.code[i].functions for trace in traces for i in trace.code)
    assert count / (WARPS * 32) <= budget
    assert timing.loads_in_flight(kernel, traces[0], "load_aligned") == 4


def test_instructions_of_sorting_and_suppressing(detect_traces):
    """6000 keys, of which 512 are sorted and 100 kept."""
    _, traces = detect_traces["take_best"]
    assert len(traces) == 16
    assert predict.count(traces) <= 46_000


@pytest.mark.parametrize(
    ("channels", "size", "kernel", "stride", "most"),
    [(32, 256, 3, 1, 1.2), (96, 256, 3, 2, 1.1), (144, 128, 3, 1, 1.2), (144, 128, 5, 2, 1.45),
     (240, 64, 5, 1, 2.1)],
)  # fmt: skip
def test_depthwise_of_many_images(kernels, channels, size, kernel, stride, most):
    """A block that expands nothing: its first kernel, against the bytes that it must move."""
    launch_of("one", 32)  # skips where there is no emulation
    gpu = rates.gpu("H100")
    image = torch.empty(64, channels, size, size, dtype=torch.half)
    ones, reduced = torch.ones(channels), 16
    squeeze = [torch.empty(1, channels, 16), torch.ones(reduced),
               torch.empty(-(-channels // 16), reduced, 16), ones]  # fmt: skip
    project = [torch.empty(1, channels, 16), torch.ones(16), torch.ones(16)]
    out, before = size // stride, (kernel - stride) // 2
    recorder = launches.Recorder()
    with launches.dry(gpu.device), recorder:
        torch.ops.edet_kernels.mbconv(
            image.to(memory_format=torch.channels_last),
            [],
            [torch.empty(kernel**2, channels), ones, ones],
            squeeze,
            project,
            stride,
            [before, before],
            [out, out],
            1,
            False,
        )
    (call,) = recorder.calls
    predictions = predict.Predictor(gpu, ROOT / "build" / "gpu-model").call(call)
    (found,) = [p for p in predictions if p and p.kernel.startswith("convolve_depthwise<")]
    assert found.time_us <= most * found.bandwidth_us


@pytest.mark.parametrize("dtype", [torch.uint8, torch.half], ids=str)
@pytest.mark.parametrize(("batch", "most"), [(1, 8), (64, 200)])
def test_stem(kernels, dtype, batch, most):
    """The first layer of D0, in microseconds."""
    launch_of("one", 32)  # skips where there is no emulation
    gpu = rates.gpu("H100")
    ones, three = torch.ones(32), torch.ones(3)
    image, weight = torch.empty(batch, 3, 512, 512, dtype=dtype), torch.empty(2, 27, 16)
    recorder = launches.Recorder()
    with launches.dry(gpu.device), recorder:
        torch.ops.edet_kernels.stem(
            image, weight, ones, ones, three, three, [0, 0], [256, 256], 1, torch.half
        )
    (call,) = recorder.calls
    (found,) = predict.Predictor(gpu, ROOT / "build" / "gpu-model").call(call)
    assert found and found.kernel.startswith("multiply_pixels<")
    assert found.time_us <= most


@pytest.mark.parametrize(
    ("channels", "columns", "side", "kernel", "most"),
    [(384, 384, 192, "multiply_large", 17_000), (384, 384, 48, "multiply_large", 17_000),
     (64, 810, 128, "multiply_rows", 10_200)],
)  # fmt: skip
def test_instructions_of_a_product(kernels, channels, columns, side, kernel, most):
    """A tile of 128 rows and 128 columns of a layer with swish."""
    launch_of("one", 32)  # skips where there is no emulation
    gpu = rates.gpu("H100")
    image = torch.empty(1, channels, side, side, dtype=torch.half)
    ones = torch.ones(columns)
    packed = torch.empty(-(-columns // 16), channels, 16)
    recorder = launches.Recorder()
    with launches.dry(gpu.device), recorder:
        image = image.to(memory_format=torch.channels_last)
        layer = ([image], torch.empty(9, channels), packed, ones, ones, 1)
        torch.ops.edet_kernels.separable_conv(*layer)
    ((call,),) = [recorder.calls]
    (launch,) = [one for one in call.launches if one.kernel.startswith(kernel)]
    found = kernels[launch.kernel]
    traces = predict.trace_tile(found, launch) if kernel == "multiply_rows" else (
        predict.trace_launch(found, launch)[0]
    )  # fmt: skip
    assert predict.count(traces) <= most
    assert not {at.op for at in found.code} & (FORBIDDEN - {"BRX"})
    assert sum(at.op == "LDGSTS" for at in found.code) >= 8


def test_what_may_begin_a_call_lets_nothing_overtake_it(kernels):
    """The launch after it reads weights before it waits: by then all before the call has ended."""
    code = [at.op for at in kernels["narrow<f16>"].code]
    assert code.index("ACQBULK") < code.index("PREEXIT")
