"""Arguments of every kind that people give: sizes, pixels, indices."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import edet
from edet.detection.images import ImageError, load_image
from edet.detection.results import Detections

PIXELS = np.random.default_rng(0).integers(0, 256, (20, 30, 3), np.uint8)


@pytest.fixture(scope="module")
def model() -> edet.EfficientDet:
    return edet.create_model("tf_efficientdet_lite0", num_classes=2, width=16, cells=1)


@pytest.mark.parametrize("size", [64, np.int64(64), [64, 64], torch.Size((64, 64))], ids=repr)
def test_image_sizes_of_a_predictor(size: Any, model: edet.EfficientDet) -> None:
    predictor = edet.Predictor(model, image_size=size, score_threshold=0.0)
    assert predictor.image_size == (64, 64)
    expected = edet.Predictor(model, image_size=(64, 64), score_threshold=0.0)(PIXELS)
    for found in (predictor(PIXELS), predictor(PIXELS, image_size=size)):
        assert torch.equal(found.boxes, expected.boxes)
    assert len(list(predictor.stream([PIXELS], image_size=size))) == 1
    predictor.warm_up(image_size=size)


@pytest.mark.parametrize("size", [64.0, (64.0, 64.0), "64", (0, 64), (64,)], ids=repr)
def test_image_sizes_that_are_none(size: Any, model: edet.EfficientDet) -> None:
    with pytest.raises(ValueError, match="image_size must be two positive integers, got"):
        edet.Predictor(model, image_size=size)
    predictor = edet.Predictor(model, image_size=64)
    with pytest.raises(ValueError, match="image_size must be two positive integers, got"):
        predictor(PIXELS, image_size=size)


@pytest.mark.parametrize("kind", [">u2", "<u2", "=u2", ">f2", ">f4", ">f8", "<f8"])
def test_byte_orders(kind: str) -> None:
    whole = PIXELS.astype(np.uint16) * 257
    pixels = (whole if "u" in kind else PIXELS / np.float32(255)).astype(kind)
    native = pixels.astype(pixels.dtype.newbyteorder("="))
    found = load_image(pixels)
    assert torch.equal(found, load_image(native))
    expected = torch.from_numpy(PIXELS).permute(2, 0, 1) / 255
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64])
def test_a_rounding_outside_of_the_range(dtype: type) -> None:
    above, below = (np.nextafter(dtype(x), dtype(y)) for x, y in ((1, 2), (0, -1)))
    pixels = np.stack([np.full((4, 4), x, dtype) for x in (above, below, 0.5)], -1)
    for image in (pixels, torch.from_numpy(pixels).permute(2, 0, 1)):
        found = load_image(image)
        assert found.amin((1, 2)).tolist() == [1.0, 0.0, 0.5]


def test_more_than_a_rounding_is_refused_in_full() -> None:
    with pytest.raises(ImageError, match=r"values in \[0, 1\], got 1 to 1\.0000[1-9]\d*: divide"):
        load_image(np.linspace(1, 1.00001, 12, dtype=np.float32).reshape(2, 2, 3))
    with pytest.raises(ImageError, match="got nan to nan"):
        load_image(np.full((2, 2, 3), np.nan))


def test_advice_on_layouts() -> None:
    def said(image: Any) -> str:
        with pytest.raises(ImageError) as caught:
            load_image(image)
        return str(caught.value)

    assert said(PIXELS.transpose(2, 0, 1)).endswith("transpose(1, 2, 0) it")
    assert said(torch.from_numpy(PIXELS)).endswith("permute(2, 0, 1) it")
    for image in (PIXELS[..., :2], torch.from_numpy(PIXELS[..., :2]), np.zeros((5, 6, 7))):
        assert said(image).endswith(f"shape {tuple(image.shape)}")  # no order of its axes helps


FOUND = Detections(
    torch.tensor([[0.0, 0, 2, 2], [1, 1, 5, 5], [2, 2, 9, 9]]),
    torch.tensor([0.9, 0.5, 0.4]),
    torch.tensor([1, 3, 2]),
    (10, 10),
)


@pytest.mark.parametrize(
    "index", [1, -2, np.int64(1), np.uint8(1), np.array(1), torch.tensor(1), torch.tensor(-2)]
)
def test_one_result(index: Any) -> None:
    assert FOUND[index] == FOUND[1]
    assert FOUND[index].label == 3 and type(FOUND[index].score) is float


@pytest.mark.parametrize(
    "index",
    [
        *([0, 2], slice(0, 3, 2), [True, False, True]),
        *(np.array([0, 2]), np.array([2, 0])[::-1], np.array([True, False, True])),
        *(torch.tensor([0, 2]), torch.tensor([0, 2], dtype=torch.int32)),
        torch.tensor([True, False, True]),
    ],
    ids=repr,
)
def test_several_results(index: Any) -> None:
    found = FOUND[index]
    assert isinstance(found, Detections)
    assert found.labels.tolist() == [1, 2]
    assert found.boxes.tolist() == [[0, 0, 2, 2], [2, 2, 9, 9]]


def test_an_index_that_is_not_there() -> None:
    for index in (3, np.int64(3), torch.tensor(-4)):
        with pytest.raises(IndexError):
            FOUND[index]
    assert len(list(FOUND)) == 3


def test_bytes_of_a_file(tmp_path: Path) -> None:
    image = pytest.importorskip("PIL.Image", reason="needs the extra image")
    exif = image.Exif()
    exif[0x0112] = 6
    image.fromarray(PIXELS).save(tmp_path / "turned.jpg", exif=exif)
    data = (tmp_path / "turned.jpg").read_bytes()
    assert torch.equal(load_image(data), load_image(tmp_path / "turned.jpg"))
    assert load_image(data).shape == (3, 30, 20)
    with pytest.raises(ImageError, match="picture is not an image in a known format"):
        load_image(b"junk", "picture")
