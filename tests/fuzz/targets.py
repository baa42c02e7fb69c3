"""What is fuzzed: readers of files from anywhere, and the arguments of the ops.

A target takes bytes and raises only what the function that it calls is documented to raise never to
reach the caller: whatever leaves a target is a finding.
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable
from functools import partial
from pathlib import Path

import op_calls
import torch
from op_calls import CALLED

import edet
from edet.detection.images import ImageError, load_image
from edet.detection.labels import read_class_names
from edet.models.checkpoints import read_checkpoint
from edet.models.reading import CheckpointError

#: The only folder that may be written to; the runner makes it.
FOLDER = Path(os.environ.get("EDET_FUZZ_FOLDER", "."))

#: Suffixes decide nothing about a picture, but much about a checkpoint.
CHECKPOINTS = (".pth", ".safetensors")


def _file(data: bytes, name: str) -> Path:
    path = FOLDER / name
    path.write_bytes(data)
    return path


def picture(data: bytes) -> None:
    """A picture of any format: pixels (3, H, W), or ImageError."""
    try:
        pixels = load_image(_file(data, "picture"))
    except ImageError as error:
        assert "picture" in str(error)
        return
    assert pixels.ndim == 3 and pixels.shape[0] == 3 and pixels.numel() > 0
    if pixels.dtype != torch.uint8:
        assert (
            pixels.dtype == torch.float32 and 0 <= float(pixels.min()) <= float(pixels.max()) <= 1
        )


def checkpoint(data: bytes) -> None:
    """A checkpoint: tensors by their names, or CheckpointError."""
    path = _file(data[1:], "weights" + CHECKPOINTS[data[0] % 2 if data else 0])
    try:
        state = read_checkpoint(path)
    except CheckpointError as error:
        assert "weights" in str(error)
        return
    assert all(isinstance(k, str) and isinstance(v, torch.Tensor) for k, v in state.items())


def class_names(data: bytes) -> None:
    """A file of class names: as many as were asked for, or ValueError."""
    count = data[0] if data else 1
    try:
        names = read_class_names(_file(data[1:], "names"), count)
    except ValueError as error:
        assert "names" in str(error)
        return
    assert len(names) == count and not any("\n" in name or "\r" in name for name in names)


def detections(data: bytes) -> None:
    """JSON of detections: the same after a round trip, or ValueError."""
    try:
        found = edet.Detections.from_json(data.decode(errors="replace"))
    except ValueError:
        return
    try:
        text = found.to_json()
    except ValueError:  # not finite
        return
    assert edet.Detections.from_json(text).to_json() == text


def arguments(data: bytes) -> None:
    """Any op with odd arguments, which the first byte chooses: see op_calls.py."""
    op_calls.run(CALLED[data[0] % len(CALLED) if data else 0], data[1:])


TARGETS: dict[str, Callable[[bytes], None]] = {
    "picture": picture,
    "checkpoint": checkpoint,
    "class_names": class_names,
    "detections": detections,
    "arguments": arguments,
    **{op: partial(op_calls.run, op) for op in CALLED},
}

warnings.simplefilter("ignore")  # Pillow's and NumPy's, of damaged files
