"""Anchors: published counts, order and sizes; the box code."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from edet.detection.anchors import decode_boxes, encode_boxes, feature_sizes, generate_anchors


@pytest.mark.parametrize(
    ("size", "max_level", "count"),
    [(512, 7, 49_104), (640, 7, 76_725), (1536, 7, 441_936), (1536, 8, 442_260)],
)
def test_published_counts(size, max_level, count):
    assert generate_anchors((size, size), max_level=max_level).shape == (count, 4)


def test_first_anchor():
    assert generate_anchors((512, 512))[0].tolist() == [-12, -12, 20, 20]
    assert generate_anchors((1536, 1536), anchor_scale=5.0)[0].tolist() == [-16, -16, 24, 24]


def test_order_is_level_row_column_octave_aspect():
    anchors = generate_anchors((256, 128))
    centres = (anchors[:, :2] + anchors[:, 2:]) / 2
    torch.testing.assert_close(centres[:9], torch.full((9, 2), 4.0))
    assert centres[9].tolist() == [4, 12]  # next column
    assert centres[9 * 16].tolist() == [12, 4]  # next row
    first_of_p4 = 9 * 32 * 16
    assert centres[first_of_p4].tolist() == [8, 8]
    heights, widths = (anchors[:9, 2:] - anchors[:9, :2]).T
    octaves = 32 * 2 ** (torch.arange(9) // 3 / 3)
    torch.testing.assert_close(heights, octaves * torch.tensor([1, 0.7, 1.4]).repeat(3))
    torch.testing.assert_close(widths, octaves * torch.tensor([1, 1.4, 0.7]).repeat(3))


def test_single_float_aspect_is_its_root():
    anchors = generate_anchors((64, 64), max_level=3, aspect_ratios=[2.0], num_scales=1)
    height, width = (anchors[0, 2:] - anchors[0, :2]).tolist()
    assert width / height == pytest.approx(2)
    assert width * height == pytest.approx(32 * 32)


@given(st.integers(1, 700), st.integers(1, 700), st.integers(3, 5), st.integers(0, 3))
@settings(max_examples=40, deadline=None)
def test_any_size_has_nine_anchors_per_cell_inside_the_image(height, width, low, more):
    sizes = feature_sizes((height, width), low, low + more)
    anchors = generate_anchors((height, width), min_level=low, max_level=low + more)
    assert len(anchors) == 9 * sum(h * w for h, w in sizes)
    centres = (anchors[:, :2] + anchors[:, 2:]) / 2
    assert (centres > 0).all()
    assert (centres < torch.tensor([height, width])).all()


def test_feature_sizes_round_up():
    assert feature_sizes((320, 320)) == [(40, 40), (20, 20), (10, 10), (5, 5), (3, 3)]
    assert feature_sizes((1, 129), 3, 8) == [(1, 17), (1, 9), (1, 5), (1, 3), (1, 2), (1, 1)]


def test_cached_own_and_usable_after_inference_mode():
    with torch.inference_mode():
        first = generate_anchors((128, 384))
    expected = first.clone()
    first += 1
    first = generate_anchors((128, 384))
    assert torch.equal(first, expected)
    regression = torch.zeros(first.shape, requires_grad=True)
    decode_boxes(regression, first).sum().backward()
    assert regression.grad is not None


def test_dtype():
    assert generate_anchors((64, 64), dtype=torch.float64).dtype == torch.float64


@pytest.mark.parametrize(
    ("arguments", "match"),
    [
        ({"image_size": (0, 64)}, "image_size"),
        ({"image_size": (64, 64), "min_level": 5, "max_level": 4}, "min_level"),
        ({"image_size": (64, 64), "num_scales": 0}, "num_scales"),
        ({"image_size": (64, 64), "anchor_scale": 0.0}, "anchor_scale"),
        ({"image_size": (64, 64), "aspect_ratios": []}, "aspect_ratios"),
        ({"image_size": (64, 64), "aspect_ratios": [(1.0, -1.0)]}, "aspect_ratios"),
    ],
)
def test_bad_arguments_are_named(arguments, match):
    with pytest.raises(ValueError, match=match):
        generate_anchors(**arguments)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_decode_inverts_encode(dtype):
    generator = torch.Generator().manual_seed(0)
    anchors = generate_anchors((128, 192), dtype=dtype)
    corners = torch.rand(len(anchors), 2, 2, generator=generator, dtype=dtype) * 190
    boxes = torch.cat([corners.amin(1), corners.amax(1) + 1], 1)
    decoded = decode_boxes(encode_boxes(boxes, anchors), anchors)
    # rounding, and the 1e-8 that keeps logarithms finite times the largest ratio to an anchor (9)
    atol = 200 * 16 * torch.finfo(dtype).eps + 2e-7
    torch.testing.assert_close(decoded, boxes, rtol=0, atol=atol)


def test_decode_by_hand():
    # an anchor of 20 × 10 around (30, 45): centre shifted by a tenth, height doubled
    anchors = torch.tensor([[20.0, 40.0, 40.0, 50.0]])
    regression = torch.tensor([[0.1, -0.1, torch.tensor(2.0).log(), 0.0]])
    torch.testing.assert_close(
        decode_boxes(regression, anchors), torch.tensor([[12.0, 39.0, 52.0, 49.0]])
    )


def test_half_precision_is_decoded_in_float32():
    anchors = generate_anchors((64, 64))
    regression = torch.full((len(anchors), 4), 12.0, dtype=torch.float16)  # exp(12) > 65504
    decoded = decode_boxes(regression, anchors)
    assert decoded.dtype == torch.float32
    assert decoded.isfinite().all()


def test_encode_of_an_empty_box_is_finite():
    anchors = generate_anchors((64, 64))
    assert encode_boxes(torch.zeros(1, 4), anchors).isfinite().all()
