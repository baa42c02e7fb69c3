"""The gauge: decoding machine code, executing it, replaying it, and what the launchers list."""

from __future__ import annotations

import os

import numpy as np
import pytest
import torch

from benchmarks.gpu_model import launches, predict, rates, sass, timing
from benchmarks.gpu_model.machine import Block, Event, Trace

# LDG R2 (sets board 2, stall 4); IADD3 that waits for it (bits 116-121: board 2)
LISTING = """
.text.kernel_half:
//## File "/nowhere.cu", line 3
        /*0000*/    LDG.E.128.CONSTANT R4, desc[UR4][R2.64] ;  /* 0x0000000402047981 */
  /* 0x000ea8000c1e9d00 */
.L_x_0:
        /*0010*/    @!P0 IADD3 R8, R4.reuse, 0x1, RZ ;  /* 0x0000000104088810 */
  /* 0x004fe20007ffe0ff */
        /*0020*/    BRA `(.L_x_0) ;  /* 0xfffffffc00f07947 */
  /* 0x000fc0000383ffff */
.text.other:
        /*0000*/    EXIT ;  /* 0x000000000000794d */
  /* 0x000fea0003800000 */
"""


def instruction(text, address=0, *, stall=1, sets=7, waits=0, functions=()):
    """One from its text."""
    guard = ""
    if text.startswith("@"):
        guard, text = text[1:].split(" ", 1)
    name, _, operands = text.partition(" ")
    return sass.Instruction(
        address, guard, name, sass._operands(operands), stall, sets, 7, waits, functions
    )


def kernel(lines, arch=90):
    """A kernel of lines of code; ``name:`` in front of one is a label."""
    made = sass.Kernel("k", "k", arch, 32)
    for i, line in enumerate(lines):
        if ": " in line:
            label, line = line.split(": ", 1)
            made.labels[label] = 16 * i
        made.code.append(instruction(line, 16 * i))
    return made


def run(lines, threads=32, params=b"", grid=(1, 1, 1)):
    block = Block(kernel([*lines, "EXIT"]), params, grid, (threads, 1, 1), (0, 0, 0))
    return block, block.run()


def registers(block, number, warp=0):
    return block.warps[warp].registers[number].tolist()


def test_fields_and_functions_are_decoded():
    (found,) = sass.parse(LISTING, 90, {"kernel_half": 40}, "half")
    load, add, branch = found.code
    assert (load.op, load.sets, load.stall, load.waits) == ("LDG", 2, 4, 0)
    assert (add.guard, add.operands, add.waits) == ("!P0", ("R8", "R4", "0x1", "RZ"), 1 << 2)
    assert branch.op == "BRA" and found.labels == {".L_x_0": 0x10}
    assert found.registers == 40


@pytest.mark.parametrize(
    ("symbol", "name"),
    [
        ("void edet::cuda::(anonymous namespace)::node<edet::cuda::BlockMma<edet::cuda::f16, 1, 2> "
         ">(edet::cuda::(anonymous namespace)::Plan const&)", "node<BlockMma<f16, 1, 2>>"),
        ("void edet::cuda::_GLOBAL__N__73bccc3d_14_fusion_node_cu_43004e79::node<edet::cuda::"
         "BlockMma<__half, (int)1, (int)2>>(T1::Plan)", "node<BlockMma<f16, 1, 2>>"),
    ],
)  # fmt: skip
def test_both_compilers_kernels_have_one_name(symbol, name):
    assert sass.plain_name(symbol) == name


def test_functions_of_the_project_are_found():
    source = sass.SOURCES / "fusion.cuh"
    lines = source.read_text().splitlines()
    line = next(i for i, text in enumerate(lines, 1) if "== Activation::hard_swish" in text)
    assert sass.function_of(str(source), line) == "activate"
    assert sass.function_of(str(source), 1) == ""


def test_division_of_unsigned_integers():
    """nvcc's sequence for threadIdx.x / 7, from the reciprocal on."""
    block, _ = run([
        "S2R R0, SR_TID.X",
        "MOV R9, 0x7",
        "I2F.U32.RP R3, R9",
        "MUFU.RCP R3, R3",
        "IADD3 R4, R3, 0xffffffe, RZ",
        "F2I.FTZ.U32.TRUNC.NTZ R5, R4",
        "IMAD.MOV R7, RZ, RZ, -R5",
        "IMAD R7, R7, R9, RZ",
        "IMAD.MOV.U32 R4, RZ, RZ, RZ",
        "IMAD.HI.U32 R5, R5, R7, R4",
        "IMAD.HI.U32 R6, R5, R0, RZ",
        "IMAD R8, R6, -0x7, R0",
        "ISETP.GE.U32.AND P0, PT, R8, 0x7, PT",
        "@P0 IADD3 R8, R8, -0x7, RZ",
        "@P0 IADD3 R6, R6, 0x1, RZ",
    ])  # fmt: skip
    assert registers(block, 6) == [t // 7 for t in range(32)]


def test_sums_of_64_bits():
    block, _ = run([
        "S2R R0, SR_TID.X",
        "IMAD.MOV.U32 R2, RZ, RZ, -0x8",  # the low word: 2^32 - 8
        "IADD3 R4, P0, R0, R2, RZ",
        "IADD3.X R5, RZ, RZ, RZ, P0, !PT",
        "ISETP.LT.U32.AND P1, PT, R4, 0x4, PT",
        "ISETP.GE.AND.EX P1, PT, R5, RZ, PT, P1",  # (R5, R4) >= (0, 4), as signed
        "SEL R6, RZ, 0x1, !P1",
        "LEA R8, P2, R2, R0, 0x4",
        "LEA.HI.X R9, R2, RZ, RZ, 0x4, P2",
        "IMAD.WIDE R10, R0, -0x2, R8",
    ])  # fmt: skip
    total = [t + 0xFFFFFFF8 for t in range(32)]
    assert registers(block, 4) == [v & 0xFFFFFFFF for v in total]
    assert registers(block, 5) == [v >> 32 for v in total]
    pair = [(0xFFFFFFF8 << 4) + t for t in range(32)]
    assert registers(block, 8) == [v & 0xFFFFFFFF for v in pair]
    assert registers(block, 9) == [v >> 32 for v in pair]
    assert registers(block, 10) == [(v - 2 * t) & 0xFFFFFFFF for t, v in enumerate(pair)]


@pytest.mark.parametrize(("table", "meaning"), [
    ("0xc0", lambda a, b, c: a & b), ("0x3c", lambda a, b, c: a ^ b),
    ("0x96", lambda a, b, c: a ^ b ^ c), ("0xf8", lambda a, b, c: a | b & c),
])  # fmt: skip
def test_logic(table, meaning):
    block, _ = run(["S2R R0, SR_TID.X", "IMAD R1, R0, 0x5, RZ",
                    f"LOP3.LUT P0, R2, R0, R1, 0x19, {table}, !PT"])  # fmt: skip
    expected = [meaning(t, 5 * t, 0x19) for t in range(32)]
    assert registers(block, 2) == expected
    assert block.warps[0].predicates[0].tolist() == [v != 0 for v in expected]


def test_lanes_that_diverge_meet_again():
    """Two sides of a branch run one after the other; what follows runs once."""
    block, (trace,) = run([
        "S2R R0, SR_TID.X",
        "ISETP.GE.AND P0, PT, R0, 0x8, PT",
        "BSSY B0, `(end)",
        "@P0 BRA `(other)",
        "MOV R1, 0x1",
        "BRA `(end)",
        "other: MOV R1, 0x2",
        "end: BSYNC B0",
        "MOV R2, R1",
    ])  # fmt: skip
    assert registers(block, 2) == [1] * 8 + [2] * 24
    assert trace.code.count(7) == 2  # both sides come to the meeting
    assert trace.code.count(8) == 1
    assert sum(trace.taken) == 2


def test_a_loop_runs_as_often_as_its_lane_that_stays_longest():
    _, (trace,) = run([
        "S2R R0, SR_TID.X",
        "loop: IADD3 R0, R0, -0x4, RZ",
        "ISETP.GE.AND P0, PT, R0, RZ, PT",
        "@P0 BRA `(loop)",
    ])  # fmt: skip
    assert trace.code.count(1) == 8


def test_a_call_of_a_label_is_a_jump_and_a_divisions_slow_path_is_not_taken():
    """Before sm_90 the compiler leaves a loop by a call of what follows it."""
    block, (trace,) = run([
        "MOV R0, 0x3",
        "loop: IADD3 R0, R0, -0x1, RZ",
        "CALL.REL.NOINC `($__internal_1_$__cuda_sm3x_div_rn_noftz_f32_slowpath)",
        "ISETP.LT.AND P0, PT, R0, 0x1, PT",
        "@P0 CALL.REL.NOINC `(.L_x_1)",
        "BRA `(loop)",
        ".L_x_1: MOV R1, R0",
    ])  # fmt: skip
    assert registers(block, 1) == [0] * 32
    assert trace.code.count(1) == 3


def test_shared_memory_and_barriers():
    """The last warp writes what the first one reads; a bank's turns are counted."""
    block, traces = run([
        "S2R R0, SR_TID.X",
        "IMAD.SHL.U32 R1, R0, 0x4, RZ",
        "STS [R1], R0",
        "BAR.SYNC.DEFER_BLOCKING 0x0",
        "LDS R2, [0xfc]",
        "IMAD.SHL.U32 R3, R0, 0x80, RZ",
        "LDS R4, [R3]",
    ], threads=64)  # fmt: skip
    assert registers(block, 2) == [63] * 32
    assert traces[0].moved[2].turns == 1
    assert traces[0].moved[6].turns == 32


def test_atomics_of_shared_memory():
    """Each lane finds what those before it have added; a count takes no turn for each lane."""
    block, (trace,) = run([
        "S2R R0, SR_TID.X",
        "MOV R1, 0x10",
        "ATOMS.ADD R2, [R1], R0",
        "ATOMS.POPC.INC.32 RZ, [R1+URZ+0x4]",
        "LDS R3, [R1]",
        "LDS R4, [R1+0x4]",
    ])  # fmt: skip
    assert registers(block, 2) == [t * (t - 1) // 2 for t in range(32)]
    assert registers(block, 3)[0] == 31 * 16 and registers(block, 4)[0] == 32
    assert trace.moved[2].turns == 32 and trace.moved[3].turns == 1


def test_global_memory_holds_what_it_is_said_to_hold():
    made = kernel([
        "S2R R0, SR_TID.X",
        "IMAD.WIDE R2, R0, 0x10, RZ",
        "LDG.E.128 R4, desc[UR4][R2.64]",
        "LDG.E R8, desc[UR4][R2.64]",
        "EXIT",
    ])  # fmt: skip
    block = Block(made, b"", (1, 1, 1), (32, 1, 1), (0, 0, 0))
    block.loaded = {4: 77, 16: lambda places: [(places + k).astype(np.uint32) for k in range(4)]}
    block.run()
    assert registers(block, 5) == [16 * t + 1 for t in range(32)]
    assert registers(block, 8) == [77] * 32


def test_only_a_warp_that_diverged_goes_where_lanes_meet():
    for lanes, expected in ((32, 1), (8, 2)):
        block, _ = run([
            "S2R R0, SR_TID.X",
            f"ISETP.GE.AND P0, PT, R0, {lanes:#x}, PT",
            "@P0 EXIT",
            "MOV R1, 0x1",
            "BRA.DIV UR4, `(apart)",
            "EXIT",
            "apart: MOV R1, 0x2",
        ])  # fmt: skip
        assert registers(block, 1)[0] == expected


def test_a_constant_of_two_halves_is_a_word():
    block, _ = run(["HFMA2.MMA R1, -RZ, RZ, 1, 5.9604644775390625e-08"])
    assert registers(block, 1) == [0x3C000001] * 32


def test_sectors_of_a_load():
    _, (trace,) = run(["S2R R0, SR_TID.X", "IMAD.WIDE R2, R0, 0x40, RZ",
                       "LDG.E.128 R4, desc[UR4][R2.64]"])  # fmt: skip
    assert len(trace.moved[2].sectors) == 32
    assert trace.moved[2].bytes == 512


def test_parameters_and_the_grid_are_read():
    block, _ = run(["LDC R1, c[0x0][0x210]", "ULDC UR4, c[0x0][0xc]", "IMAD.U32 R2, RZ, RZ, UR4"],
                   params=(77).to_bytes(4, "little"), grid=(5, 1, 1))  # fmt: skip
    assert registers(block, 1)[0] == 77
    assert registers(block, 2)[0] == 5


def test_an_instruction_that_is_not_known_is_named():
    with pytest.raises(RuntimeError, match="WGMMA"):
        run(["WGMMA R0, R1"])


def waiting_kernel(loads):
    """So many loads, then a sum that waits for all."""
    made = sass.Kernel("k", "k", 90, 32)
    made.code = [instruction(f"LDG.E.128 R{4 * i}, desc[UR4][R40.64]", sets=0, functions=("f",))
                 for i in range(loads)]  # fmt: skip
    made.code.append(instruction("IADD3 R0, R0, R4, RZ", waits=1))
    return made


def test_loads_that_are_sent_together_take_one_latency():
    gpu, one, four = rates.gpu("H100"), waiting_kernel(1), waiting_kernel(4)
    traces = [
        Trace(list(range(n + 1)), [False] * (n + 1), {i: Event((i,)) for i in range(n)})
        for n in (1, 4)
    ]
    alone, together = (
        timing.replay(k, t, gpu)[-1] for k, t in zip((one, four), traces, strict=True)
    )
    assert together - alone == 3
    assert timing.loads_in_flight(four, traces[1], "f") == 4
    assert timing.loads_in_flight(four, traces[1], "g") == 0
    assert alone >= rates.latency("LDG", "l2")
    traces[1].moved[3] = Event((0,))  # the last one's sector is the first one's
    again = timing.replay(four, traces[1], gpu)[-1]
    assert again == together - 1


def test_a_multiprocessor_issues_four_instructions_a_cycle():
    made = kernel(["FADD R0, R0, R0"] * 1000)
    trace = Trace(list(range(1000)), [False] * 1000)
    cycles = timing.simulate(made, [[trace] * 16], rates.gpu("H100"))
    assert cycles == pytest.approx(4000, rel=0.02)
    assert timing.simulate(made, [[trace] * 16], rates.gpu("A100")) == pytest.approx(8000, rel=0.02)


@pytest.mark.parametrize(
    ("registers", "shared", "expected"),
    [(128, 1024, 2), (80, 1024, 3), (32, 100_000, 2), (32, 0, 8)],
)
def test_blocks_that_fit(registers, shared, expected):
    made = sass.Kernel("k", "k", 90, registers)
    assert timing.resident_blocks(made, 256, shared, rates.gpu("H100")) == expected


def test_every_rate_has_a_source():
    table = rates.table()
    rows = [row for part in ("latency", "interval") for row in table[part].values()]
    rows += [row for device in table["devices"].values() for row in device.values()]
    for _, source in rows:
        assert source.split(":")[0].split(",")[0] in table["sources"]


needs_emulation = pytest.mark.skipif(
    not list(sass.ROOT.glob("build/*/edet_emulation.so")) and not os.environ.get("EDET_EMULATED"),
    reason="needs the emulation: EDET_EMULATION=1 python setup.py build_ext --inplace",
)


@needs_emulation
def test_launches_of_a_model_need_no_memory():
    """D7 at batch 64 has maps of gigabytes; its launches come from the launchers."""
    device = rates.gpu("H100").device
    calls = launches.of_model("tf_efficientdet_d0", 64, device)
    bifpn = next(call for call in calls if call.op == "bifpn")
    assert len(bifpn.launches) == len(bifpn.works) == 24
    kernels = [launch.kernel.split("<")[0] for launch in bifpn.launches]
    # of P3 to P5, in three cells; the smaller maps have few pixels
    assert {name: kernels.count(name) for name in kernels} == {"node": 9, "narrow_node": 15}
    # the nodes of D0's cells at batch 64 read and write half a gigabyte
    assert sum(work.bytes for work in bifpn.works) == pytest.approx(534e6, rel=0.05)


@needs_emulation
def test_traced_bytes_are_those_that_the_emulation_counts(tmp_path):
    """One node on one tile: the machine code writes what the source writes, and reads no more."""
    if sass.find_compiler() is None or sass.find_disassembler() is None:
        pytest.skip("needs nvcc and nvdisasm")
    module = launches.emulation()
    gpu = rates.gpu("H100")
    maps = [torch.zeros(1, 64, size, size, dtype=torch.half).to(memory_format=torch.channels_last)
            for size in (8, 4)]  # fmt: skip
    edges, one = torch.ones(2), torch.ones(64)
    weights = (edges, torch.zeros(9, 64), torch.zeros(4, 64, 16), one, one)
    module.set_device(132, gpu.device.shared_bytes)
    module.count_launches(True)
    torch.ops.edet_emulation.fusion_node(maps, *weights, [8, 8], 0, 0, 1, 0)
    (counted,) = module.launches()
    module.count_launches(False)
    module.set_device(4, gpu.device.shared_bytes)
    launch = launches._launch(counted)
    kernels = predict.Kernels(90, sass.ROOT / "build" / "gpu-model")
    found = kernels[launch.kernel]
    read = written = 0
    for number in range(launch.grid[0]):
        block = Block(found, launch.params, launch.grid, launch.block, (number, 0, 0))
        for trace in block.run():
            for position, event in trace.moved.items():
                op = found.code[trace.code[position]].op
                written += event.bytes if op == "STG" else 0
                read += event.bytes if op == "LDG" else 0
    assert written == counted["bytes_written"] == 8 * 8 * 64 * 2
    # the compiler keeps some of what the source loads twice
    assert 0.8 * counted["bytes_read"] <= read <= counted["bytes_read"]
    assert np.isfinite(predict.predict(kernels, launch, predict.Work(1), gpu).time_us)
