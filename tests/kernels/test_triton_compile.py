"""The Triton kernels as compiled for GPUs that need not be there: resources and instructions."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("triton")

#: Every kernel, and those that multiply matrices.
KERNELS = {
    "weighted_fusion.forward",
    "weighted_fusion.backward_fused",
    "weighted_fusion.backward_resize",
    "weighted_fusion.backward_edge_weights",
    "pointwise.backward_weight",
    "separable_conv.backward_depthwise",
    "training_node.merge_moments",
    "training_node.add_statistics_gradient",
}
PRODUCTS = {
    "fusion_node.forward",
    "separable_conv.forward",
    "lateral.forward",
    "lateral.backward_input",
    "pointwise.backward_input",
    "pointwise.backward_weight_sums",
}
REGISTERS = 65536  # of a multiprocessor
SHARED = 99 * 1024  # the least that a block may use on any GPU from 8.0 on


#: Of the functions that kernels call: compiled nowhere, since only the interpreter needs it.
INTERPRETED = ["dot: a, b = (a.to(tl.float32), b.to(tl.float32))"]


def compiled(cache: Path, *arguments: object) -> list[dict[str, Any]]:
    """What ``triton_compile.py`` prints, in a process that compiles and starts from nothing."""
    program = Path(__file__).with_name("triton_compile.py")
    environment = {**os.environ, "TRITON_CACHE_DIR": str(cache), "EDET_BACKEND": "auto"}
    environment.pop("TRITON_INTERPRET", None)
    result = subprocess.run(
        [sys.executable, str(program), *map(str, arguments)],
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 0, result.stderr
    return [json.loads(line) for line in result.stdout.splitlines()]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("arch", "dtype", "channels", "size"),
    [
        (80, "float32", 88, (33, 31)),
        (90, "float16", 64, (64, 64)),
        (100, "bfloat16", 160, (20, 28)),
    ],
)
def test_kernels_fit_the_gpu(arch, dtype, channels, size, tmp_path):
    found = compiled(tmp_path, arch, dtype, channels, *size)
    assert {kernel["kernel"] for kernel in found} == KERNELS | PRODUCTS
    for kernel in found:
        assert kernel["stack"] == kernel["local"] == kernel["local_access"] == 0, kernel
        assert kernel["registers"] * kernel["threads"] <= REGISTERS, kernel
        assert kernel["shared"] <= SHARED, kernel
        if kernel["kernel"] in PRODUCTS and dtype != "float32":
            assert kernel["mma"] > 0, kernel
        if kernel["kernel"] == "weighted_fusion.forward":
            assert kernel["wide_loads"] > 0, kernel  # channels are a multiple of 16 bytes


@pytest.mark.slow
def test_every_statement_is_compiled(tmp_path):
    """Constants of a kernel decide which of its statements are: one that none is can be wrong."""
    (found,) = compiled(tmp_path, 90)
    assert set(found["kernels"]) == KERNELS | PRODUCTS
    assert found["missed"] == INTERPRETED
