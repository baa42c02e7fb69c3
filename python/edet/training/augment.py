"""What happens to an image and its boxes before the network sees them: jitter, flip, letterbox."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TypeAlias

import numpy as np
import torch
from torch import Tensor

from ..detection.preprocess import fit, letterbox, resize

#: A function of image (3, H, W) uint8, boxes (M, 4) float32 in pixels and labels (M,) int64, which
#: gives the same three, of any size and number.
Transform: TypeAlias = Callable[[Tensor, Tensor, Tensor], tuple[Tensor, Tensor, Tensor]]


@contextmanager
def seeded(seed: int) -> Iterator[None]:
    """Gives ``random``, NumPy and torch the random numbers of ``seed``, and theirs back after."""
    states = random.getstate(), np.random.get_state(), torch.get_rng_state()
    try:
        random.seed(seed)
        np.random.seed(seed % 2**32)
        torch.manual_seed(seed)
        yield
    finally:
        random.setstate(states[0])
        np.random.set_state(states[1])
        torch.set_rng_state(states[2])


def flip(image: Tensor, boxes: Tensor) -> tuple[Tensor, Tensor]:
    """The mirror image, left and right exchanged, and its boxes."""
    x1, y1, x2, y2 = boxes.unbind(1)
    width = image.shape[2]
    return image.flip(2), torch.stack([width - x2, y1, width - x1, y2], 1)


def jitter(
    image: Tensor,
    boxes: Tensor,
    image_size: tuple[int, int],
    scale: float,
    place: tuple[float, float],
) -> tuple[Tensor, Tensor, Tensor]:
    """An image scaled to fit ``scale`` times ``image_size``, and what of it is inside a window.

    Args:
        image: (3, h, w) uint8.
        boxes: (M, 4) float32.
        image_size: (H, W) of the window.
        scale: of the window that the whole image fits.
        place: where the window is, 0 … 1 of the rows and columns that do not fit.

    Returns:
        the pixels, at most H×W, their boxes clipped, and which of the boxes are left, (M,) bool.
    """
    limits = max(1, round(scale * image_size[0])), max(1, round(scale * image_size[1]))
    factor, size = fit((image.shape[1], image.shape[2]), limits)
    top, left = (int(max(n - m, 0) * p) for n, m, p in zip(size, image_size, place, strict=True))
    pixels = resize(image, size)[:, top : top + image_size[0], left : left + image_size[1]]
    height, width = pixels.shape[1:]
    moved = boxes * factor - boxes.new_tensor([left, top, left, top])
    moved = torch.minimum(moved.clamp(min=0), moved.new_tensor([width, height, width, height]))
    return pixels, moved, (moved[:, 2:] > moved[:, :2]).all(1)


@dataclass(frozen=True)
class Augmentation:
    """The published augmentation: scale jitter with a crop, and a horizontal flip.

    An image is scaled by one factor to fit ``scale`` times the network's input, a window of that
    input's size is cut out of it where it is larger, and every other one is mirrored.

    Attributes:
        scale: the range of the factor; 0.1 to 2 as published.
        flip: how often images are mirrored.
        transform: called before that with image, boxes and labels; see :data:`Transform`.
    """

    scale: tuple[float, float] = (0.1, 2.0)
    flip: float = 0.5
    transform: Transform | None = None

    def __post_init__(self) -> None:
        low, high = self.scale
        if not 0 < low <= high:
            raise ValueError(f"scale must be 0 < low ≤ high, got {self.scale}")
        if not 0 <= self.flip <= 1:
            raise ValueError(f"flip must be in [0, 1], got {self.flip}")

    @classmethod
    def of_strength(cls, strength: float, transform: Transform | None = None) -> Augmentation:
        """As published for 1, nothing for 0, and a smaller range of scales in between."""
        if not 0 <= strength <= 1:
            raise ValueError(f"strength must be in [0, 1], got {strength}")
        flip = 0.5 if strength > 0 else 0.0
        return cls((1 - strength + 0.1 * strength, 1 + strength), flip, transform)

    def __call__(
        self, image: Tensor, boxes: Tensor, labels: Tensor, image_size: tuple[int, int], seed: int
    ) -> tuple[Tensor, Tensor, Tensor]:
        """The image within ``image_size``, its boxes and labels, the same for the same seed."""
        with seeded(seed):
            if self.transform is not None:
                result = self.transform(image, boxes, labels)
                image, boxes, labels = _checked_result(result, self.transform)
            low, high = self.scale
            scale, mirror, row, column = torch.rand(4, dtype=torch.float64).tolist()
        place = (row, column)
        pixels, boxes, kept = jitter(image, boxes, image_size, low + (high - low) * scale, place)
        boxes, labels = boxes[kept], labels[kept]
        if mirror < self.flip:
            pixels, boxes = flip(pixels, boxes)
        return pixels, boxes, labels


def _checked_result(result: object, transform: Transform) -> tuple[Tensor, Tensor, Tensor]:
    """What a transform gave, with boxes clipped to its image and those of no area left out.

    Raises:
        TypeError, ValueError: it is not image, boxes and labels.
    """
    name = getattr(transform, "__name__", type(transform).__name__)
    if not isinstance(result, tuple | list) or len(result) != 3:
        raise TypeError(f"{name} must return image, boxes and labels, got {type(result).__name__}")
    image, boxes, labels = result
    if not isinstance(image, Tensor) or image.dtype != torch.uint8 or image.dim() != 3:
        raise TypeError(f"{name} must return a (3, H, W) uint8 tensor as its image")
    boxes = torch.as_tensor(boxes, dtype=torch.float32).reshape(-1, 4)
    labels = torch.as_tensor(labels, dtype=torch.int64).reshape(-1)
    if len(boxes) != len(labels):
        raise ValueError(
            f"{name} must return one label per box, got {len(labels)} and {len(boxes)}"
        )
    if not bool(boxes.isfinite().all()):
        raise ValueError(f"{name} must return finite boxes")
    height, width = image.shape[1:]
    boxes = torch.minimum(boxes.clamp(min=0), boxes.new_tensor([width, height, width, height]))
    kept = (boxes[:, 2:] > boxes[:, :2]).all(1)
    return image, boxes[kept], labels[kept]


def to_network(
    image: Tensor, boxes: Tensor, image_size: tuple[int, int], fill: Sequence[int]
) -> tuple[Tensor, Tensor]:
    """The :class:`edet.Predictor`'s letterbox of an image (3, H, W) uint8, and its boxes in it."""
    factor, _ = fit((image.shape[1], image.shape[2]), image_size)
    return letterbox([image], image_size, fill)[0], boxes * factor


def on_canvas(pixels: Tensor, image_size: tuple[int, int], fill: Sequence[int]) -> Tensor:
    """Pixels of at most ``image_size`` at the top left, the rest filled as by the letterbox."""
    canvas = torch.empty((3, *image_size), dtype=torch.uint8)
    canvas[:] = torch.tensor(fill, dtype=torch.uint8).view(3, 1, 1)
    canvas[:, : pixels.shape[1], : pixels.shape[2]] = pixels
    return canvas
