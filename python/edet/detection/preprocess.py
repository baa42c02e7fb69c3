"""Images to a normalised batch: keep-aspect resize, padding, and the way back.

Follows the published EfficientDet pre-processing: the image is scaled by one factor to fit the
network's input, bilinear and anti-aliased, put at the top left and padded with the mean colour.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from ..models.configs import IMAGENET_MEAN, IMAGENET_STD
from ..models.efficientnet import normalise_pixels
from .images import ImageLike, as_list, load_image


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
    return torch.tensor(rows, dtype=torch.float32, device="cpu")


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
        images: one image or a list of them; see :func:`edet.preprocess.load_image` for the kinds.
        image_size: (H, W) of the batch.
        mean, std: per channel, for values in [0, 1].
        device: of the batch; the CPU when None.
        dtype: of the batch.

    Returns:
        the batch, the scale of each image and its size.

    Raises:
        ImageError (a ValueError), TypeError, FileNotFoundError: see
            :func:`edet.preprocess.load_image`; also when there is no image.
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
