"""Compiles Triton kernels for a GPU that need not be there, and says what came out.

Runs the ops, forward and backward, on CPU tensors with a driver that names a GPU but has none:
each launch is specialised and compiled as it would be on that GPU, and not run. Prints one JSON
object a kernel. A program of its own because Triton decides at import whether it interprets.

    python tests/kernels/triton_compile.py ARCH DTYPE CHANNELS HEIGHT WIDTH
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
import triton
from torch.utils._python_dispatch import TorchDispatchMode
from triton.backends.compiler import GPUTarget

from edet_kernels import triton as ops
from edet_kernels.testing.samples import Call, sample

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


def main(arch: int, dtype: torch.dtype, channels: int, height: int, width: int) -> None:
    triton.runtime.driver.set_active(AbsentGpu(arch))
    seen = set()

    def compile_only(kernel: Any, grid: tuple[int, ...]) -> Any:
        def run(*args: Any, **kwargs: Any) -> None:
            name = f"{kernel.__module__.rsplit('.', 1)[-1]}.{kernel.__name__}"
            compiled = kernel.run(*args, grid=grid, warmup=True, **kwargs)
            if compiled.hash not in seen:
                seen.add(compiled.hash)
                print(json.dumps(describe(name, compiled)), flush=True)

        return run

    triton.JITFunction.__getitem__ = compile_only
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
        call = sample(op, dtype, 1, channels=channels, **more)
        arguments = operator_arguments(call)
        result = getattr(ops, op)(*arguments)
        if op == "training_node":
            *maps, mean, m2 = result
            ops.training_node_backward(maps, mean, m2, maps, mean, *arguments[:-1])
        else:
            getattr(ops, op + "_backward")(result, *arguments)


if __name__ == "__main__":
    main(int(sys.argv[1]), getattr(torch, sys.argv[2]), *map(int, sys.argv[3:]))
