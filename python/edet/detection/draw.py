"""Detections drawn on their image."""

from __future__ import annotations

import colorsys
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any, Protocol

import torch

from ..extras import require
from .images import ImageLike, load_image

if TYPE_CHECKING:
    from PIL.Image import Image

#: Images whose longer side is below this are enlarged by a whole factor, so that names fit.
SMALLEST = 320


class Drawable(Protocol):
    """What can be drawn: :class:`edet.Detections`, or anything like it.

    Iterating gives box (x1, y1, x2, y2), score, label and name of each object, best first.
    """

    @property
    def image_size(self) -> tuple[int, int]:
        """(height, width) of the image that the boxes are in."""
        ...

    def __iter__(
        self,
    ) -> Iterator[tuple[tuple[float, float, float, float], float, int, str]]: ...


def colour(label: int) -> tuple[int, int, int]:
    """A colour for ``label``: hues a golden ratio apart, in four tones.

    Labels whose hues nearly meet (13, 21, 34, 55 or 89 apart) never share a tone.
    """
    saturation, value = ((0.5, 1.0), (0.8, 1.0), (1.0, 0.75), (0.65, 0.85))[label % 4]
    r, g, b = colorsys.hsv_to_rgb((label * 0.618034 + 0.4) % 1, saturation, value)
    return round(255 * r), round(255 * g), round(255 * b)


def text_colour(background: tuple[int, int, int]) -> tuple[int, int, int]:
    """Black or white, whichever contrasts more with ``background`` (Rec. 709 luminance)."""
    r, g, b = ((c / 255) ** 2.2 for c in background)
    return (0, 0, 0) if 0.2126 * r + 0.7152 * g + 0.0722 * b > 0.18 else (255, 255, 255)


def to_pil(image: ImageLike) -> Image:
    """``image`` as an upright 8-bit RGB PIL image; see :func:`edet.preprocess.load_image`."""
    pixels = load_image(image)
    if pixels.dtype != torch.uint8:
        pixels = (pixels * 255).round().to(torch.uint8)
    picture: Image = require("PIL.Image", "image").fromarray(
        pixels.permute(1, 2, 0).contiguous().cpu().numpy()
    )
    return picture


def draw_detections(image: ImageLike, detections: Drawable) -> Image:
    """``image`` with the boxes, names and scores of ``detections``.

    Lines and letters grow with the image; one smaller than 320 pixels is enlarged by a whole
    factor. Objects with a better score are drawn over the others.

    Args:
        image: the image in which the objects were detected.
        detections: boxes in pixels of ``image``, or of another size of it.

    Returns:
        an RGB image.

    Raises:
        ImageError, TypeError, FileNotFoundError: see :func:`edet.preprocess.load_image`.
    """
    image_draw, image_font = require("PIL.ImageDraw", "image"), require("PIL.ImageFont", "image")
    canvas = to_pil(image)
    enlarge = max(1, -(-SMALLEST // max(canvas.size)))
    canvas = canvas.resize(
        (canvas.width * enlarge, canvas.height * enlarge),
        resample=0,  # nearest: keep the pixels
    )
    height, width = detections.image_size
    scale = (canvas.width / width, canvas.height / height)
    longest = max(canvas.size)
    line = max(2, round(longest / 320))
    font = image_font.load_default(size=max(12, longest / 45))
    draw = image_draw.Draw(canvas)
    frames = []
    for box, score, label, name in reversed(list(detections)):
        corners = [
            min(max(x * s, 0), limit - 1)
            for x, s, limit in zip(box, scale * 2, canvas.size * 2, strict=True)
        ]
        # a rim of the opposite brightness shows the box on any background
        draw.rectangle(corners, outline=text_colour(colour(label)), width=line + 1)
        draw.rectangle(corners, outline=colour(label), width=line)
        frames.append((f"{name} {score:.2f}", corners, colour(label)))
    for text, corners, fill in frames:  # after all boxes: no line crosses a name
        _tag(draw, font, text, corners, fill, line, canvas.size)
    return canvas


def _tag(
    draw: Any,
    font: Any,
    text: str,
    corners: list[float],
    fill: tuple[int, int, int],
    line: int,
    size: tuple[int, int],
) -> None:
    """Writes ``text`` above the box, or inside it where there is no room above."""
    left, top, right, bottom = draw.textbbox((0, 0), text, font=font)
    wide, high = right - left + 2 * line, bottom - top + 2 * line
    x = max(0, min(corners[0], size[0] - wide))
    y = corners[1] - high if corners[1] >= high else corners[1]
    draw.rectangle([x, y, x + wide, y + high], fill=fill)
    draw.text((x + line - left, y + line - top), text, font=font, fill=text_colour(fill))
