"""Detections drawn on their image."""

from __future__ import annotations

import colorsys
import os
import unicodedata
import warnings
from collections.abc import Iterable, Iterator
from functools import lru_cache
from typing import TYPE_CHECKING, Any, Protocol

import torch

from ..extras import require
from .images import ImageLike, load_image

if TYPE_CHECKING:
    from PIL.Image import Image

#: A TrueType or OpenType file.
FontPath = str | os.PathLike[str]


class MissingGlyphWarning(UserWarning):
    """A font cannot show a class name."""


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


def load_font(font: FontPath | None, size: float) -> Any:
    """The font of a file, or Pillow's own, which has hardly more than ASCII.

    Raises:
        ValueError: it is no font of any size.
        OSError: it does not exist or cannot be read.
    """
    image_font = require("PIL.ImageFont", "image")
    if font is None:
        return image_font.load_default(size=size)
    with open(font, "rb"):  # an error of the file system has its usual name
        pass
    try:
        return image_font.truetype(os.fspath(font), size)
    except OSError as error:
        raise ValueError(
            f"font must be a scalable TrueType or OpenType file, got {font}: {error}"
        ) from error


@lru_cache(maxsize=64)
def _missing(characters: frozenset[str], font: str | None) -> str:
    shapes = load_font(font, 20)

    def shape(text: str) -> tuple[Any, bytes]:
        mask = shapes.getmask(text)
        return mask.size, bytes(mask)

    none = shape("\U0010ffff")  # never a character: what a font shows for one that it lacks
    return "".join(sorted(c for c in characters if shape(c) == none))


def missing_glyphs(names: Iterable[str], font: FontPath | None = None) -> str:
    """The characters of ``names`` that ``font`` has no glyph for, each once, sorted.

    Raises:
        ValueError, OSError: see :func:`load_font`.
    """
    seen = frozenset(c for c in set("".join(names)) if unicodedata.category(c)[0] not in "CZ")
    return _missing(seen, None if font is None else os.fspath(font))


def draw_detections(
    image: ImageLike, detections: Drawable, *, font: FontPath | None = None
) -> Image:
    """``image`` with the boxes, names and scores of ``detections``.

    Lines and letters grow with the image; one smaller than 320 pixels is enlarged by a whole
    factor. Objects with a better score are drawn over the others.

    Args:
        image: the image in which the objects were detected.
        detections: boxes in pixels of ``image``, or of another size of it.
        font: a TrueType or OpenType file for the names; Pillow's own when None, which has hardly
            more than ASCII. A :class:`MissingGlyphWarning` tells of names that it cannot show.

    Returns:
        an RGB image.

    Raises:
        ImageError, TypeError, FileNotFoundError: see :func:`edet.preprocess.load_image`.
        ValueError, OSError: ``font`` cannot be used.
    """
    image_draw = require("PIL.ImageDraw", "image")
    lacking = missing_glyphs((name for *_, name in detections), font)
    if lacking:
        warnings.warn(glyph_hint(lacking, font, "font="), MissingGlyphWarning, stacklevel=2)
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
    letters = load_font(font, max(12, longest / 45))
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
        _tag(draw, letters, text, corners, fill, line, canvas.size)
    return canvas


def glyph_hint(lacking: str, font: FontPath | None, option: str) -> str:
    """What to tell about characters that ``font`` lacks; ``option`` gives another."""
    which = "the built-in font" if font is None else os.fspath(font)
    return (
        f"class names are drawn with empty boxes: {which} has no glyphs for {lacking[:20]!r}"
        f"{' and others' if len(lacking) > 20 else ''}; give another font with {option}"
    )


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
