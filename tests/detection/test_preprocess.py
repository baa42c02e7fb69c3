"""Images of every kind: equal pixels give equal batches, bad ones are refused by name."""

import io
import struct
import warnings
import zlib

import numpy as np
import pytest
import torch
from PIL import Image as pil

from edet.detection.images import ImageError, load_image
from edet.detection.preprocess import (
    IMAGENET_MEAN,
    IMAGENET_STD,
    fit,
    preprocess,
)


def noise(height=24, width=37, channels=3, seed=0):
    return np.random.default_rng(seed).integers(0, 256, (height, width, channels), np.uint8)


def smooth(height, width):
    y, x = np.mgrid[0:height, 0:width]
    waves = [np.sin(x / 7 + c) * np.cos(y / 9 - c) for c in range(3)]
    return (127.5 + 127.5 * np.stack(waves, -1)).astype(np.uint8)


# --- kinds of input -------------------------------------------------------------------------------


def test_path_pil_array_and_tensor_of_the_same_pixels_agree(tmp_path):
    pixels = noise()
    pil.fromarray(pixels).save(tmp_path / "image.png")
    expected = torch.from_numpy(pixels.copy()).permute(2, 0, 1)
    for image in (
        tmp_path / "image.png",
        str(tmp_path / "image.png"),
        pil.open(tmp_path / "image.png"),
        pixels,
        expected,
    ):
        assert torch.equal(load_image(image), expected)


def test_float_and_uint16_are_scaled_to_one():
    pixels = noise()
    expected = torch.from_numpy(pixels / np.float32(255)).permute(2, 0, 1)
    for image in (
        pixels / np.float32(255),
        pixels / np.float64(255),
        pixels.astype(np.uint16) * 257,
        pixels.astype(">u2") * np.array(257, ">u2"),
        expected,
        expected.double(),
    ):
        loaded = load_image(image)
        assert loaded.dtype == torch.float32
        torch.testing.assert_close(loaded, expected, rtol=0, atol=1e-7)
    for half in (expected.half(), expected.bfloat16()):
        torch.testing.assert_close(load_image(half), half.float())


def test_grey_is_repeated():
    grey = noise(channels=1)
    for image in (grey, grey[:, :, 0], torch.from_numpy(grey.copy()).permute(2, 0, 1)):
        loaded = load_image(image)
        assert loaded.shape == (3, 24, 37)
        for channel in loaded:
            assert np.array_equal(channel.numpy(), grey[:, :, 0])


def test_views_with_negative_strides_and_read_only_memory():
    bgr = noise()
    assert np.array_equal(load_image(bgr[:, ::-1, ::-1])[0].numpy(), bgr[:, ::-1, 2])
    bgr.flags.writeable = False
    load_image(bgr)


def test_the_image_is_not_written_to():
    pixels = noise()
    before = pixels.copy()
    tensor = torch.rand(3, 8, 8)
    kept = tensor.clone()
    preprocess([pixels, tensor], (32, 32))
    assert np.array_equal(pixels, before)
    assert torch.equal(tensor, kept)


# --- modes of files -------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", ["1", "L", "P", "RGB", "CMYK", "YCbCr", "HSV"])
def test_opaque_modes_convert_as_pillow_does(mode):
    image = pil.fromarray(smooth(30, 40)).convert(mode)
    expected = np.asarray(image.convert("RGB"))
    assert np.array_equal(load_image(image).permute(1, 2, 0).numpy(), expected)


def test_cmyk_file(tmp_path):
    colour = pil.new("RGB", (16, 16), (200, 40, 90))
    colour.convert("CMYK").save(tmp_path / "cmyk.jpg", quality=98)
    loaded = load_image(tmp_path / "cmyk.jpg").float().mean((1, 2))
    torch.testing.assert_close(loaded, torch.tensor([200.0, 40, 90]), rtol=0, atol=3)


def test_alpha_is_composited_over_white(tmp_path):
    rgba = np.zeros((1, 3, 4), np.uint8)
    rgba[0, :, :3] = (10, 100, 200)
    rgba[0, :, 3] = (0, 51, 255)
    expected = torch.tensor([[255, 206, 10], [255, 224, 100], [255, 244, 200]], dtype=torch.uint8)
    pil.fromarray(rgba).save(tmp_path / "rgba.png")
    for image in (tmp_path / "rgba.png", rgba, torch.from_numpy(rgba).permute(2, 0, 1)):
        assert torch.equal(load_image(image)[:, 0], expected)
    as_float = load_image(torch.from_numpy(rgba).permute(2, 0, 1) / 255)
    torch.testing.assert_close(as_float[:, 0] * 255, expected.float(), rtol=0, atol=0.51)


@pytest.mark.parametrize("mode", ["LA", "PA", "P"])
def test_transparent_modes(tmp_path, mode):
    image = pil.new("LA", (8, 4), (0, 0))  # black, all transparent
    if mode == "P":
        image = pil.new("P", (8, 4), 0)
        image.info["transparency"] = 0
    elif mode == "PA":
        image = pil.new("PA", (8, 4))
        image.putalpha(0)
    assert (load_image(image) == 255).all()


def test_sixteen_bit_grey_keeps_its_range(tmp_path):
    grey = np.linspace(0, 65535, 64).astype(np.uint16).reshape(8, 8)
    pil.fromarray(grey).save(tmp_path / "deep.png")
    pil.fromarray(grey).save(tmp_path / "deep.tif")
    for name in ("deep.png", "deep.tif"):
        loaded = load_image(tmp_path / name)
        expected = torch.from_numpy(grey / np.float32(65535))
        torch.testing.assert_close(loaded, expected.expand(3, 8, 8), rtol=0, atol=1e-7)


def test_sixteen_bit_grey_of_netpbm():
    pixels = np.array([[0, 1000], [40000, 65535]], np.uint16)
    file = b"P5 2 2 65535\n" + pixels.astype(">u2").tobytes()
    assert torch.equal(load_image(file), load_image(pixels))


def test_a_transparent_value_of_sixteen_bit_grey_is_white():
    pixels = np.array([[0, 1000], [1001, 65535]], np.uint16)
    stored = io.BytesIO()
    pil.fromarray(pixels).save(stored, "PNG")
    header, rest = stored.getvalue()[:33], stored.getvalue()[33:]  # signature and IHDR
    chunk = b"tRNS" + (1000).to_bytes(2, "big")
    clear = b"\0\0\0\2" + chunk + zlib.crc32(chunk).to_bytes(4, "big")
    pixels[0, 1] = 65535
    assert torch.equal(load_image(header + clear + rest), load_image(pixels))


def test_a_transparent_colour_of_sixteen_bits_is_white():
    """Pillow reads a PNG of 3 × 16 bits by its high bytes."""
    colours = [(0x1234, 0x5678, 0x9ABC), (0x1333, 0x5678, 0x9ABC), (0, 0, 0), (65535, 256, 2)]
    rows = b"".join(b"\0" + struct.pack(">6H", *a, *b) for a, b in (colours[:2], colours[2:]))

    def chunk(name, content):
        check = zlib.crc32(name + content).to_bytes(4, "big")
        return len(content).to_bytes(4, "big") + name + content + check

    file = b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", struct.pack(">IIBBBBB", 2, 2, 16, 2, 0, 0, 0))
    file += chunk(b"tRNS", struct.pack(">3H", *colours[0]))
    file += chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")
    pixels = np.array(colours) >> 8
    pixels[0] = 255
    expected = torch.from_numpy(pixels.astype(np.uint8)).T.reshape(3, 2, 2)
    assert torch.equal(load_image(file), expected)
    opened = pil.open(io.BytesIO(file))
    assert torch.equal(load_image(opened), expected)
    assert opened.info["transparency"] == colours[0]  # the caller's image is not changed


@pytest.mark.parametrize("change", [lambda x: x.to_sparse(), lambda x: x.to("meta")])
@pytest.mark.parametrize("dtype", [torch.uint8, torch.float32])
def test_tensors_without_dense_values_are_refused(change, dtype):
    with pytest.raises(ImageError, match=r"image must be a dense tensor with values, got Tensor"):
        load_image(change(torch.ones((3, 4, 5), dtype=dtype)))


def test_eight_bit_floats():
    pixels = torch.tensor([0.0, 0.25, 1.0]).view(1, 1, 3)
    for dtype in (torch.float8_e4m3fn, torch.float8_e5m2):
        assert torch.equal(load_image(pixels.to(dtype)), pixels.expand(3, -1, -1))
    with pytest.raises(ImageError, match=r"must have values in \[0, 1\], got 0 to 4"):
        load_image((4 * pixels).to(torch.float8_e5m2))


def test_grey_with_premultiplied_alpha():
    image = pil.new("LA", (2, 1))
    image.putdata([(100, 255), (100, 0)])
    assert load_image(image.convert("La"))[0].tolist() == [[100, 255]]


@pytest.mark.parametrize("mode", ["I", "F"])
def test_modes_without_a_range_are_refused_by_name(tmp_path, mode):
    path = tmp_path / "image.tif"
    pil.new(mode, (4, 4)).save(path)
    with pytest.raises(ImageError, match=f"image.tif has mode '{mode}'"):
        load_image(path)


def test_exif_orientation_is_honoured(tmp_path):
    pixels = smooth(20, 30)
    exif = pil.Exif()
    exif[0x0112] = 6  # the camera was turned: rotate a quarter clockwise to show
    pil.fromarray(pixels).save(tmp_path / "turned.png", exif=exif)
    upright = load_image(tmp_path / "turned.png")
    assert upright.shape == (3, 30, 20)
    assert np.array_equal(upright.permute(1, 2, 0).numpy(), np.rot90(pixels, -1))


def test_first_frame_of_an_animation(tmp_path):
    frames = [pil.new("RGB", (8, 8), c) for c in ("red", "blue")]
    frames[0].save(tmp_path / "moving.gif", save_all=True, append_images=frames[1:])
    assert load_image(tmp_path / "moving.gif")[:, 0, 0].tolist() == [255, 0, 0]


# --- refusals -------------------------------------------------------------------------------------


def test_unreadable_files_are_named(tmp_path):
    path = tmp_path / "photo.jpg"
    with pytest.raises(FileNotFoundError, match=r"photo\.jpg does not exist"):
        load_image(path)
    path.write_bytes(b"")
    with pytest.raises(ImageError, match=r"photo.jpg is not an image"):
        load_image(path)
    path.write_text("<html>not found</html>")
    with pytest.raises(ImageError, match=r"photo.jpg is not an image"):
        load_image(path)
    with pytest.raises(ImageError, match="is a folder"):
        load_image(tmp_path)


@pytest.mark.parametrize("suffix", ["jpg", "png", "webp", "bmp", "gif", "tif"])
@pytest.mark.parametrize("keep", [0.02, 0.5, 0.9])
def test_truncated_files_are_named(tmp_path, suffix, keep):
    path = tmp_path / f"photo.{suffix}"
    pil.fromarray(noise(200, 300)).save(path)
    whole = path.read_bytes()
    path.write_bytes(whole[: int(len(whole) * keep)])
    with (
        warnings.catch_warnings(),
        pytest.raises(ImageError, match=rf"photo.{suffix} (cannot be|is not)"),
    ):
        warnings.simplefilter("ignore")  # Pillow warns about the metadata of truncated TIFF
        load_image(path)


def test_truncated_pil_image_is_refused(tmp_path):
    path = tmp_path / "photo.jpg"
    pil.fromarray(noise(200, 300)).save(path)
    path.write_bytes(path.read_bytes()[:-3000])
    with pil.open(path) as image, pytest.raises(ImageError, match=r"photo\.jpg cannot be decoded"):
        load_image(image)


@pytest.mark.parametrize(
    ("image", "match"),
    [
        (np.zeros((3, 20, 30), np.uint8), r"\(H, W, C\).*\(3, 20, 30\): transpose\(1, 2, 0\)"),
        (torch.zeros(20, 30, 3), r"\(C, H, W\).*\(20, 30, 3\): permute\(2, 0, 1\)"),
        (np.zeros((20, 30, 2), np.uint8), "1, 3 or 4 channels"),
        (torch.zeros(20, 30), r"\(C, H, W\)"),
        (np.zeros((20, 0, 3), np.uint8), "at least one pixel"),
        (torch.zeros(3, 0, 30), "at least one pixel"),
        (np.zeros((20, 30, 3), np.int64), "uint8, uint16 or float, got ndarray of int64"),
        (np.zeros((20, 30, 3), bool), "uint8, uint16 or float, got ndarray of bool"),
        (torch.zeros(3, 20, 30, dtype=torch.int32), "uint8 or float, got Tensor of torch.int32"),
        (np.full((20, 30, 3), 255.0), r"values in \[0, 1\], got 255 to 255"),
        (torch.full((3, 20, 30), -0.5), r"values in \[0, 1\], got -0.5"),
        (torch.full((3, 20, 30), float("nan")), r"values in \[0, 1\], got nan"),
    ],
)
def test_wrong_layout_dtype_and_range(image, match):
    with pytest.raises(ImageError, match=match):
        load_image(image)
    with pytest.raises(ImageError, match=r"images\[1\]"):
        preprocess([noise(), image], (32, 32))


@pytest.mark.parametrize("image", [None, 3, {"a": 1}])
def test_other_types_are_refused(image):
    with pytest.raises(TypeError, match=r"images\[0\] must be a path.* got "):
        preprocess([image], (32, 32))


@pytest.mark.parametrize(
    "images", [[], (), np.zeros((0, 4, 4, 3), np.uint8), torch.zeros(0, 3, 4, 4)]
)
def test_empty_batch(images):
    with pytest.raises(ImageError, match="at least one image"):
        preprocess(images, (32, 32))


# --- geometry -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("size", "into", "expected"),
    [
        ((480, 640), (512, 512), (384, 512)),
        ((640, 480), (512, 512), (512, 384)),
        ((427, 641), (512, 512), (341, 512)),
        ((100, 100), (512, 512), (512, 512)),
        ((1080, 1920), (512, 1024), (512, 910)),
        ((1, 1), (512, 512), (512, 512)),
        ((1, 10_000), (512, 512), (1, 512)),
        ((10_000, 1), (512, 256), (512, 1)),
    ],
)
def test_fit_keeps_the_aspect_and_rounds_down(size, into, expected):
    scale, fitted = fit(size, into)
    assert fitted == expected
    assert scale == min(into[0] / size[0], into[1] / size[1])


def test_one_side_always_fills_the_input():
    for height in range(1, 700, 7):
        for width in range(1, 700, 11):
            _, (h, w) = fit((height, width), (512, 384))
            assert h == 512 or w == 384
            assert h <= 512
            assert w <= 384


def test_padding_and_normalisation():
    pixels = smooth(30, 60)
    images, scales, sizes = preprocess(pixels, (64, 64))
    assert images.shape == (1, 3, 64, 64)
    assert images.is_contiguous(memory_format=torch.channels_last)
    assert sizes == [(30, 60)]
    assert scales.tolist() == pytest.approx([60 / 64])
    mean, std = (torch.tensor(v).view(3, 1, 1) for v in (IMAGENET_MEAN, IMAGENET_STD))
    resized = np.asarray(pil.fromarray(pixels).resize((64, 32), pil.Resampling.BILINEAR))
    expected = (torch.from_numpy(resized.copy()).permute(2, 0, 1) / 255 - mean) / std
    step = 1 / 255 / min(IMAGENET_STD)  # of one grey level: Pillow rounds its weights to 8 bits
    torch.testing.assert_close(images[0, :, :32], expected, rtol=0, atol=1.01 * step)
    fill = torch.tensor([124.0, 116, 104]).view(3, 1, 1) / 255
    expected = ((fill - mean) / std).expand(3, 32, 64)
    torch.testing.assert_close(images[0, :, 32:], expected)


@pytest.mark.parametrize("size", [(30, 40), (333, 500), (700, 900)])
def test_resize_is_pillows(size):
    pixels = smooth(*size)
    images, _, _ = preprocess(pixels, (256, 256), mean=(0, 0, 0), std=(1, 1, 1))
    _, (h, w) = fit(size, (256, 256))
    expected = np.asarray(pil.fromarray(pixels).resize((w, h), pil.Resampling.BILINEAR))
    got = images[0, :, :h, :w].permute(1, 2, 0).numpy() * 255
    assert np.abs(got - expected).max() < 1.01
    assert (np.abs(got - expected) > 0.01).mean() < 0.05


def test_batch_of_different_images():
    images, scales, sizes = preprocess([noise(20, 40), noise(64, 64, 1)], (64, 64))
    assert sizes == [(20, 40), (64, 64)]
    assert scales.tolist() == [0.625, 1]
    alone, _, _ = preprocess(noise(20, 40), (64, 64))
    assert torch.equal(images[0], alone[0])


def test_four_dimensional_inputs_are_batches():
    batch = np.stack([noise(seed=1), noise(seed=2)])
    from_array = preprocess(batch, (64, 64)).images
    from_tensor = preprocess(torch.from_numpy(batch).permute(0, 3, 1, 2), (64, 64)).images
    assert from_array.shape == (2, 3, 64, 64)
    assert torch.equal(from_array, from_tensor)


@pytest.mark.parametrize("size", [(1, 1), (1, 10_000), (10_000, 1), (10_000, 300)])
def test_extreme_sizes(tmp_path, size):
    path = tmp_path / "image.png"
    pil.new("RGB", size[::-1], (255, 0, 0)).save(path)
    images, scales, sizes = preprocess(path, (128, 128), mean=(0, 0, 0), std=(1, 1, 1))
    assert sizes == [size]
    assert scales.item() == pytest.approx(max(size) / 128)
    _, (h, w) = fit(size, (128, 128))
    assert images[0, 0, :h, :w].eq(1).all()
    assert images.sum() == h * w


def test_dtype_and_normalisation_arguments():
    pixels = noise()
    half = preprocess(pixels, (32, 32), dtype=torch.bfloat16).images
    assert half.dtype == torch.bfloat16
    full = preprocess(pixels, (32, 32)).images
    torch.testing.assert_close(half, full.bfloat16())
    lite = preprocess(pixels, (32, 32), mean=(0.5,) * 3, std=(0.5,) * 3).images
    assert lite.min() >= -1
    assert lite.max() <= 1
