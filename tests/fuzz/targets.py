"""What is fuzzed: readers of files from anywhere, and the arguments of the ops.

A target takes bytes and raises only what the function that it calls is documented to raise never to
reach the caller: whatever leaves a target is a finding.
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, TypeVar

import torch

import edet
import edet_kernels
from edet.detection.images import ImageError, load_image
from edet.detection.labels import read_class_names
from edet.models.checkpoints import CheckpointError, read_checkpoint

T = TypeVar("T")

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


_SIZES = (0, 1, 2, 3, 5, 8, 16, 17)
_DTYPES = (torch.float32, torch.float64, torch.float16, torch.bfloat16, torch.int64, torch.uint8)
_ODD = (None, -1, 0, 1, 1.5, float("nan"), float("inf"), 2**63, "", "hard", True, [], (1,))


class Source:
    """Decisions taken from the bytes of an input, one each, so that the fuzzer can steer them."""

    def __init__(self, data: bytes) -> None:
        self._bytes = iter(data)

    def below(self, count: int) -> int:
        """A number from 0 to ``count`` − 1."""
        return next(self._bytes, 0) % count

    def choice(self, values: Sequence[T]) -> T:
        """One of the values."""
        return values[self.below(len(values))]

    def chance(self, part: float) -> bool:
        """True in about ``part`` of the cases, and not where the bytes have come to an end."""
        return next(self._bytes, 0) > 255 * (1 - part)

    def number(self) -> float:
        """A number in [0, 1]."""
        return self.below(256) / 255


def _tensor(source: Source, shape: tuple[int, ...] | None = None) -> torch.Tensor:
    if shape is None or source.chance(0.1):
        shape = tuple(source.choice(_SIZES) for _ in range(source.below(6)))
    dtype = source.choice(_DTYPES) if source.chance(0.15) else torch.float32
    if source.chance(0.02):
        return torch.empty(shape, dtype=dtype, device="meta")
    values = 4 * torch.rand(shape, generator=torch.Generator().manual_seed(source.below(99)))
    values = (values - 1).to(dtype)
    if values.is_floating_point() and values.numel() and source.chance(0.2):
        values.view(-1)[0] = source.choice((float("nan"), float("inf"), -float("inf"), 1e30))
    if source.chance(0.2) and values.ndim > 1:
        values = values.transpose(0, -1)
    return values


def _argument(source: Source, usual: Any) -> Any:
    """``usual``, or once in a while something else."""
    if not source.chance(0.2):
        return usual
    if source.chance(0.5):
        return source.choice(_ODD)
    return _tensor(source)


def _nms(source: Source) -> Any:
    batch, count = source.choice(_SIZES), source.choice(_SIZES)
    return edet_kernels.nms(
        _argument(source, _tensor(source, (batch, count, 4))),
        _argument(source, _tensor(source, (batch, count))),
        _argument(source, torch.zeros(batch, count, dtype=torch.int64)),
        method=_argument(source, source.choice(("hard", "gaussian"))),
        iou_threshold=_argument(source, source.number()),
        sigma=_argument(source, source.number()),
        score_threshold=_argument(source, source.number() - 0.5),
        max_detections=_argument(source, source.below(20)),
        class_agnostic=_argument(source, source.chance(0.5)),
    )


def _detect(source: Source) -> Any:
    batch, cells, classes = (source.choice(_SIZES[:5]) for _ in range(3))
    sizes = [(source.choice(_SIZES), source.choice(_SIZES)) for _ in range(source.below(4))]
    anchors = sum(h * w for h, w in sizes) * cells
    return edet_kernels.detect(
        _argument(source, [_tensor(source, (batch, cells * classes, h, w)) for h, w in sizes]),
        _argument(source, [_tensor(source, (batch, cells * 4, h, w)) for h, w in sizes]),
        _argument(source, _tensor(source, (anchors, 4))),
        limits=_argument(source, None),
        method=_argument(source, "hard"),
        max_detections=_argument(source, source.below(20)),
        max_candidates=_argument(source, source.below(200)),
    )


def _weighted_fusion(source: Source) -> Any:
    n, c = source.choice(_SIZES[:4]), source.choice(_SIZES)
    count = source.below(4)
    inputs = [_tensor(source, (n, c, source.choice(_SIZES), 4)) for _ in range(count)]
    return edet_kernels.weighted_fusion(
        _argument(source, inputs),
        _argument(source, _tensor(source, (count,))),
        size=_argument(source, (source.choice(_SIZES), source.choice(_SIZES))),
        fusion=_argument(source, source.choice(("fast", "softmax", "unbounded", "sum"))),
        pool=_argument(source, source.choice(("same", "symmetric"))),
        activation=_argument(source, source.choice(("none", "swish", "relu"))),
    )


def _separable_conv(source: Source) -> Any:
    c, out = source.choice(_SIZES), source.choice(_SIZES)
    return edet_kernels.separable_conv(
        _argument(source, [_tensor(source, (2, c, source.choice(_SIZES), 3)) for _ in range(2)]),
        _argument(source, _tensor(source, (c, 1, 3, 3))),
        _argument(source, _tensor(source, (out, c, 1, 1))),
        _argument(source, _tensor(source, (2, out))),
        _argument(source, _tensor(source, (2, out))),
        activation=_argument(source, "swish"),
    )


def _stem(source: Source) -> Any:
    out = source.choice(_SIZES)
    return edet_kernels.stem(
        _argument(source, _tensor(source, (2, 3, source.choice(_SIZES), source.choice(_SIZES)))),
        _argument(source, _tensor(source, (out, 3, 3, 3))),
        _argument(source, _tensor(source, (out,))),
        _argument(source, _tensor(source, (out,))),
        mean=_argument(source, None),
        std=_argument(source, None),
        padding=_argument(source, "same"),
        activation=_argument(source, "swish"),
        dtype=_argument(source, None),
    )


_OPS = (_nms, _detect, _weighted_fusion, _separable_conv, _stem)


def arguments(data: bytes) -> None:
    """An op with odd arguments: a result, or ValueError or TypeError."""
    source = Source(data)
    with suppress(ValueError, TypeError):
        source.choice(_OPS)(source)


TARGETS: dict[str, Callable[[bytes], None]] = {
    "picture": picture,
    "checkpoint": checkpoint,
    "class_names": class_names,
    "detections": detections,
    "arguments": arguments,
}

warnings.simplefilter("ignore")  # Pillow's and NumPy's, of damaged files
