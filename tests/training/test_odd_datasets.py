"""Data sets as they are met: nothing in them is left out or turned round without a word."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import drawn_shapes
from edet.training.datasets import open_dataset
from edet.training.formats import DatasetError


def coco(root: Path, change: Callable[[dict[str, Any]], Any]) -> Path:
    file = drawn_shapes.write_coco(root)
    content = json.loads(file.read_text())
    change(content)
    file.write_text(json.dumps(content))
    return file


@pytest.mark.parametrize(
    ("value", "crowd"), [("0", False), ("false", False), (None, False), ("1", True), (True, True)]
)
def test_a_crowd_however_it_is_written(tmp_path: Path, value: Any, crowd: bool) -> None:
    file = coco(tmp_path, lambda c: c["annotations"][0].update(iscrowd=value))
    assert bool(open_dataset(file)[0].crowd[0]) is crowd


def test_a_first_image_that_is_missing_or_has_a_whole_path(tmp_path: Path) -> None:
    """The folder of all others is found all the same."""
    file = coco(tmp_path / "a", lambda c: c["images"][0].update(file_name="none.png"))
    dataset = open_dataset(file, bad="skip")
    assert len(dataset) == 5
    assert len(dataset.report.problems) == 1
    place = str(tmp_path / "b" / "train" / "000.png")
    file = coco(tmp_path / "b", lambda c: c["images"][0].update(file_name=place))
    assert len(open_dataset(file)) == 6


def test_names_written_as_on_windows(tmp_path: Path) -> None:
    def change(content: dict[str, Any]) -> None:
        for image in content["images"]:
            image["file_name"] = "train\\" + image["file_name"]

    expected = open_dataset(coco(tmp_path / "a", lambda _: None))
    assert open_dataset(coco(tmp_path / "a", change)).paths == expected.paths
    file = drawn_shapes.write_yolo(tmp_path / "b")
    (tmp_path / "b" / "list.txt").write_bytes(b"\xef\xbb\xbfimages\\train\\000.png\r\n")
    file.write_text(file.read_text().replace("images/train", "list.txt"))
    assert open_dataset(file).paths == [tmp_path / "b" / "images" / "train" / "000.png"]
    drawn_shapes.write_voc(tmp_path / "c")
    annotation = tmp_path / "c" / "Annotations" / "000.xml"
    annotation.write_text(annotation.read_text().replace("000.png", "C:\\data\\000"))
    assert len(open_dataset(tmp_path / "c")) == 6


def as_corners(content: dict[str, Any]) -> None:
    for a in content["annotations"]:
        x, y, width, height = a["bbox"]
        a["bbox"] = [x + 1, y + 1, x + width, y + height]


def test_corners_in_the_place_of_sizes(tmp_path: Path) -> None:
    file = coco(tmp_path / "a", as_corners)
    with pytest.raises(DatasetError, match=r"would fit as x1, y1, x2, y2; boxes must be x, y, wid"):
        open_dataset(file)
    file = drawn_shapes.write_yolo(tmp_path / "b")
    labels = sorted((tmp_path / "b" / "labels" / "train").iterdir())
    for path in labels:
        path.write_text("0 0.5 0.6 0.8 0.9\n1 0.4 0.3 0.9 0.7\n")
    with pytest.raises(DatasetError, match="boxes must be x, y of the centre, width, height"):
        open_dataset(file)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda c: c["annotations"][0].update(area="large"), "area must be a number, got 'large'"),
        (lambda c: c["annotations"][0].update(bbox=[1, 1, 10**400, 9]), "four finite numbers"),
        (lambda c: c["annotations"][0].update(iscrowd="maybe"), "has iscrowd 'maybe': it must be"),
        (lambda c: c["categories"][0].update(name=None), "has a category without a name"),
    ],
)
def test_bad_values_in_coco(tmp_path: Path, change: Any, message: str) -> None:
    with pytest.raises(DatasetError, match=message):
        open_dataset(coco(tmp_path, change))


def test_json_nested_without_end(tmp_path: Path) -> None:
    (tmp_path / "instances_train.json").write_bytes(b"[" * 200_000)
    with pytest.raises(DatasetError, match="is not JSON"):
        open_dataset(tmp_path / "instances_train.json")


def test_names_of_classes_that_are_words_of_yaml(tmp_path: Path) -> None:
    """They were called True, False and 8."""
    file = drawn_shapes.write_yolo(tmp_path)
    text = file.read_text().partition("names:")[0]
    for names in ("[yes, no, 010]", "{'0': yes, '1': no, '2': 010}"):
        file.write_text(f"{text}nc: '3'\nnames: {names}\n")
        assert open_dataset(file).class_names == ["yes", "no", "010"]


def test_label_files_of_windows(tmp_path: Path) -> None:
    file = drawn_shapes.write_yolo(tmp_path)
    expected = open_dataset(file).report.boxes
    for path in (tmp_path / "labels" / "train").iterdir():
        path.with_suffix(".TXT").write_bytes(b"\xef\xbb\xbf" + path.read_bytes())
        path.unlink()
    assert open_dataset(file).report.boxes == expected


def test_a_split_without_label_files(tmp_path: Path) -> None:
    file = drawn_shapes.write_yolo(tmp_path)
    (tmp_path / "labels").rename(tmp_path / "annotations")
    with pytest.raises(DatasetError, match=r"no image of 'train' has a label file, such as .*000"):
        open_dataset(file)


@pytest.mark.parametrize("word", ["nan", "inf", "2"])
def test_classes_that_are_none(tmp_path: Path, word: str) -> None:
    file = drawn_shapes.write_yolo(tmp_path)
    (tmp_path / "labels" / "train" / "000.txt").write_text(f"{word} .5 .5 .2 .2\n")
    with pytest.raises(DatasetError, match=rf"000.txt:1 has class {word}, outside of the 2 names"):
        open_dataset(file)


def test_label_files_in_another_encoding(tmp_path: Path) -> None:
    file = drawn_shapes.write_yolo(tmp_path)
    (tmp_path / "labels" / "train" / "000.txt").write_text("0 .5 .5 .2 .2\n", encoding="utf-16")
    with pytest.raises(DatasetError, match=r"000\.txt must be text in UTF-8"):
        open_dataset(file)


def test_what_macos_puts_beside_files(tmp_path: Path) -> None:
    yolo = drawn_shapes.write_yolo(tmp_path / "a")
    (tmp_path / "a" / "images" / "train" / "._000.png").write_bytes(b"\0\5\x16\7")
    drawn_shapes.write_voc(tmp_path / "b")
    (tmp_path / "b" / "Annotations" / "._000.xml").write_bytes(b"\0\5\x16\7")
    assert len(open_dataset(yolo)) == len(open_dataset(tmp_path / "b")) == 6


def voc(root: Path, old: str, new: str) -> Path:
    drawn_shapes.write_voc(root)
    file = root / "Annotations" / "000.xml"
    assert old in file.read_text()
    file.write_text(file.read_text().replace(old, new))
    return root


def test_difficult_however_it_is_written(tmp_path: Path) -> None:
    root = voc(tmp_path, "<difficult>1</difficult>", "<difficult>True</difficult>")
    assert open_dataset(root)[0].difficult.tolist()[0] is True


def test_annotations_in_a_namespace(tmp_path: Path) -> None:
    """All of their objects were left out."""
    expected = open_dataset(voc(tmp_path / "a", "x", "x")).report.boxes
    root = voc(tmp_path / "b", "<annotation>", '<annotation xmlns="urn:voc">')
    assert open_dataset(root).report.boxes == expected


@pytest.mark.parametrize(
    ("new", "message"),
    [
        ("<size><width>128</width><height>128</height></size>", "its annotations say 128×128"),
        ("<object><name/><bndbox/></object>", "has objects without a name"),
    ],
)
def test_bad_values_in_voc(tmp_path: Path, new: str, message: str) -> None:
    """Boxes of an image that was resized since were taken for those of the file."""
    root = voc(tmp_path, "</annotation>", f"{new}</annotation>")
    with pytest.raises(DatasetError, match=message):
        open_dataset(root)
