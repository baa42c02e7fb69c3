"""Images of any kind, files and arrays and tensors, read as upright RGB tensors."""

from __future__ import annotations

import io
import os
import re
import struct
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

import numpy as np
import torch
from torch import Tensor

from ..extras import require

if TYPE_CHECKING:
    from PIL.Image import Image

#: One image: a path, a file's bytes, a PIL image, an array (H, W[, C]) or a tensor (C, H, W).
ImageLike: TypeAlias = "str | os.PathLike[str] | bytes | Image | np.ndarray[Any, Any] | Tensor"

#: PIL modes whose values have a range of their own, so that they convert to 8-bit RGB.
_MODES = ("1", "L", "LA", "La", "P", "PA", "RGB", "RGBA", "RGBa", "RGBX", "CMYK", "YCbCr", "HSV")


#: The most pixels of a picture that is decoded, 11585 × 11585: some 1.5 GB of memory. A file of
#: a few kilobytes can ask for any number. Assign another to read larger ones; beyond
#: 179 million Pillow's own limit, ``PIL.Image.MAX_IMAGE_PIXELS``, has to be raised too.
MAX_PIXELS = 1 << 27


class ImageError(ValueError):
    """An image that cannot be read or is not one of the documented kinds."""


def as_list(images: ImageLike | Sequence[ImageLike]) -> tuple[list[Any], bool]:
    """The images as a list, and whether a single one was given.

    A list, a tuple and the first dimension of a 4-dimensional array or tensor are many images.

    Raises:
        ImageError: there is no image.
    """
    if isinstance(images, Tensor | np.ndarray):
        single = images.ndim != 4
    else:
        single = not isinstance(images, list | tuple)
    many: list[Any] = [images] if single else list(images)  # type: ignore[arg-type]
    if not many:
        raise ImageError("images must hold at least one image, got none")
    return many, single


def _describe(value: Any) -> str:
    if isinstance(value, Tensor | np.ndarray):
        return f"{type(value).__name__} of {value.dtype} and shape {tuple(value.shape)}"
    return type(value).__name__


#: What shows a picture upright, by its orientation (EXIF 2.32, tag 0x0112; 1 is upright).
_TURNS = {
    2: "FLIP_LEFT_RIGHT",
    3: "ROTATE_180",
    4: "FLIP_TOP_BOTTOM",
    5: "TRANSPOSE",
    6: "ROTATE_270",
    7: "TRANSVERSE",
    8: "ROTATE_90",
}


def _decode(image: Any) -> None:
    """Decodes the pixels in place. A TIFF's tags that cannot be read do not stop it."""
    turn = getattr(image, "load_end", None)  # Pillow turns a TIFF as it decodes it
    if image.format != "TIFF" or turn is None:
        image.load()
        return

    def turn_if_possible() -> None:
        with suppress(Exception):  # the orientation is still there then, for _orientation
            turn()

    image.load_end = turn_if_possible
    try:
        image.load()
    finally:
        del image.load_end


def _orientation(image: Any) -> Any:
    """The orientation of a decoded picture, 1 to 8; None where it is missing or unreadable."""
    for tags in (lambda: image.tag_v2, image.getexif):
        with suppress(Exception):  # none, or any damage
            value = tags().get(0x0112)
            if value in _TURNS:  # also a float or a fraction
                return value
    return None


def _read_pil(image: Any, name: str) -> np.ndarray[Any, Any]:
    """The pixels of a PIL image, upright: (H, W, 3 or 4) uint8, or (H, W) uint16."""
    mode, fmt = image.mode, image.format
    if getattr(image, "tile", None) and image.width * image.height > MAX_PIXELS:  # not yet decoded
        raise ImageError(
            f"{name} must have at most {MAX_PIXELS:,} pixels (edet.detection.images.MAX_PIXELS), "
            f"got {image.width} × {image.height}"
        )
    try:
        deep = any("16" in str(part[3]) for part in getattr(image, "tile", ()))
        _decode(image)
        orientation = _orientation(image)
        if orientation is not None:  # by that tag alone: others may be damaged
            image = image.transpose(require("PIL.Image", "image").Transpose[_TURNS[orientation]])
        # Pillow < 11 reads PNG as I, and any of it a PGM of more than 8 bits, scaled to 16
        if mode.startswith("I;16") or (mode == "I" and fmt in ("PNG", "PPM")):
            pixels = np.asarray(image).astype(np.uint16)
            if "transparency" in image.info:  # one value of a PNG
                pixels[pixels == image.info["transparency"]] = 65535
            return pixels
        if mode == "La":  # converts to nothing else
            image, mode = image.convert("LA"), "LA"
        if mode in _MODES:
            alpha = "transparency" in image.info or mode in ("LA", "La", "PA", "RGBA", "RGBa")
            wanted = "RGBA" if alpha else "RGB"
            transparent = image.info.get("transparency")
            if mode == "RGB" and deep and isinstance(transparent, tuple):
                # Pillow keeps the high bytes of the pixels, and all of that colour's
                image = image.copy()  # the caller's stays as it is
                image.info["transparency"] = tuple(value >> 8 for value in transparent)
            return np.array(image if mode == wanted else image.convert(wanted))
    except Exception as error:  # decoders raise OSError, SyntaxError, struct.error, EOFError, …
        raise ImageError(f"{name} cannot be decoded: {error}") from error
    raise ImageError(
        f"{name} has mode {mode!r}, whose values have no defined range: "
        "convert it to 8-bit or 16-bit grey, or to RGB"
    )


#: Bytes of a value of each type of a TIFF (TIFF 6.0, section 2, and BigTIFF).
_TIFF_TYPES = {1: 1, 2: 1, 3: 2, 4: 4, 5: 8, 6: 1, 7: 1, 8: 2, 9: 4, 10: 8, 11: 4, 12: 8, 13: 4}
_TIFF_TYPES |= {16: 8, 17: 8, 18: 8}


def _lost_tags(file: io.BufferedIOBase) -> dict[int, bytes]:
    """Where in a TIFF the counts are of tags whose values lie behind its end, and zeros for them.

    At the first of them Pillow stops reading the directory: tags that tell of the pixels are
    missing then. With a count of zero it is passed over. Nothing for any other file.
    """
    order = {b"II": "<", b"MM": ">"}.get(file.read(2), "")
    version = struct.unpack(order + "H", file.read(2))[0] if order else 0
    if version not in (42, 43):
        return {}
    # the first directory's place, number of entries, a count or an offset
    first, many, word = (4, "H", "I") if version == 42 else (8, "Q", "Q")
    width = struct.calcsize("=" + word)
    end = file.seek(0, io.SEEK_END)
    file.seek(first)
    (at,) = struct.unpack(order + word, file.read(width))
    file.seek(at)
    size = struct.calcsize("=" + many)
    (entries,) = struct.unpack(order + many, file.read(size))
    lost = {}
    for i in range(min(entries, 1 << 16)):
        place = at + size + i * (4 + 2 * width)
        file.seek(place)
        _, kind, count, offset = struct.unpack(order + "HH" + 2 * word, file.read(4 + 2 * width))
        length = count * _TIFF_TYPES.get(kind, 0)
        if length > width and offset + length > end:
            lost[place + 4] = bytes(width)
    return lost


def _without_exif(data: bytes) -> bytes | None:
    """A JPEG or AVIF whose EXIF block goes unseen, by other letters for its name; None for others.

    Of an AVIF the orientation is not in it, but a property of the image.
    """
    if data.startswith(b"\xff\xd8"):
        start = data.find(b"Exif\0\0", 4, 1 << 16)
        return None if start < 0 else data[:start] + b"Hide" + data[start + 4 :]
    if data[4:8] == b"ftyp":  # the type of an item is told in a box of its own
        hidden = re.sub(rb"(infe[\2\3]...(?:..|....)..)Exif", rb"\1Hide", data, flags=re.DOTALL)
        return None if hidden == data else hidden
    return None


def _open(pil: Any, file: Path | bytes) -> Any:
    """Opens a picture; also one that Pillow does not, for damage in tags that are not needed."""
    lost: dict[int, bytes] = {}
    opened = io.BytesIO(file) if isinstance(file, bytes) else file.open("rb")
    with opened, suppress(struct.error):  # the directory itself is cut off
        lost = _lost_tags(opened)
    if lost:
        mended = bytearray(file if isinstance(file, bytes) else file.read_bytes())
        for place, count in lost.items():
            mended[place : place + len(count)] = count
        return pil.open(io.BytesIO(mended))
    try:
        return pil.open(io.BytesIO(file) if isinstance(file, bytes) else file)
    except Exception:  # Pillow looks at some tags, and writes an AVIF's anew, when it opens a file
        data = file if isinstance(file, bytes) else file.read_bytes()
        hidden = _without_exif(data)
        if hidden is None:
            raise
        image = pil.open(io.BytesIO(hidden))
        if image.format in ("JPEG", "MPO"):  # only the orientation is wanted
            start = hidden.index(b"Hide\0\0")
            length = int.from_bytes(data[start - 2 : start], "big")  # counts its own two bytes
            image.info["exif"] = data[start : start + length - 2]
        return image


def _read_file(file: Path | bytes, name: str) -> np.ndarray[Any, Any]:
    pil = require("PIL.Image", "image")
    if isinstance(file, Path) and not file.exists():
        raise FileNotFoundError(f"{name} does not exist")
    if isinstance(file, Path) and file.is_dir():
        raise ImageError(f"{name} is a folder, an image file is required")
    try:
        if isinstance(file, Path) and file.is_fifo():  # can be read only once
            file = file.read_bytes()
        image = _open(pil, file)
    except pil.UnidentifiedImageError as error:
        raise ImageError(f"{name} is not an image in a known format") from error
    except PermissionError as error:
        raise PermissionError(f"{name} cannot be read: permission denied") from error
    except Exception as error:  # as in _read_pil; also DecompressionBombError
        raise ImageError(f"{name} cannot be opened as an image: {error}") from error
    with image:
        return _read_pil(image, name)


#: Rows of a strip.
_STRIP = 256


def _unit_range(pixels: Tensor, name: str, rounding: float) -> Tensor:
    """``pixels`` as float32, checked to lie in [0, 1] but for a ``rounding``, as of a resize."""
    if pixels.element_size() == 1:  # PyTorch finds no ends of 8-bit floats
        pixels = pixels.float()
    low, high = (float(x) for x in pixels.aminmax())
    if not (low >= -rounding and high <= 1 + rounding):  # also catches NaN
        raise ImageError(
            f"{name} of a float dtype must have values in [0, 1], got {low:.8g} to {high:.8g}: "
            "divide by the maximum, or pass uint8"
        )
    return pixels.float() if low >= 0 and high <= 1 else pixels.float().clamp(0, 1)


def _to_rgb(pixels: Tensor) -> Tensor:
    """(1, 3 or 4, H, W) to (3, H, W): grey is repeated, alpha is composited over white."""
    if pixels.shape[0] == 1:
        return pixels.expand(3, -1, -1)
    if pixels.shape[0] == 3:
        return pixels
    white = 255 if pixels.dtype == torch.uint8 else 1
    blended = torch.empty((3, *pixels.shape[1:]), dtype=pixels.dtype, device=pixels.device)
    # in strips, because floats take four times the memory of bytes
    for out, part in zip(blended.split(_STRIP, 1), pixels.split(_STRIP, 1), strict=True):
        colour, alpha = part[:3].float(), part[3:].float() / white
        strip = colour * alpha + white * (1 - alpha)
        out.copy_(strip.round() if white == 255 else strip)
    return blended


def _advice(shape: Sequence[int], channels: int, call: str) -> str:
    """What to do with a shape whose channels are in another place, if they are."""
    return f": {call} it" if len(shape) == 3 and shape[channels] in (1, 3, 4) else ""


def _check_tensor(pixels: Tensor, name: str) -> None:
    """Checks that a tensor has the channels of an image, and values that lie in memory."""
    if pixels.ndim != 3 or pixels.shape[0] not in (1, 3, 4):
        raise ImageError(
            f"{name} must be (C, H, W) with 1, 3 or 4 channels when it is a tensor, "
            f"got {_describe(pixels)}" + _advice(pixels.shape, 2, "permute(2, 0, 1)")
        )
    if pixels.layout != torch.strided or pixels.is_meta:
        raise ImageError(
            f"{name} must be a dense tensor with values, got {_describe(pixels)}, "
            f"{pixels.layout}, on {pixels.device}"
        )


def load_image(image: ImageLike, name: str = "image") -> Tensor:
    """Reads one image as upright RGB.

    Accepted are

    * a path (EXIF orientation is honoured), the bytes of such a file or a PIL image (likewise):
      8-bit grey, grey + alpha, palette, RGB, RGBA, CMYK, YCbCr, HSV and bilevel, and 16-bit grey,
      0 … 65535. The first frame of an animation. 32-bit integer and float modes have no defined
      range and are refused;
    * a NumPy array (H, W), (H, W, 1), (H, W, 3) RGB or (H, W, 4) RGBA of uint8, uint16
      (0 … 65535), or float in [0, 1];
    * a tensor (C, H, W) with C = 1, 3 or 4, uint8 or float in [0, 1].

    Transparent pixels are shown over white.

    Args:
        image: the image.
        name: what to call it in errors; a path is called by its own name.

    Returns:
        (3, H, W), uint8 for 8-bit images, otherwise float32 in [0, 1].

    Raises:
        ImageError: unreadable or truncated file, refused mode, wrong layout, dtype or range.
        FileNotFoundError, PermissionError: no such file, or not readable.
        TypeError: not an image at all.
        ImportError: a path or bytes without Pillow (extra ``image``).
    """
    if isinstance(image, bytes):
        pixels: Any = _read_file(image, name)
    elif isinstance(image, str | os.PathLike):
        pixels = _read_file(Path(image), os.fspath(image))
    elif hasattr(image, "getbands"):  # a PIL image, without importing PIL
        pixels = _read_pil(image, getattr(image, "filename", "") or name)
    elif isinstance(image, Tensor | np.ndarray):
        pixels = image
    else:
        raise TypeError(
            f"{name} must be a path, the bytes of a file, a PIL image, a NumPy array or a tensor, "
            f"got {_describe(image)}"
        )

    rounding = 0.0
    if isinstance(pixels, Tensor):
        _check_tensor(pixels, name)
        pixels = pixels.detach()
    else:
        if pixels.ndim == 2:
            pixels = pixels[:, :, None]
        if pixels.ndim != 3 or pixels.shape[2] not in (1, 3, 4):
            raise ImageError(
                f"{name} must be (H, W) or (H, W, C) with 1, 3 or 4 channels when it is an array, "
                f"got {_describe(image)}" + _advice(pixels.shape, 0, "transpose(1, 2, 0)")
            )
        if pixels.dtype.newbyteorder("=") == np.uint16:
            pixels = pixels.astype(np.float32) / 65535
        elif pixels.dtype.kind == "f":
            rounding = float(np.finfo(pixels.dtype).eps)
            pixels = pixels.astype(np.float32)
        elif pixels.dtype != np.uint8:
            raise ImageError(f"{name} must be uint8, uint16 or float, got {_describe(image)}")
        if pixels is image or pixels.base is not None:
            # a copy: torch refuses negative strides and warns about read-only memory
            pixels = np.array(pixels, order="C")
        pixels = torch.from_numpy(pixels).permute(2, 0, 1)
    if 0 in pixels.shape:
        raise ImageError(f"{name} must have at least one pixel, got {_describe(image)}")
    if pixels.dtype != torch.uint8:
        if not pixels.is_floating_point():
            raise ImageError(f"{name} must be uint8 or float, got {_describe(image)}")
        rounding = max(rounding, torch.finfo(pixels.dtype).eps)
        pixels = _unit_range(pixels, name, 4 * rounding)
    return _to_rgb(pixels)
