"""What happens to an image and its boxes before the network sees them: jitter, flip, mosaic."""

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
from ..extras import require

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
    window: tuple[int, int] | None = None,
    visible: float = 0.0,
) -> tuple[Tensor, Tensor, Tensor]:
    """An image scaled to fit ``scale`` times ``image_size``, and what of it is inside a window.

    Args:
        image: (3, h, w) uint8.
        boxes: (M, 4) float32.
        image_size: (H, W) of the network.
        scale: of the network's input that the whole image fits.
        place: where the window is, 0 … 1 of the rows and columns that do not fit.
        window: (H, W) of what is cut out; ``image_size`` when None.
        visible: part of a box's area that must be in the window for the box to be left.

    Returns:
        the pixels, at most the window's, their boxes clipped, and which of the boxes are left, (M,)
        bool.
    """
    window = image_size if window is None else window
    limits = max(1, round(scale * image_size[0])), max(1, round(scale * image_size[1]))
    factor, size = fit((image.shape[1], image.shape[2]), limits)
    top, left = (int(max(n - m, 0) * p) for n, m, p in zip(size, window, place, strict=True))
    pixels = resize(image, size)[:, top : top + window[0], left : left + window[1]]
    height, width = pixels.shape[1:]
    moved = boxes * factor - boxes.new_tensor([left, top, left, top])
    area = (moved[:, 2:] - moved[:, :2]).prod(1)
    moved = torch.minimum(moved.clamp(min=0), moved.new_tensor([width, height, width, height]))
    sides = moved[:, 2:] - moved[:, :2]
    return pixels, moved, (sides > 0).all(1) & (sides.prod(1) >= visible * area)


def recolour(image: Tensor, factors: tuple[float, float, float]) -> Tensor:
    """An image (3, h, w) uint8 with brightness, contrast and saturation times ``factors``.

    Raises:
        ImportError: Pillow is not installed (extra ``image``).
    """
    pictures = require("PIL.Image", "image")
    enhance = require("PIL.ImageEnhance", "image")
    picture = pictures.fromarray(image.permute(1, 2, 0).contiguous().numpy())
    for name, factor in zip(("Brightness", "Contrast", "Color"), factors, strict=True):
        picture = getattr(enhance, name)(picture).enhance(factor)
    return torch.from_numpy(np.array(picture)).permute(2, 0, 1)


@dataclass(frozen=True)
class Augmentation:
    """The published augmentation: scale jitter with a crop, and a horizontal flip.

    An image is scaled by one factor to fit ``scale`` times the network's input, a window of that
    input's size is cut out of it where it is larger, and every other one is mirrored.

    Attributes:
        scale: the range of the factor; 0.1 to 2 as published.
        flip: how often images are mirrored.
        colour: brightness, contrast and saturation are multiplied by 1 − colour … 1 + colour; not
            in the published recipe.
        mosaic: how often an image becomes a mosaic of itself and three others (Bochkovskiy et al.
            2020, section 3.3), each cut from one scaled as above; not in the published recipe, and
            not in the last fifth of a run's epochs.
        transform: called before that with image, boxes and labels; see :data:`Transform`.
    """

    scale: tuple[float, float] = (0.1, 2.0)
    flip: float = 0.5
    transform: Transform | None = None
    colour: float = 0.0
    mosaic: float = 0.0

    def __post_init__(self) -> None:
        low, high = self.scale
        if not 0 < low <= high:
            raise ValueError(f"scale must be 0 < low ≤ high, got {self.scale}")
        for name in ("flip", "colour", "mosaic"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"{name} must be in [0, 1], got {getattr(self, name)}")

    @classmethod
    def of_strength(
        cls,
        strength: float,
        transform: Transform | None = None,
        *,
        colour: float = 0.0,
        mosaic: float = 0.0,
    ) -> Augmentation:
        """As published for 1, nothing for 0, and a smaller range of scales in between."""
        if not 0 <= strength <= 1:
            raise ValueError(f"strength must be in [0, 1], got {strength}")
        flip = 0.5 if strength > 0 else 0.0
        scale = (1 - strength + 0.1 * strength, 1 + strength)
        return cls(scale, flip, transform, colour, mosaic)

    def __call__(
        self,
        image: Tensor,
        boxes: Tensor,
        labels: Tensor,
        image_size: tuple[int, int],
        seed: int,
        *,
        window: tuple[int, int] | None = None,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """The image within ``image_size``, its boxes and labels, the same for the same seed.

        With a ``window``, a part of a mosaic of that size: boxes of which less than a tenth is in
        it are left out.
        """
        with seeded(seed):
            if self.transform is not None:
                result = self.transform(image, boxes, labels)
                image, boxes, labels = _checked_result(result, self.transform)
            low, high = self.scale
            scale, mirror, row, column = torch.rand(4, dtype=torch.float64, device="cpu").tolist()
            colours = (
                torch.rand(3, dtype=torch.float64, device="cpu").tolist() if self.colour else []
            )
        scale = low + (high - low) * scale
        visible = 0.0 if window is None else 0.1
        pixels, boxes, kept = jitter(
            image, boxes, image_size, scale, (row, column), window, visible
        )
        boxes, labels = boxes[kept], labels[kept]
        if mirror < self.flip:
            pixels, boxes = flip(pixels, boxes)
        if self.colour:
            brightness, contrast, saturation = (1 + self.colour * (2 * x - 1) for x in colours)
            pixels = recolour(pixels, (brightness, contrast, saturation))
        return pixels, boxes, labels

    def mosaic_parts(
        self, image_size: tuple[int, int], count: int, seed: int
    ) -> tuple[tuple[int, int], list[int]] | None:
        """Where the four parts of a mosaic meet and which images join, or None for no mosaic.

        Args:
            image_size: (H, W) of the network.
            count: images of the data set.

        Returns:
            (row, column), each between 0.3 and 0.7 of the image, and the indices of three images.
        """
        if not self.mosaic:
            return None
        with seeded(seed):
            dice, row, column, *others = torch.rand(6, dtype=torch.float64, device="cpu").tolist()
        if dice >= self.mosaic:
            return None
        centre = (
            round((0.3 + 0.4 * row) * image_size[0]),
            round((0.3 + 0.4 * column) * image_size[1]),
        )
        return centre, [int(x * count) for x in others]


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
    boxes = torch.as_tensor(boxes, dtype=torch.float32, device="cpu").reshape(-1, 4)
    labels = torch.as_tensor(labels, dtype=torch.int64, device="cpu").reshape(-1)
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
    canvas = torch.empty((3, *image_size), dtype=torch.uint8, device="cpu")
    canvas[:] = torch.tensor(fill, dtype=torch.uint8, device="cpu").view(3, 1, 1)
    canvas[:, : pixels.shape[1], : pixels.shape[2]] = pixels
    return canvas


def quadrants(
    image_size: tuple[int, int], centre: tuple[int, int]
) -> list[tuple[slice, slice, tuple[int, int]]]:
    """Rows, columns and (height, width) of the four parts of a mosaic."""
    rows = slice(0, centre[0]), slice(centre[0], image_size[0])
    columns = slice(0, centre[1]), slice(centre[1], image_size[1])
    return [(y, x, (y.stop - y.start, x.stop - x.start)) for y in rows for x in columns]
