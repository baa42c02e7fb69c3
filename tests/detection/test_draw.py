"""Drawing: boxes where they belong, at any size, in colours that differ."""

import warnings
from pathlib import Path

import numpy as np
import pytest
import torch

from edet.detection.draw import (
    MissingGlyphWarning,
    colour,
    draw_detections,
    missing_glyphs,
    text_colour,
)
from edet.detection.results import Detections


def one_box(box, size, label=1):
    return Detections(torch.tensor([box]), torch.tensor([0.9]), torch.tensor([label]), size)


def test_box_is_drawn_around_the_object():
    image = np.full((400, 600, 3), 128, np.uint8)
    before = image.copy()
    drawn = np.asarray(draw_detections(image, one_box([100.0, 150, 300, 250], (400, 600))))
    assert drawn.shape == image.shape
    assert np.array_equal(image, before)
    for y, x in [(200, 100), (200, 300), (150, 200), (250, 200)]:
        assert tuple(drawn[y, x]) == colour(1)
    assert (drawn[170:230, 120:280] == 128).all()  # nothing inside
    assert (drawn[125:150, 100:200] != 128).any()  # the name above
    assert (drawn[260:] == 128).all()


def test_name_stays_inside_the_image():
    image = np.full((400, 600, 3), 128, np.uint8)
    drawn = np.asarray(draw_detections(image, one_box([590.0, 0, 600, 400], (400, 600))))
    tag = (drawn[:30] == colour(1)).all(-1).any(0).nonzero()[0]
    assert tag.min() < 540  # moved left, to be read whole


def test_boxes_outside_and_without_objects():
    image = np.full((400, 600, 3), 128, np.uint8)
    wild = one_box([-1e9, float("-inf"), 1e9, float("inf")], (400, 600))
    assert draw_detections(image, wild).size == (600, 400)
    nothing = wild.filter(1.0)
    assert np.array_equal(np.asarray(draw_detections(image, nothing)), image)


@pytest.mark.parametrize("size", [(1, 1), (1, 10_000), (17, 30), (1200, 1600)])
def test_any_size(size):
    image = torch.zeros(3, *size, dtype=torch.uint8)
    drawn = draw_detections(image, one_box([0.0, 0, size[1], size[0]], size))
    enlarged = max(1, -(-320 // max(size)))
    assert drawn.size == (size[1] * enlarged, size[0] * enlarged)


def test_boxes_follow_an_image_of_another_size():
    image = np.full((800, 1200, 3), 128, np.uint8)
    drawn = np.asarray(draw_detections(image, one_box([100.0, 150, 300, 250], (400, 600))))
    assert tuple(drawn[400, 200]) == tuple(drawn[400, 600]) == colour(1)


def test_near_colours_are_told_apart():
    colours = [colour(label) for label in range(1, 91)]
    assert len(set(colours)) == 90
    distances = [
        sum((a - b) ** 2 for a, b in zip(colours[i], colours[j], strict=True)) ** 0.5
        for i in range(90)
        for j in range(i)
    ]
    assert min(distances) > 12


def test_text_contrasts():
    assert text_colour((255, 255, 0)) == (0, 0, 0)
    assert text_colour((0, 0, 120)) == (255, 255, 255)


@pytest.fixture
def dejavu():
    """A font that has Cyrillic, Greek and Arabic letters and no Chinese ones."""
    matplotlib = pytest.importorskip("matplotlib")
    return Path(matplotlib.get_data_path()) / "fonts" / "ttf" / "DejaVuSans.ttf"


def named(name):
    box = torch.tensor([[100.0, 150, 300, 250]])
    return Detections(box, torch.tensor([0.9]), torch.tensor([1]), (400, 600), {1: name})


def tag(drawn):
    """What is written above the box."""
    return np.asarray(drawn)[120:150]


GREY = np.full((400, 600, 3), 128, np.uint8)


def test_characters_without_a_glyph(dejavu):
    assert missing_glyphs(["cat", "dog 2"]) == ""
    assert missing_glyphs(["猫", "кот", "cat"]) == "кот猫"
    assert missing_glyphs(["猫", "кот", "قط", "ζώο", "café"], dejavu) == "猫"
    assert missing_glyphs(["zero width\u200d", "non\u00a0breaking", "tab\t", ""], dejavu) == ""


def test_names_are_drawn_in_the_font_that_is_given(dejavu):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        cat, whale = (draw_detections(GREY, named(n), font=dejavu) for n in ("кот", "кит"))
        assert not np.array_equal(tag(cat), tag(whale))  # boxes instead of letters would be alike
        again = named("кот").draw(GREY, font=str(dejavu))
        assert np.array_equal(np.asarray(cat), np.asarray(again))
        assert not np.array_equal(tag(draw_detections(GREY, named("cat"))), tag(cat))


def test_names_that_cannot_be_shown_are_told(dejavu):
    with pytest.warns(MissingGlyphWarning, match=r"built-in font has no glyphs for 'кот'.*font="):
        draw_detections(GREY, named("кот"))
    with pytest.warns(MissingGlyphWarning, match=r"DejaVuSans\.ttf has no glyphs for '猫'"):
        draw_detections(GREY, named("猫 cat"), font=dejavu)


@pytest.mark.parametrize("content", [b"", b"junk" * 50])
def test_what_is_no_font(tmp_path, content):
    (tmp_path / "font.ttf").write_bytes(content)
    with pytest.raises(ValueError, match=r"font must be a scalable .*, got .*font\.ttf"):
        draw_detections(GREY, named("cat"), font=tmp_path / "font.ttf")
    with pytest.raises(FileNotFoundError, match=r"none\.ttf"):
        draw_detections(GREY, named("cat"), font=tmp_path / "none.ttf")


def test_draw_method(tmp_path):
    image = np.full((400, 600, 3), 128, np.uint8)
    found = one_box([100.0, 150, 300, 250], (400, 600))
    assert np.array_equal(np.asarray(found.draw(image)), np.asarray(draw_detections(image, found)))
