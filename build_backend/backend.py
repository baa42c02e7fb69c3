"""The build backend: setuptools', which asks for another torch only where there is none to use.

An isolated build sees nothing of the environment that it installs into, and used to download a
torch of its own for a few headers. These are found in that environment instead (setup.py,
``find_torch``); only without them is torch required, and said to be.
"""

from __future__ import annotations

import contextlib
import importlib.util
import os
import sys
from collections.abc import Mapping
from pathlib import Path
from types import ModuleType
from typing import Any

from setuptools import build_meta
from setuptools.build_meta import (
    build_editable,
    build_sdist,
    build_wheel,
    get_requires_for_build_sdist,
    prepare_metadata_for_build_editable,
    prepare_metadata_for_build_wheel,
)

__all__ = [
    "build_editable",
    "build_sdist",
    "build_wheel",
    "get_requires_for_build_editable",
    "get_requires_for_build_sdist",
    "get_requires_for_build_wheel",
    "prepare_metadata_for_build_editable",
    "prepare_metadata_for_build_wheel",
]

#: What is downloaded to build against where there is no torch. It is what the package itself asks
#: for, so that the installation takes the same file from pip's cache.
TORCH = "torch>=2.10"
TERMINAL = "/dev/tty"


def _setup_script() -> ModuleType:
    """setup.py as a module; it builds only when it is run."""
    path = Path(__file__).resolve().parents[1] / "setup.py"
    spec = importlib.util.spec_from_file_location("edet_setup", path)
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def _tell(text: str) -> None:
    """Says it on standard error, which pip keeps to itself, and on the terminal if there is one."""
    print(text, file=sys.stderr, flush=True)
    if not sys.stderr.isatty():
        with contextlib.suppress(OSError), open(TERMINAL, "w", encoding="utf-8") as terminal:
            terminal.write(f"\n{text}\n")  # pip waits in the middle of a line


def compile_requirements(env: Mapping[str, str]) -> list[str]:
    """What compiling the op library needs beside setuptools and a compiler.

    Says on standard error which torch that is; where one is downloaded, on the terminal too.
    """
    if env.get("EDET_BUILD") == "0":
        return []
    script = _setup_script()
    needed = ["cmake>=3.24", "ninja"]
    try:
        found = script.find_torch()
    except script.SetupError:
        _tell(
            f"edet-kernels: {sys.prefix} has no torch >= 2.10 to build against; the newest is "
            "downloaded for the build, several gigabytes with CUDA. To choose another, stop this "
            "(Ctrl-C), install it and repeat the command."
        )
        return [*needed, TORCH]
    print(f"edet-kernels: building against {found}", file=sys.stderr, flush=True)
    return needed


def get_requires_for_build_wheel(config_settings: Any = None) -> list[str]:
    """setuptools' requirements for a wheel, and those of compiling the library."""
    return [
        *build_meta.get_requires_for_build_wheel(config_settings),
        *compile_requirements(os.environ),
    ]


def get_requires_for_build_editable(config_settings: Any = None) -> list[str]:
    """setuptools' requirements for an editable install, and those of compiling the library."""
    return [
        *build_meta.get_requires_for_build_editable(config_settings),
        *compile_requirements(os.environ),
    ]
