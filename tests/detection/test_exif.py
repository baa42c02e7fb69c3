"""Pictures are shown upright by their orientation alone, whatever damage their other tags have."""

import io
import struct
import warnings
import zlib

import numpy as np
import pytest
from PIL import Image as pil
from PIL import features

from edet.detection.images import ImageError, load_image

STORED = np.random.default_rng(0).integers(0, 256, (20, 30, 3), np.uint8)
TURN = (0x112, 3, 1, struct.pack("<H", 6))  # orientation 6: a quarter clockwise

#: Entries of a TIFF directory: tag, type, count, bytes. All but the last three have TURN too.
DAMAGE = {
    "nothing": [],
    "XResolution as text": [(0x11A, 2, 3, b"72\0")],
    "XResolution as one letter": [(0x11A, 2, 2, b"7\0"), (0x128, 3, 1, b"\2\0")],
    "XResolution as one byte": [(0x11A, 1, 1, b"7"), (0x128, 3, 1, b"\2\0")],
    "XResolution of nothing over nothing": [(0x11A, 5, 1, bytes(8)), (0x128, 3, 1, b"\2\0")],
    "ResolutionUnit as text": [(0x128, 2, 3, b"in\0")],
    "Make as numbers": [(0x10F, 12, 2, struct.pack("<2d", 1, float("nan")))],
    "an EXIF directory outside of the block": [(0x8769, 4, 1, struct.pack("<I", 10**6))],
    "a GPS directory as text": [(0x8825, 2, 5, b"here\0")],
    "an unknown type": [(0x131, 99, 1, b"\1\0\0\0")],
    "data behind the end": [(0x132, 2, 20, None)],
}


def directory(*entries, at=8):
    """The entries as a TIFF directory that begins ``at`` bytes into the block."""
    behind, data, rows = at + 2 + 12 * len(entries) + 4, b"", b""
    for tag, kind, count, value in sorted(entries, key=lambda entry: entry[0]):
        if value is None:
            value = struct.pack("<I", 10**6)
        elif len(value) > 4:
            value, data = struct.pack("<I", behind + len(data)), data + value
        rows += struct.pack("<HHI", tag, kind, count) + value.ljust(4, b"\0")
    return struct.pack("<H", len(entries)) + rows + b"\0" * 4 + data


def block(*entries):
    return b"Exif\0\0II*\0\x08\0\0\0" + directory(*entries)


def with_exif(fmt, exif):
    """STORED as a file of the format, and what its pixels decode to."""
    file = io.BytesIO()
    image = pil.fromarray(STORED)
    if fmt == "MPO":
        options = {"save_all": True, "append_images": [image], "exif": exif}
    elif fmt == "PNG":
        options = {}
    else:
        options = {"exif": exif}
    image.save(file, fmt, quality=100, **options)
    data = file.getvalue()
    if fmt == "PNG":  # Pillow reads and rewrites what it is given to save
        chunk = b"eXIf" + exif[6:]
        chunk = struct.pack(">I", len(chunk) - 4) + chunk + struct.pack(">I", zlib.crc32(chunk))
        data = data[:33] + chunk + data[33:]  # behind the header
    bare = io.BytesIO()
    image.save(bare, "JPEG" if fmt == "MPO" else fmt, quality=100)
    return data, np.asarray(pil.open(bare).convert("RGB"))


def tiff(*entries):
    """STORED as an uncompressed TIFF with these entries beside the needed ones."""
    height, width, _ = STORED.shape
    needed = [
        (256, 3, 1, struct.pack("<H", width)),
        (257, 3, 1, struct.pack("<H", height)),
        (258, 3, 3, struct.pack("<3H", 8, 8, 8)),
        (259, 3, 1, struct.pack("<H", 1)),
        (262, 3, 1, struct.pack("<H", 2)),
        (273, 4, 1, struct.pack("<I", 8)),
        (277, 3, 1, struct.pack("<H", 3)),
        (279, 4, 1, struct.pack("<I", STORED.nbytes)),
    ]
    start = 8 + STORED.nbytes
    rest = directory(*needed, *entries, at=start)
    return b"II*\0" + struct.pack("<I", start) + STORED.tobytes() + rest, STORED


def load(data, way, tmp_path):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Pillow warns about some of the damage
        if way == "image":
            return load_image(pil.open(io.BytesIO(data))).permute(1, 2, 0).numpy()
        (tmp_path / "picture").write_bytes(data)
        return load_image(tmp_path / "picture").permute(1, 2, 0).numpy()


@pytest.mark.parametrize("damage", DAMAGE)
@pytest.mark.parametrize("fmt", ["JPEG", "PNG", "WEBP", "MPO", "TIFF"])
@pytest.mark.parametrize("way", ["path", "image"])
def test_damage_elsewhere_does_not_matter(tmp_path, fmt, damage, way):
    if way == "image" and "XResolution as one" in damage and fmt in ("JPEG", "MPO"):
        pytest.skip("Pillow itself does not open it")
    if fmt == "WEBP":
        pytest.importorskip("PIL._webp")
    entries = [TURN, *DAMAGE[damage]]
    data, pixels = tiff(*entries) if fmt == "TIFF" else with_exif(fmt, block(*entries))
    assert np.array_equal(load(data, way, tmp_path), np.rot90(pixels, -1))


@pytest.mark.parametrize(
    "exif",
    [
        block((0x112, 2, 2, b"6\0")),
        block((0x112, 3, 1, struct.pack("<H", 9))),
        block((0x112, 12, 1, struct.pack("<d", float("nan")))),
        block(TURN)[:20],
        b"Exif\0\0XX*\0" + block(TURN)[10:],
        b"Exif\0\0",
    ],
    ids=["text", "nine", "not a number", "cut", "no header", "empty"],
)
@pytest.mark.parametrize("fmt", ["JPEG", "PNG", "MPO"])
def test_an_orientation_that_cannot_be_read_is_none(tmp_path, fmt, exif):
    data, pixels = with_exif(fmt, exif)
    assert np.array_equal(load(data, "path", tmp_path), pixels)


@pytest.mark.parametrize("tag", [0x10D, 0x10F, 0x110, 0x11A, 0x131, 0x132])
def test_a_tag_behind_the_end_of_a_tiff(tag):
    """Pillow stops reading the directory there: sizes and offsets behind it were missing."""
    data, _ = tiff(TURN, (tag, 2, 30, None))
    assert np.array_equal(load_image(data).permute(1, 2, 0).numpy(), np.rot90(STORED, -1))


@pytest.mark.parametrize("tag", [0x10D, 0x10F, 0x110])
@pytest.mark.parametrize("options", [{"big_tiff": True}, {"compression": "tiff_lzw"}])
def test_a_tag_behind_the_end_of_a_large_or_a_compressed_tiff(tag, options):
    file = io.BytesIO()
    image = pil.fromarray(STORED)
    image.save(file, "TIFF", tiffinfo={0x112: 6, tag: "x" * 30}, **options)
    data = bytearray(file.getvalue())
    place = data.index(struct.pack("<HH", tag, 2))
    if "big_tiff" in options:
        data[place + 12 : place + 20] = struct.pack("<Q", 10**6)
    else:
        data[place + 8 : place + 12] = struct.pack("<I", 10**6)
    upright = load_image(bytes(data)).permute(1, 2, 0).numpy()
    assert np.array_equal(upright, np.rot90(STORED, -1))


def test_planes_of_a_tiff_behind_a_tag_that_is_lost(tmp_path):
    """The tag that tells of planes lies behind a broken one; without it the pixels were others."""
    height, width, _ = STORED.shape
    plane = height * width
    needed = [
        (256, 3, 1, struct.pack("<H", width)),
        (257, 3, 1, struct.pack("<H", height)),
        (258, 3, 3, struct.pack("<3H", 8, 8, 8)),
        (259, 3, 1, struct.pack("<H", 1)),
        (262, 3, 1, struct.pack("<H", 2)),
        (273, 4, 3, struct.pack("<3I", *(8 + i * plane for i in range(3)))),
        (277, 3, 1, struct.pack("<H", 3)),
        (279, 4, 3, struct.pack("<3I", plane, plane, plane)),
        (282, 5, 1, None),
        (284, 3, 1, b"\2\0"),
    ]
    start = 8 + STORED.nbytes
    pixels = STORED.transpose(2, 0, 1).tobytes()
    data = b"II*\0" + struct.pack("<I", start) + pixels + directory(*needed, at=start)
    assert np.array_equal(load(data, "path", tmp_path), STORED)


@pytest.mark.parametrize("damage", [*DAMAGE, "no header", "empty"])
def test_damage_in_an_avif(tmp_path, damage):
    """Its orientation is a property of the image; EXIF says another one here, which is not used."""
    if not features.check("avif"):
        pytest.skip("this Pillow reads no AVIF")
    whole = block((0x10F, 2, 200, b"x" * 200))
    exif = block(TURN, *DAMAGE.get(damage, []))
    if damage == "no header":
        exif = b"Exif\0\0XX" + exif[8:]
    elif damage == "empty":
        exif = b"Exif\0\0"
    file = io.BytesIO()
    image = pil.fromarray(STORED)
    image.save(file, "AVIF", exif=whole)
    data = file.getvalue()
    assert data.count(whole[6:]) == 1
    data = data.replace(whole[6:], exif[6:].ljust(len(whole) - 6, b"\0"))
    bare = io.BytesIO()
    image.save(bare, "AVIF")
    pixels = np.asarray(pil.open(bare).convert("RGB"))
    assert np.array_equal(load(data, "path", tmp_path), pixels)


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("fmt", ["JPEG", "PNG", "TIFF"])
def test_every_orientation_beside_damage(tmp_path, fmt, orientation):
    entries = [
        (0x112, 3, 1, struct.pack("<H", orientation)),
        (0x11A, 2, 3, b"72\0"),
        (0x8825, 2, 5, b"here\0"),
    ]
    data, pixels = tiff(*entries) if fmt == "TIFF" else with_exif(fmt, block(*entries))
    ways = {
        1: lambda p: p,
        2: lambda p: p[:, ::-1],
        3: lambda p: p[::-1, ::-1],
        4: lambda p: p[::-1],
        5: lambda p: p.transpose(1, 0, 2),
        6: lambda p: np.rot90(p, -1),
        7: lambda p: p[::-1, ::-1].transpose(1, 0, 2),
        8: lambda p: np.rot90(p),
    }
    assert np.array_equal(load(data, "path", tmp_path), ways[orientation](pixels))


def test_the_image_that_was_given_stays_usable():
    """A TIFF is decoded in place: its own method is there again, and a second time is the same."""
    data, _ = tiff(TURN)
    image = pil.open(io.BytesIO(data))
    first = load_image(image)
    assert "load_end" not in vars(image)
    assert image.size == (20, 30)
    assert np.array_equal(load_image(image), first)
    assert np.array_equal(load_image(image.copy()), first)


def test_a_jpeg_that_is_damaged_elsewhere_is_still_refused(tmp_path):
    data, _ = with_exif("JPEG", block(TURN))
    for start in (data[:2], b"\xff\xd8\xff\xe1\0\x10Exif\0\0"):
        (tmp_path / "x.jpg").write_bytes(start + b"junk" * 10)
        with pytest.raises(ImageError, match=r"x\.jpg is not an image"):
            load_image(tmp_path / "x.jpg")
