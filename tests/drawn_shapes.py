"""Small data sets of drawn rectangles and discs, on disk in COCO's, YOLO's and VOC's format."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any, NamedTuple

from PIL import Image, ImageDraw

#: Class names, and COCO category ids with a gap.
NAMES, IDS = ("disc", "square"), (3, 7)


class Shape(NamedTuple):
    """A shape: x1, y1, x2, y2 in pixels (the last inside), and its class from 0."""

    box: tuple[int, int, int, int]
    label: int


class Picture(NamedTuple):
    """An image's file, its size and its shapes."""

    path: Path
    width: int
    height: int
    shapes: list[Shape]


def draw(folder: Path, count: int = 6, side: int = 64, seed: int = 0) -> list[Picture]:
    """Pictures of one to three shapes; the second has none."""
    numbers = random.Random(seed)
    folder.mkdir(parents=True, exist_ok=True)
    pictures = []
    for i in range(count):
        width, height = side + 8 * numbers.randrange(3), side
        image = Image.new("RGB", (width, height), (numbers.randrange(60),) * 3)
        pen = ImageDraw.Draw(image)
        shapes = []
        for _ in range(0 if i == 1 else numbers.randint(1, 3)):
            size = numbers.randint(side // 4, side // 2)
            x, y = numbers.randrange(width - size), numbers.randrange(height - size)
            label = numbers.randrange(2)
            box = (x, y, x + size - 1, y + size - 1)
            kind = (pen.ellipse, pen.rectangle)[label]
            kind(box, fill=((230, 60, 60), (80, 80, 240))[label])
            shapes.append(Shape(box, label))
        path = folder / f"{i:03}.png"
        image.save(path)
        pictures.append(Picture(path, width, height, shapes))
    return pictures


def coco(pictures: list[Picture]) -> dict[str, Any]:
    """COCO's annotations of the pictures; their ids are 10, 20, …"""
    annotations = []
    for number, picture in enumerate(pictures, 1):
        for (x1, y1, x2, y2), label in picture.shapes:
            box = [x1, y1, x2 + 1 - x1, y2 + 1 - y1]
            entry = {"image_id": 10 * number, "category_id": IDS[label], "bbox": box}
            entry |= {"area": 0.8 * box[2] * box[3], "iscrowd": 0, "id": len(annotations) + 1}
            annotations.append(entry)
    return {
        "images": [
            {"id": 10 * n, "file_name": p.path.name, "width": p.width, "height": p.height}
            for n, p in enumerate(pictures, 1)
        ],
        "annotations": annotations,
        "categories": [{"id": i, "name": n} for i, n in zip(IDS, NAMES, strict=True)],
    }


def write_coco(root: Path, split: str = "train", **options: Any) -> Path:
    """Draws a split; ``root`` gets ``instances_<split>.json`` beside the folder ``<split>``."""
    pictures = draw(root / split, **options)
    file = root / f"instances_{split}.json"
    file.write_text(json.dumps(coco(pictures)))
    return file


def write_yolo(root: Path, split: str = "train", **options: Any) -> Path:
    """As :func:`write_coco` with a ``data.yaml`` and label files; gives the ``data.yaml``."""
    pictures = draw(root / "images" / split, **options)
    labels = root / "labels" / split
    labels.mkdir(parents=True)
    for picture in pictures:
        lines = [
            f"{label} {(x1 + x2 + 1) / 2 / picture.width:.6f} "
            f"{(y1 + y2 + 1) / 2 / picture.height:.6f} "
            f"{(x2 + 1 - x1) / picture.width:.6f} {(y2 + 1 - y1) / picture.height:.6f}"
            for (x1, y1, x2, y2), label in picture.shapes
        ]
        if lines:
            (labels / f"{picture.path.stem}.txt").write_text("\n".join(lines) + "\n")
    file = root / "data.yaml"
    file.write_text(f"path: .\n{split}: images/{split}\nnames:\n  0: disc\n  1: square\n")
    return file


def write_voc(root: Path, split: str = "train", **options: Any) -> Path:
    """As :func:`write_coco` in VOC's folders; every first object of an image is difficult."""
    pictures = draw(root / "JPEGImages", **options)
    (root / "Annotations").mkdir()
    lists = root / "ImageSets" / "Main"
    lists.mkdir(parents=True)
    for picture in pictures:
        objects = "".join(
            f"<object><name>{NAMES[label]}</name><difficult>{int(i == 0)}</difficult><bndbox>"
            f"<xmin>{x1 + 1}</xmin><ymin>{y1 + 1}</ymin><xmax>{x2 + 1}</xmax><ymax>{y2 + 1}</ymax>"
            "</bndbox></object>"
            for i, ((x1, y1, x2, y2), label) in enumerate(picture.shapes)
        )
        text = f"<annotation><filename>{picture.path.name}</filename>{objects}</annotation>"
        (root / "Annotations" / f"{picture.path.stem}.xml").write_text(text)
    (lists / f"{split}.txt").write_text("\n".join(p.path.stem for p in pictures) + "\n")
    return root
