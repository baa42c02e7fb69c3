"""Launch configurations as data: a table of defaults, a tuned one for each GPU, nearest match.

A table is a JSON list of entries {"kernel", "dtype", "channels", "pixels", "config"}. Of the
entries of a kernel and dtype (of dtype "any" where it has none of its own) the one nearest in
log₂ channels and log₂ pixels is used, those of the GPU's own table before the defaults.
``python -m edet_kernels.triton.tune`` writes the table of a GPU.
"""

from __future__ import annotations

import contextlib
import functools
import json
import math
import os
import re
import tempfile
from collections.abc import Iterable, Iterator, Mapping
from contextvars import ContextVar
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

#: A table entry, and the configuration in it.
Entry = dict[str, Any]
Config = dict[str, int]

DEFAULTS = Path(__file__).with_name("configs.json")
DTYPES = ("float32", "float16", "bfloat16")

_ELEMENTWISE = ("BLOCK_P", "BLOCK_K", "num_warps")
_PRODUCT = ("BLOCK_P", "BLOCK_N", "BLOCK_K", "num_warps", "num_stages")
#: What a configuration says, for each kernel: the size of a tile in pixels, output channels (N) and
#: input channels (K), warps, depth of the software pipeline; ``launches`` of a fusion_node, 1 or 2;
#: programs that share the pixels of a weight's gradient (``splits``).
FIELDS: dict[str, tuple[str, ...]] = {
    "weighted_fusion": _ELEMENTWISE,
    "weighted_fusion_backward": _ELEMENTWISE,
    "fusion_node": (*_PRODUCT, "launches"),
    "separable_conv": _PRODUCT,
    "lateral": _PRODUCT,
    "pointwise_backward": _PRODUCT,
    "weight_backward": (*_PRODUCT, "splits"),
    "depthwise_backward": _ELEMENTWISE,
}


def folder() -> Path:
    """Where tuned tables lie: ``EDET_TRITON_CONFIGS``, else a folder in the user's cache."""
    setting = os.environ.get("EDET_TRITON_CONFIGS")
    if setting:
        return Path(setting)
    cache = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(cache) / "edet_kernels" / "triton"


def tuned_file(gpu: str) -> Path:
    """The tuned table of the GPU that torch calls ``gpu``."""
    return folder() / (re.sub(r"[^a-z0-9]+", "-", gpu.lower()).strip("-") + ".json")


def _problem(entry: Any) -> str:
    """What is wrong with a table entry; empty when nothing is."""
    if not isinstance(entry, dict) or set(entry) != {
        "kernel", "dtype", "channels", "pixels", "config",
    }:  # fmt: skip
        return "an entry has kernel, dtype, channels, pixels and config"
    if entry["kernel"] not in FIELDS:
        return f"kernel must be one of {', '.join(FIELDS)}"
    if entry["dtype"] not in (*DTYPES, "any"):
        return f"dtype must be one of {', '.join(DTYPES)}, any"
    config, fields = entry["config"], FIELDS[entry["kernel"]]
    if not isinstance(config, dict) or set(config) != set(fields):
        return f"config must have {', '.join(fields)}"
    numbers = {"channels": entry["channels"], "pixels": entry["pixels"], **config}
    for name, value in numbers.items():
        if not isinstance(value, int) or isinstance(value, bool) or value < 1:
            return f"{name} must be a positive integer, got {value!r}"
        if name.startswith("BLOCK") and (value < 16 or value & (value - 1)):
            return f"{name} must be a power of two from 16 up, got {value}"
        if name == "num_warps" and value not in (1, 2, 4, 8, 16):
            return f"num_warps must be 1, 2, 4, 8 or 16, got {value}"
        if name == "launches" and value > 2:
            return f"launches must be 1 or 2, got {value}"
    return ""


def read(file: Path) -> list[Entry]:
    """The table in ``file``.

    Raises:
        ValueError: it is not a table; names the file, the entry and what is wrong.
    """
    try:
        table = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{file} is not JSON: {error}. Remove it or tune again.") from None
    if not isinstance(table, list):
        raise ValueError(f"{file} must hold a list of entries, got {type(table).__name__}")
    for entry in table:
        problem = _problem(entry)
        if problem:
            raise ValueError(f"{file}: {problem}, in {entry}")
    return table


def write(file: Path, table: Iterable[Entry]) -> None:
    """Writes a table, one entry a line, so that a reader sees the old file or the new one."""
    file.parent.mkdir(parents=True, exist_ok=True)
    lines = ",\n".join(json.dumps(entry) for entry in table)
    with tempfile.NamedTemporaryFile(
        "w", encoding="utf-8", dir=file.parent, prefix=file.name, delete=False
    ) as stream:
        stream.write(f"[\n{lines}\n]\n")
    os.replace(stream.name, file)


def nearest(
    tables: Iterable[list[Entry]], kernel: str, dtype: str, channels: int, pixels: int
) -> Config:
    """The configuration for a call, from the first of ``tables`` that has one for its dtype.

    Raises:
        LookupError: no table has an entry for ``kernel``.
    """

    def distance(entry: Mapping[str, Any]) -> float:
        wide = math.log2(entry["channels"] / channels)
        return abs(wide) + abs(math.log2(entry["pixels"] / max(pixels, 1)))

    for table in tables:
        for name in (dtype, "any"):
            entries = [e for e in table if (e["kernel"], e["dtype"]) == (kernel, name)]
            if entries:
                return dict(min(entries, key=distance)["config"])
    raise LookupError(f"no configuration for {kernel}")


@functools.cache
def _tables(gpu: str | None) -> tuple[list[Entry], ...]:
    """The tables for a GPU in the order they are asked, read once per process."""
    tuned = tuned_file(gpu) if gpu else None
    return (*([read(tuned)] if tuned and tuned.is_file() else []), read(DEFAULTS))


@functools.lru_cache(maxsize=4096)
def _find(
    kernel: str, device: torch.device, dtype: torch.dtype, channels: int, pixels: int
) -> Config:
    gpu = torch.cuda.get_device_name(device) if device.type == "cuda" else None
    name = str(dtype).removeprefix("torch.")
    return nearest(_tables(gpu), kernel, name, channels, pixels)


#: Configurations that :func:`forced` puts in the place of the tables'.
_forced: ContextVar[dict[str, Config] | None] = ContextVar("edet_triton_configs", default=None)


def find(kernel: str, x: Tensor, channels: int, pixels: int) -> Config:
    """A new copy of the configuration of ``kernel`` for maps like ``x``."""
    forced = (_forced.get() or {}).get(kernel)
    return dict(forced or _find(kernel, x.device, x.dtype, channels, pixels))


@contextlib.contextmanager
def forced(configs: dict[str, Config]) -> Iterator[None]:
    """Kernels use these configurations, by their names, inside the ``with`` block."""
    token = _forced.set(configs)
    try:
        yield
    finally:
        _forced.reset(token)


def clear() -> None:
    """Forgets the tables: they are read again."""
    _find.cache_clear()
    _tables.cache_clear()
