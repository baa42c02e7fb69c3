"""Images of any kind to a normalised batch: reading, keep-aspect resize, padding.

Follows the published EfficientDet pre-processing: the image is scaled by one factor to fit the
network's input, bilinear and anti-aliased, put at the top left and padded with the mean colour.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, TypeAlias

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from ..extras import require
from ..models.configs import IMAGENET_MEAN, IMAGENET_STD
from ..models.efficientnet import normalise_pixels

if TYPE_CHECKING:
    from PIL.Image import Image

#: One image: a path, a PIL image, an array (H, W[, C]) or a tensor (C, H, W).
ImageLike: TypeAlias = "str | os.PathLike[str] | Image | np.ndarray[Any, Any] | Tensor"

#: PIL modes whose values have a range of their own, so that they convert to 8-bit RGB.
_MODES = ("1", "L", "LA", "La", "P", "PA", "RGB", "RGBA", "RGBa", "RGBX", "CMYK", "YCbCr", "HSV")


class ImageError(ValueError):
    """An image that cannot be read or is not one of the documented kinds."""


class ImageBatch(NamedTuple):
    """A batch ready for the network, and the way back to the images.

    Attributes:
        images: (B, 3, H, W) normalised, channels_last.
        scales: (B,) float32, pixels of the original image per pixel of the network's input.
        sizes: (height, width) of each original image, upright.
    """

    images: Tensor
    scales: Tensor
    sizes: list[tuple[int, int]]


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


def _read_pil(image: Any, name: str) -> np.ndarray[Any, Any]:
    """The pixels of a PIL image, upright: (H, W, 3 or 4) uint8, or (H, W) uint16."""
    from PIL import ImageOps

    mode, fmt = image.mode, image.format
    try:
        image = ImageOps.exif_transpose(image)
        if mode.startswith("I;16") or (mode == "I" and fmt == "PNG"):  # Pillow < 11 reads PNG as I
            return np.asarray(image).astype(np.uint16)
        if mode in _MODES:
            alpha = "transparency" in image.info or mode in ("LA", "La", "PA", "RGBA", "RGBa")
            return np.array(image.convert("RGBA" if alpha else "RGB"))
    except Exception as error:  # decoders raise OSError, SyntaxError, struct.error, EOFError, …
        raise ImageError(f"{name} cannot be decoded: {error}") from error
    raise ImageError(
        f"{name} has mode {mode!r}, whose values have no defined range: "
        "convert it to 8-bit or 16-bit grey, or to RGB"
    )


def _read_file(path: Path, name: str) -> np.ndarray[Any, Any]:
    pil = require("PIL.Image", "image")
    if not path.exists():
        raise FileNotFoundError(f"{name} does not exist")
    if path.is_dir():
        raise ImageError(f"{name} is a folder, an image file is required")
    try:
        image = pil.open(path)
    except pil.UnidentifiedImageError as error:
        raise ImageError(f"{name} is not an image in a known format") from error
    except PermissionError as error:
        raise PermissionError(f"{name} cannot be read: permission denied") from error
    except Exception as error:  # as in _read_pil; also DecompressionBombError
        raise ImageError(f"{name} cannot be opened as an image: {error}") from error
    with image:
        return _read_pil(image, name)


def _unit_range(pixels: Tensor, name: str) -> Tensor:
    """``pixels`` as float32, checked to lie in [0, 1]."""
    low, high = (float(x) for x in pixels.aminmax())
    if not (low >= 0 and high <= 1):  # also catches NaN
        raise ImageError(
            f"{name} of a float dtype must have values in [0, 1], got {low:g} to {high:g}: "
            "divide by the maximum, or pass uint8"
        )
    return pixels.float()


def _to_rgb(pixels: Tensor) -> Tensor:
    """(1, 3 or 4, H, W) to (3, H, W): grey is repeated, alpha is composited over white."""
    if pixels.shape[0] == 1:
        return pixels.expand(3, -1, -1)
    if pixels.shape[0] == 3:
        return pixels
    white = 255 if pixels.dtype == torch.uint8 else 1
    colour, alpha = pixels[:3].float(), pixels[3:].float() / white
    blended = colour * alpha + white * (1 - alpha)
    return blended.round().to(torch.uint8) if white == 255 else blended


def load_image(image: ImageLike, name: str = "image") -> Tensor:
    """Reads one image as upright RGB.

    Accepted are

    * a path (EXIF orientation is honoured) or a PIL image (likewise): 8-bit grey, grey + alpha,
      palette, RGB, RGBA, CMYK, YCbCr, HSV and bilevel, and 16-bit grey, 0 … 65535. The first frame
      of an animation. 32-bit integer and float modes have no defined range and are refused;
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
        ImportError: a path without Pillow (extra ``image``).
    """
    if isinstance(image, str | os.PathLike):
        pixels: Any = _read_file(Path(image), os.fspath(image))
    elif hasattr(image, "getbands"):  # a PIL image, without importing PIL
        pixels = _read_pil(image, getattr(image, "filename", "") or name)
    elif isinstance(image, Tensor | np.ndarray):
        pixels = image
    else:
        raise TypeError(
            f"{name} must be a path, a PIL image, a NumPy array or a tensor, got {_describe(image)}"
        )

    if isinstance(pixels, Tensor):
        if pixels.ndim != 3 or pixels.shape[0] not in (1, 3, 4):
            raise ImageError(
                f"{name} must be (C, H, W) with 1, 3 or 4 channels when it is a tensor, "
                f"got {_describe(pixels)}" + (": permute(2, 0, 1) it" if pixels.ndim == 3 else "")
            )
        pixels = pixels.detach()
    else:
        if pixels.ndim == 2:
            pixels = pixels[:, :, None]
        if pixels.ndim != 3 or pixels.shape[2] not in (1, 3, 4):
            raise ImageError(
                f"{name} must be (H, W) or (H, W, C) with 1, 3 or 4 channels when it is an array, "
                f"got {_describe(image)}" + (": transpose(1, 2, 0) it" if pixels.ndim == 3 else "")
            )
        if pixels.dtype == np.uint16:
            pixels = pixels.astype(np.float32) / 65535
        elif pixels.dtype.kind == "f":
            pixels = pixels.astype(np.float32)
        elif pixels.dtype != np.uint8:
            raise ImageError(f"{name} must be uint8, uint16 or float, got {_describe(image)}")
        # a copy: torch refuses negative strides and warns about read-only memory
        pixels = torch.from_numpy(np.array(pixels, order="C")).permute(2, 0, 1)
    if 0 in pixels.shape:
        raise ImageError(f"{name} must have at least one pixel, got {_describe(image)}")
    if pixels.dtype != torch.uint8:
        if not pixels.is_floating_point():
            raise ImageError(f"{name} must be uint8 or float, got {_describe(image)}")
        pixels = _unit_range(pixels, name)
    return _to_rgb(pixels)


def fit(size: tuple[int, int], image_size: tuple[int, int]) -> tuple[float, tuple[int, int]]:
    """The largest keep-aspect size inside ``image_size``, rounded down but at least one pixel.

    Returns:
        the scale (network pixels per original pixel) and (height, width).
    """
    (height, width), (limit_h, limit_w) = size, image_size
    # in whole numbers: the product of a size and a rounded quotient can fall below the limit
    if limit_h * width <= limit_w * height:
        return limit_h / height, (limit_h, max(1, width * limit_h // height))
    return limit_w / width, (max(1, height * limit_w // width), limit_w)


def resize(pixels: Tensor, size: tuple[int, int]) -> Tensor:
    """Resizes (3, H, W) to ``size``, bilinear and anti-aliased as Pillow does, in its dtype."""
    if tuple(pixels.shape[1:]) == size:
        return pixels
    batch = pixels[None]
    if pixels.device.type != "cpu" and pixels.dtype == torch.uint8:  # CPU only in PyTorch
        return resize(pixels.float(), size).round().to(torch.uint8)
    return F.interpolate(batch, size, mode="bilinear", antialias=True, align_corners=False)[0]


def letterbox(images: Sequence[Tensor], image_size: tuple[int, int], fill: Sequence[int]) -> Tensor:
    """Images (3, h, w) scaled to fit ``image_size``, at the top left of one batch.

    Args:
        images: uint8, or float32 in [0, 1], on one device.
        image_size: (H, W) of the batch.
        fill: three values of 0 … 255, the colour of the rest.

    Returns:
        (B, 3, H, W), uint8 when all images are, otherwise float32 in [0, 1].
    """
    as_bytes = all(x.dtype == torch.uint8 for x in images)
    # one plane per channel: what follows is slow on runs of three numbers
    batch = torch.empty(
        (len(images), 3, *image_size),
        dtype=torch.uint8 if as_bytes else torch.float32,
        device=images[0].device,
    )
    for plane, value in zip(batch.unbind(1), fill, strict=True):
        plane.fill_(value if as_bytes else value / 255)
    for slot, pixels in zip(batch, images, strict=True):
        _, size = fit((pixels.shape[1], pixels.shape[2]), image_size)
        unit = 255 if pixels.dtype == torch.uint8 and not as_bytes else 1
        resized, area = resize(pixels, size), slot[:, : size[0], : size[1]]
        area.copy_(resized if unit == 1 else resized.float() / unit)
    return batch


def geometry(sizes: Sequence[tuple[int, int]], image_size: tuple[int, int]) -> Tensor:
    """(B, 3) float32: height and width of each image, and its pixels per pixel of the network's."""
    rows = [(*size, 1 / fit(size, image_size)[0]) for size in sizes]
    return torch.tensor(rows, dtype=torch.float32)


def letterbox_fill(mean: Sequence[float]) -> list[int]:
    """The mean colour in 8 bits, which the published code fills up with."""
    return [round(255 * value) for value in mean]


def preprocess(
    images: ImageLike | Sequence[ImageLike],
    image_size: tuple[int, int],
    *,
    mean: Sequence[float] = IMAGENET_MEAN,
    std: Sequence[float] = IMAGENET_STD,
    device: torch.device | str | None = None,
    dtype: torch.dtype = torch.float32,
) -> ImageBatch:
    """Reads, resizes, pads and normalises images into one batch.

    Each image is scaled by min(H/h, W/w), sizes rounded down, bilinear with anti-aliasing, placed
    at the top left; the rest is filled with the mean rounded to 8 bits, as in the published code;
    then (x − mean)/std.

    Args:
        images: one image or a list of them; see :func:`load_image` for the kinds.
        image_size: (H, W) of the batch.
        mean, std: per channel, for values in [0, 1].
        device: of the batch; the CPU when None.
        dtype: of the batch.

    Returns:
        the batch, the scale of each image and its size.

    Raises:
        ImageError (a ValueError), TypeError, FileNotFoundError: see :func:`load_image`; also when
            there is no image.
    """
    many, single = as_list(images)
    loaded = [load_image(im, "image" if single else f"images[{i}]") for i, im in enumerate(many)]
    resized = [
        resize(p, fit((p.shape[1], p.shape[2]), image_size)[1]).to(device or "cpu") for p in loaded
    ]
    fill = letterbox_fill(mean)
    centre, spread = (
        torch.tensor(values, dtype=torch.float32, device=device) for values in (mean, std)
    )
    sizes = [(p.shape[1], p.shape[2]) for p in loaded]
    return ImageBatch(
        normalise_pixels(letterbox(resized, image_size, fill), centre, spread, dtype),
        torch.tensor(
            [1 / fit(size, image_size)[0] for size in sizes], dtype=torch.float32, device=device
        ),
        sizes,
    )
