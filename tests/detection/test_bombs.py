"""Small files that ask for much memory are refused by name before it is taken."""

import io
import struct
import subprocess
import sys
import tracemalloc
import zlib
from fractions import Fraction

import numpy as np
import pytest
import torch
from PIL import Image as pil

from edet.detection import images, video
from edet.detection.images import ImageError, load_image


def png(width, height, rows=b""):
    """A PNG that says it has that size, with the compressed ``rows``."""

    def chunk(kind, data):
        body = kind + data
        return struct.pack(">I", len(data)) + body + struct.pack(">I", zlib.crc32(body))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return (
        b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", rows) + chunk(b"IEND", b"")
    )


def bmp(width, height):
    header = struct.pack("<IiiHHIIiiII", 40, width, height, 1, 24, 0, 0, 0, 0, 0, 0)
    return b"BM" + struct.pack("<IHHI", 54, 0, 0, 54) + header


def gif(width, height):
    frame = b"," + struct.pack("<HHHHB", 0, 0, width, height, 0) + b"\2\2\x4c\1\0;"
    return b"GIF89a" + struct.pack("<HHBBB", width, height, 0x80, 0, 0) + bytes(6) + frame


SIDES = {  # each more than 2²⁷ pixels; the first is below Pillow's own limit
    "square": (12000, 12000),
    "huge": (60000, 60000),
    "wide": (60000, 3000),
    "tall": (3000, 60000),
}


@pytest.mark.parametrize("sides", SIDES)
@pytest.mark.parametrize("make", [png, bmp, gif])
@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
def test_pictures_of_absurd_size(tmp_path, make, sides):
    (tmp_path / "bomb").write_bytes(make(*SIDES[sides]))
    tracemalloc.start()
    try:
        with pytest.raises(
            ImageError, match=r"bomb (must have at most|cannot be opened.* exceeds)"
        ):
            load_image(tmp_path / "bomb")
        assert tracemalloc.get_traced_memory()[1] < 1 << 24
    finally:
        tracemalloc.stop()


def test_an_image_that_was_opened_without_a_limit(tmp_path, monkeypatch):
    monkeypatch.setattr(pil, "MAX_IMAGE_PIXELS", None)
    image = pil.open(io.BytesIO(png(50000, 50000)))
    with pytest.raises(ImageError, match=r"image must have at most 134,217,728 .*50000 × 50"):
        load_image(image)


def test_the_limit_can_be_set(tmp_path, monkeypatch):
    pixels = np.random.default_rng(0).integers(0, 256, (30, 40, 3), np.uint8)
    pil.fromarray(pixels).save(tmp_path / "x.png")
    monkeypatch.setattr(images, "MAX_PIXELS", 30 * 40)
    assert load_image(tmp_path / "x.png").shape == (3, 30, 40)
    monkeypatch.setattr(images, "MAX_PIXELS", 30 * 40 - 1)
    with pytest.raises(ImageError, match=r"x\.png must have at most 1,199 pixels .*got 40 × 30"):
        load_image(tmp_path / "x.png")
    decoded = pil.open(tmp_path / "x.png")
    decoded.load()  # its memory is taken already
    assert load_image(decoded).shape == (3, 30, 40)


def test_transparency_in_strips_is_as_in_one():
    pixels = np.random.default_rng(0).integers(0, 256, (700, 5, 4), np.uint8)
    alpha = pixels[..., 3:] / np.float32(255)
    expected = (pixels[..., :3] * alpha + 255 * (1 - alpha)).round()
    found = load_image(pil.fromarray(pixels)).permute(1, 2, 0).numpy()
    assert np.abs(found - expected).max() <= 1  # half up or to even
    floats = load_image(torch.from_numpy(pixels / np.float32(255)).permute(2, 0, 1))
    assert np.abs(255 * floats.permute(1, 2, 0).numpy() - expected).max() < 0.51


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["RGB", "RGBA", "L"])
def test_the_largest_picture_fits_in_two_gigabytes(tmp_path, mode):
    side = 11585
    pil.new(mode, (side, side)).save(tmp_path / "large.png", compress_level=1)
    code = (
        "import sys, warnings; warnings.simplefilter('ignore')\n"
        "from edet.detection.images import load_image\n"
        "print(*load_image(sys.argv[1]).shape)\n"
        # getrusage counts the parent too, as it was before this program took its place
        "print(*(x.split()[1] for x in open('/proc/self/status') if x.startswith('VmHWM')))"
    )
    run = [sys.executable, "-c", code, tmp_path / "large.png"]
    output = subprocess.run(run, capture_output=True, text=True, check=True).stdout
    shape, peak = output.splitlines()
    assert shape == f"3 {side} {side}"
    assert int(peak) < 2 << 20


def test_videos_of_absurd_size(tmp_path, monkeypatch):
    pytest.importorskip("av")
    with video.VideoWriter(tmp_path / "x.mp4", Fraction(10)) as writer:
        writer.write(pil.new("RGB", (64, 48)))
    monkeypatch.setattr(video, "MAX_PIXELS", 64 * 48)
    reader = video.VideoReader(tmp_path / "x.mp4")
    assert len(list(reader)) == 1
    monkeypatch.setattr(video, "MAX_PIXELS", 64 * 48 - 1)
    for read in (lambda: video.VideoReader(tmp_path / "x.mp4"), lambda: list(reader)):
        with pytest.raises(video.VideoError, match=r"x\.mp4 must have frames of at most 3,071"):
            read()
