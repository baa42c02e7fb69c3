"""Data sets of three formats are the same one; what is wrong with one is said in a sentence."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

import drawn_shapes
from edet.training.datasets import Dataset, open_dataset
from edet.training.formats import DatasetError


def test_the_formats_agree(tmp_path: Path) -> None:
    coco = open_dataset(drawn_shapes.write_coco(tmp_path / "coco").parent)
    yolo = open_dataset(drawn_shapes.write_yolo(tmp_path / "yolo").parent)
    voc = open_dataset(drawn_shapes.write_voc(tmp_path / "voc"))
    assert coco.category_ids == [3, 7]
    assert coco.label_of == {3: 1, 7: 2}
    assert coco.ids == [10, 20, 30, 40, 50, 60]
    assert [d.report.format for d in (coco, yolo, voc)] == ["COCO", "YOLO", "VOC"]
    for dataset in (coco, yolo, voc):
        assert dataset.class_names == ["disc", "square"]
        assert len(dataset) == 6
        assert dataset.report.empty == 1
        for i in range(6):
            found, expected = dataset[i], coco[i]
            assert torch.equal(found.image, expected.image)
            torch.testing.assert_close(found.boxes, expected.boxes, rtol=0, atol=1e-3)
            assert found.boxes.dtype == torch.float32
            assert torch.equal(found.labels, expected.labels)
            assert tuple(found.image.shape[1:]) == tuple(dataset.sizes[i])
    shapes = drawn_shapes.draw(tmp_path / "again")
    (x1, y1, x2, y2), label = shapes[0].shapes[0]
    assert coco[0].boxes[0].tolist() == [x1, y1, x2 + 1, y2 + 1]
    assert coco[0].labels[0] == label + 1
    assert coco[1].boxes.shape == (0, 4)
    assert voc[0].difficult.tolist() == [True] + [False] * (len(voc[0].boxes) - 1)
    truth = coco.truth(0)
    side = x2 + 1 - x1
    assert truth.boxes[0].tolist() == [x1, y1, side, side]
    assert truth.areas[0] == pytest.approx(0.8 * side * side)


def changed(root: Path, change: Callable[[dict[str, Any]], Any]) -> Path:
    """A COCO data set with something done to its annotations."""
    file = drawn_shapes.write_coco(root)
    content = json.loads(file.read_text())
    change(content)
    file.write_text(json.dumps(content))
    return file


def test_clipped_dropped_and_crowds_are_counted(tmp_path: Path) -> None:
    def change(content: dict[str, Any]) -> None:
        template = content["annotations"][0]
        boxes = ([-5, -5, 20, 20], [3, 3, 0, 9], [500, 0, 10, 10], [1, 1, 30, 30])
        for i, box in enumerate(boxes):
            crowd = int(i == 3)
            content["annotations"].append(template | {"id": 90 + i, "bbox": box, "iscrowd": crowd})

    dataset = open_dataset(changed(tmp_path, change))
    report = dataset.report
    assert report.clipped == 1
    assert report.dropped == {"without width or height": 1, "outside of their image": 1}
    assert report.crowds == 1
    sample = dataset[0]
    assert sample.boxes[-2].tolist() == [0, 0, 15, 15]
    assert sample.crowd.tolist() == [False] * (len(sample.boxes) - 1) + [True]
    truth = dataset.truth(0)
    assert len(truth.boxes) == len(sample.boxes) + 2
    assert truth.boxes[-4].tolist() == [-5, -5, 20, 20]
    for text in ("1 boxes clipped", "1 boxes dropped, outside", "1 crowd", "1 images without"):
        assert text in str(report)


def _set(where: str, key: str, value: Any) -> Callable[[dict[str, Any]], None]:
    def change(content: dict[str, Any]) -> None:
        content[where][0][key] = value

    return change


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (_set("annotations", "category_id", 5), "annotation 1 of .* has category_id 5, which is"),
        (_set("annotations", "image_id", 5), "has image_id 5, which is no image of the file"),
        (_set("annotations", "bbox", [1, 2, 3]), "bbox must be four finite numbers, got"),
        (_set("annotations", "bbox", [1, float("nan"), 3, 4]), r"finite numbers, got \[1, nan"),
        (_set("images", "id", 20), "image id 20 is there twice"),
        (_set("categories", "id", 7), "category id 7 is there twice"),
        (_set("categories", "name", "square"), "category name 'square' is there twice"),
        (_set("annotations", "id", 2), "annotation id 2 is there twice"),
        (_set("images", "height", 63), "is 64×64|×64 upright, its annotations say"),
        (_set("images", "file_name", "no.png"), r"no\.png: the image is missing"),
        (_set("images", "file_name", "001.png"), r"names the image .*001\.png twice"),
        (lambda c: c.pop("categories"), "is not a COCO annotation file: it lacks categories"),
        (lambda c: c["annotations"][0].pop("bbox"), "an entry lacks 'bbox'"),
        (lambda c: c.update(images=[], annotations=[]), "has no images"),
        (lambda c: c.update(categories=[], annotations=[]), "has no categories"),
        (
            lambda c: [a.update(bbox=[0.1, 0.1, 0.5, 0.5]) for a in c["annotations"]],
            "boxes must be in pixels: multiply them by the image's width and height",
        ),
    ],
)
def test_bad_coco(tmp_path: Path, change: Callable[[dict[str, Any]], Any], message: str) -> None:
    with pytest.raises(DatasetError, match=message):
        open_dataset(changed(tmp_path, change))


def test_broken_files_are_refused_or_skipped(tmp_path: Path) -> None:
    file = drawn_shapes.write_coco(tmp_path)
    (tmp_path / "train/000.png").write_bytes(b"no image")
    with Image.open(tmp_path / "train/002.png") as image:
        image.save(tmp_path / "train/002.png", "JPEG")  # whose header is read without the rest
    whole = (tmp_path / "train/002.png").read_bytes()
    (tmp_path / "train/002.png").write_bytes(whole[:-40])
    with pytest.raises(DatasetError, match=r"1 files .*bad=\"skip\".*000\.png: not an image"):
        open_dataset(file)
    with pytest.raises(DatasetError, match=r"2 files .*002\.png cannot be decoded"):
        open_dataset(file, check="decode")
    dataset = open_dataset(file, bad="skip", check="decode")
    assert dataset.ids == [20, 40, 50, 60]
    assert [Path(place).name for place, _ in dataset.report.problems] == ["000.png", "002.png"]
    assert "2 left out" in str(dataset.report)
    shutil.rmtree(tmp_path / "train")
    with pytest.raises(DatasetError, match="has no image that can be used"):
        open_dataset(file, bad="skip")


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("2 .5 .5 .1 .1", r"txt:1 has class 2, outside of the 2 names \(0 to 1\)"),
        ("-1 .5 .5 .1 .1", "has class -1, outside"),
        ("0 .5 .5 .1", "must be 'class x y width height', or a class and a polygon"),
        ("disc .5 .5 .1 .1", "must be 'class x y width height'"),
        ("0 32 32 10 10", "these look like pixels, divide them by"),
        ("0 nan .5 .1 .1", "the box is not finite"),
    ],
)
def test_bad_yolo(tmp_path: Path, line: str, message: str) -> None:
    file = drawn_shapes.write_yolo(tmp_path)
    (tmp_path / "labels/train/000.txt").write_text(line + "\n")
    with pytest.raises(DatasetError, match=message):
        open_dataset(file)


def test_yolo_polygons_lists_and_strange_files(tmp_path: Path) -> None:
    file = drawn_shapes.write_yolo(tmp_path)
    (tmp_path / "labels/train/000.txt").write_text("1 .25 .25 .75 .25 .5 .75\n")
    (tmp_path / "labels/train/gone.txt").write_text("1 .25 .25 .1 .1\n")
    with pytest.raises(DatasetError, match=r"gone\.txt: a label file without its image"):
        open_dataset(file)
    sample = open_dataset(file, bad="skip")[0]
    height, width = sample.image.shape[1:]
    expected = torch.tensor([[0.25 * width, 0.25 * height, 0.75 * width, 0.75 * height]])
    torch.testing.assert_close(sample.boxes, expected)
    (tmp_path / "few.txt").write_text("images/train/000.png\nimages/train/003.png\n")
    for text, message in (
        ("train: few.txt\nnames: [disc, square]\n", None),
        ("train: few.txt\nnames: [disc, disc]\n", "class name 'disc' is there twice"),
        ("train: few.txt\nnc: 3\nnames: [disc, square]\n", "says nc: 3 but names 2"),
        ("train: few.txt\n", "must list the classes under 'names'"),
        ("val: few.txt\nnames: [disc, square]\n", "has no 'train'; it has val"),
        ("train: nowhere\nnames: [disc, square]\n", "train is nowhere, which does not exist"),
        ("train: [\n", "is not YAML"),
    ):
        file.write_text(text)
        if message is None:
            assert len(open_dataset(file, bad="skip")) == 2
        else:
            with pytest.raises(DatasetError, match=message):
                open_dataset(file, bad="skip")


def test_bad_voc(tmp_path: Path) -> None:
    root = drawn_shapes.write_voc(tmp_path)
    with pytest.raises(DatasetError, match="has no split 'val'; it has train"):
        open_dataset(root, "val")
    with pytest.raises(DatasetError, match="class 'disc', which is none of the 1 names"):
        open_dataset(root, class_names=["square"])
    swapped = open_dataset(root, class_names=["square", "disc"])
    assert swapped.class_names == ["square", "disc"]
    (root / "Annotations/000.xml").write_text("<annotation>")
    with pytest.raises(DatasetError, match=r"000\.xml is not XML"):
        open_dataset(root)
    (root / "Annotations/000.xml").unlink()
    with pytest.raises(DatasetError, match="the annotations of an image are missing"):
        open_dataset(root)


def test_wrong_paths_and_options(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="does not exist"):
        open_dataset(tmp_path / "nowhere")
    with pytest.raises(DatasetError, match=r"expected a COCO file \(instances_train\.json\), a da"):
        open_dataset(tmp_path)
    (tmp_path / "broken.json").write_text("{")
    with pytest.raises(DatasetError, match=r"broken\.json is not JSON"):
        open_dataset(tmp_path / "broken.json")
    (tmp_path / "notes.txt").write_text("")
    with pytest.raises(DatasetError, match=r"notes\.txt must be a \.json"):
        open_dataset(tmp_path / "notes.txt")
    file = drawn_shapes.write_coco(tmp_path)
    with pytest.raises(ValueError, match="bad must be one of refuse, skip, got 'maybe'"):
        open_dataset(file, bad="maybe")
    with pytest.raises(DatasetError, match="must have the classes cat in this order, got disc, s"):
        open_dataset(file, class_names=["cat"])


def test_turned_photographs(tmp_path: Path) -> None:
    file = drawn_shapes.write_yolo(tmp_path)
    path = tmp_path / "images/train/000.png"
    image = Image.open(path).resize((80, 40))
    exif = image.getexif()
    exif[0x0112] = 6  # a quarter turn
    image.save(path, exif=exif)
    dataset = open_dataset(file)
    assert tuple(dataset.sizes[0]) == (80, 40) == tuple(dataset[0].image.shape[1:])


def test_a_file_that_changes_is_noticed(tmp_path: Path) -> None:
    dataset: Dataset = open_dataset(drawn_shapes.write_coco(tmp_path))
    Image.new("RGB", (9, 9)).save(tmp_path / "train/000.png")
    with pytest.raises(ValueError, match="has changed since the data set was opened"):
        dataset[0]
    with pytest.raises(IndexError):
        dataset[6]
    assert np.array_equal(dataset[-1].labels, dataset[5].labels)
