"""Compiles Triton kernels for a GPU that need not be there, and says what came out.

Runs the ops, forward and backward, on CPU tensors with a driver that names a GPU but has none:
each launch is specialised and compiled as it would be on that GPU, and not run. Prints one JSON
object a kernel; or, of small calls of every kind, one object with the kernels and the statements of
them that no call compiled. A program of its own because Triton decides at import whether it
interprets.

    python tests/kernels/triton_compile.py ARCH DTYPE CHANNELS HEIGHT WIDTH
    python tests/kernels/triton_compile.py ARCH
"""

from __future__ import annotations

import ast
import json
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
import triton
from torch.utils._python_dispatch import TorchDispatchMode
from triton.backends.compiler import GPUTarget
from triton.compiler.code_generator import CodeGenerator

from edet_kernels import triton as ops
from edet_kernels.names import ACTIVATIONS, POOLS
from edet_kernels.testing.samples import DTYPES, FUSION_KINDS, Call, sample

TOOLS = Path(triton.__file__).parent / "backends/nvidia/bin"


class AbsentGpu:
    """What Triton asks of a driver before it launches."""

    def __init__(self, arch: int) -> None:
        self.target = GPUTarget("cuda", arch, 32)

    def get_current_target(self) -> GPUTarget:
        return self.target

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0


class Arguments(TorchDispatchMode):
    """Notes the arguments of the operator behind a public call."""

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function.namespace == "edet_kernels":
            self.found = args
        return function(*args, **(kwargs or {}))


def operator_arguments(call: Call) -> tuple[Any, ...]:
    with Arguments() as mode:
        call()
    return mode.found


def tool(name: str, *arguments: str) -> str:
    command = [str(TOOLS / name), *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def describe(name: str, kernel: Any) -> dict[str, Any]:
    """What is in a compiled kernel."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(kernel.asm["cubin"])
        file.flush()
        usage = tool("cuobjdump", "-res-usage", file.name)
        instructions = re.findall(
            r"^\s+/\*\w+\*/\s+(.*?);?\s*$", tool("nvdisasm", "-c", file.name), re.M
        )

    def count(pattern: str) -> int:
        return sum(bool(re.match(r"(?:@!?\w+ )?" + pattern, i)) for i in instructions)

    return {
        "kernel": name,
        "registers": int(re.search(r"REG:(\d+)", usage)[1]),
        "stack": int(re.search(r"STACK:(\d+)", usage)[1]),
        "local": int(re.search(r"LOCAL:(\d+)", usage)[1]),
        "local_access": count(r"(?:LDL|STL)"),
        "shared": kernel.metadata.shared,
        "threads": 32 * kernel.metadata.num_warps,
        "mma": count(r"(?:HMMA|QGMMA|HGMMA|UTCHMMA|UTC\w*MMA)"),
        "special": count(r"MUFU"),
        "wide_loads": count(r"LDG\.\S*128"),
        "loads": count(r"LDG"),
        "instructions": len(instructions),
    }


def compile_only(arch: int, see: Callable[[str, Any], None]) -> None:
    """Makes launches compile for a GPU and not run; ``see`` gets each kernel's name and itself."""
    triton.runtime.driver.set_active(AbsentGpu(arch))

    def launcher(kernel: Any, grid: tuple[int, ...]) -> Any:
        def run(*args: Any, **kwargs: Any) -> None:
            name = f"{kernel.__module__.rsplit('.', 1)[-1]}.{kernel.__name__}"
            see(name, kernel.run(*args, grid=grid, warmup=True, **kwargs))

        return run

    triton.JITFunction.__getitem__ = launcher


def call_both_ways(op: str, call: Call) -> None:
    """Runs ``op`` and its backward."""
    arguments = operator_arguments(call)
    result = getattr(ops, op)(*arguments)
    if op == "training_node":
        *maps, mean, m2 = result
        kept = mean if arguments[-1] else None  # only where there are statistics
        ops.training_node_backward(maps, mean, m2, maps, kept, *arguments[:-1])
    else:
        getattr(ops, op + "_backward")(result, *arguments)


def resources(arch: int, dtype: torch.dtype, channels: int, height: int, width: int) -> None:
    """Prints what is in each kernel of a call of every op."""
    seen = set()

    def see(name: str, compiled: Any) -> None:
        if compiled.hash not in seen:
            seen.add(compiled.hash)
            print(json.dumps(describe(name, compiled)), flush=True)

    compile_only(arch, see)
    half, double = (-(-height // 2), -(-width // 2)), (2 * height, 2 * width)
    sizes = [(height, width), half, double]
    options: dict[str, dict[str, Any]] = {
        "weighted_fusion": {"sizes": sizes, "activation": "swish"},
        "fusion_node": {"sizes": sizes, "out_channels": channels},
        "separable_conv": {"sizes": [(height, width), half], "out_channels": channels},
        "lateral": {"size": (height, width), "out_channels": (channels, channels)},
        "training_node": {"sizes": sizes, "out_channels": channels},
    }
    for op, more in options.items():
        call_both_ways(op, sample(op, dtype, 1, channels=channels, **more))


def kinds_of_calls() -> Iterator[tuple[str, dict[str, Any]]]:
    """Calls of which each constant that a kernel decides by has every value at least once."""
    # of a fusion's maps: as it is, enlarged by whole factors and by others, max-pooled
    sizes = [(9, 6), (3, 2), (5, 4), (17, 12)]
    for i, (fusion, per_channel) in enumerate(FUSION_KINDS):
        first, second = (ACTIVATIONS[(i + k) % len(ACTIVATIONS)] for k in (0, 2))
        edges = {
            "fusion": fusion,
            "per_channel": per_channel,
            "sizes": sizes,
            "pool": POOLS[i % len(POOLS)],
        }
        yield "weighted_fusion", {**edges, "activation": first}
        yield "fusion_node", {**edges, "pre_activation": first, "post_activation": second}
    for activation in ACTIVATIONS:
        yield "separable_conv", {"activation": activation}
    yield "lateral", {}
    # whose fusion and activation are weighted_fusion's kernels
    yield "training_node", {"sizes": sizes}
    yield "training_node", {"nodes": 3}
    yield "training_node", {"normalised": False}
    yield "training_node", {"statistics": False}


def statements(file: Path) -> dict[int, str]:
    """The statements of all Triton functions in ``file``, by their line; without docstrings."""
    found = {}
    for function in ast.parse(file.read_text()).body:
        if not isinstance(function, ast.FunctionDef) or not any(
            "triton.jit" in ast.unparse(d) for d in function.decorator_list
        ):
            continue
        for node in ast.walk(function):
            plain = isinstance(node, ast.stmt) and node is not function
            if plain and not (isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)):
                found[node.lineno] = f"{function.name}: {ast.unparse(node).splitlines()[0]}"
    return found


def coverage(arch: int) -> None:
    """Prints the kernels of calls of every kind, and the statements that none of them compiled."""
    kernels, compiled = set(), set()
    visit = CodeGenerator.visit

    def note(self: CodeGenerator, node: Any) -> Any:
        if isinstance(node, ast.stmt) and hasattr(node, "lineno"):  # not one of the compiler's own
            compiled.add((Path(self.file_name).name, self.begin_line + node.lineno))
        return visit(self, node)

    CodeGenerator.visit = note
    compile_only(arch, lambda name, _: kernels.add(name))
    for i, (op, options) in enumerate(kinds_of_calls()):
        call_both_ways(op, sample(op, DTYPES[i % len(DTYPES)], 1, **options))
    missed = [
        text
        for file in sorted(Path(ops.__file__).parent.glob("*.py"))
        for line, text in sorted(statements(file).items())
        if (file.name, line) not in compiled
    ]
    print(json.dumps({"kernels": sorted(kernels), "missed": missed}))


if __name__ == "__main__":
    if len(sys.argv) == 2:
        coverage(int(sys.argv[1]))
    else:
        resources(int(sys.argv[1]), getattr(torch, sys.argv[2]), *map(int, sys.argv[3:]))
