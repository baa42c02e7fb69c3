"""Annotated images on disk as one data set, whatever their format, and what was found in them."""

from __future__ import annotations

import os
import warnings
from collections import Counter
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from ..detection.images import ImageError, load_image
from ..extras import require
from .formats import (
    IMAGE_SUFFIXES,
    Annotations,
    DatasetError,
    RawImage,
    RawObject,
    read_coco,
    read_voc,
    read_yolo,
)

_LISTED = 5  # problems in a message
_ROTATED = (5, 6, 7, 8)  # values of EXIF's orientation that exchange width and height


class Sample(NamedTuple):
    """An image and its N objects.

    Attributes:
        image: (3, H, W) uint8, upright RGB.
        boxes: (N, 4) float32 x1, y1, x2, y2 in pixels, inside the image, of positive size.
        labels: (N,) int64 from 1.
        crowd: (N,) bool, a region with many objects of the class (COCO).
        difficult: (N,) bool (VOC).
        image_id: as in the annotations.
        path: of the image's file.
    """

    image: Tensor
    boxes: Tensor
    labels: Tensor
    crowd: Tensor
    difficult: Tensor
    image_id: int | str
    path: Path


class Truth(NamedTuple):
    """The objects of an image as the file has them, for evaluation: nothing clipped or dropped.

    Attributes:
        boxes: (N, 4) float64 x, y, width, height in pixels.
        areas: (N,) float64 in pixels.
        labels: (N,) int64 from 1.
        crowd: (N,) bool; VOC's difficult objects too, which are not counted either.
    """

    boxes: np.ndarray[Any, Any]
    areas: np.ndarray[Any, Any]
    labels: np.ndarray[Any, Any]
    crowd: np.ndarray[Any, Any]


@dataclass
class Report:
    """What was found when a data set was opened.

    Attributes:
        format, source: of the annotations.
        images, boxes, crowds, difficult: numbers of those kept.
        per_class: boxes of each class.
        clipped: boxes that reached out of their image.
        dropped: number of boxes left out of training for each reason.
        empty: images without boxes.
        problems: what was left out or is in doubt: file or place, and why.
    """

    format: str
    source: str
    images: int = 0
    boxes: int = 0
    crowds: int = 0
    difficult: int = 0
    per_class: dict[str, int] = field(default_factory=dict)
    clipped: int = 0
    dropped: dict[str, int] = field(default_factory=dict)
    empty: int = 0
    problems: list[tuple[str, str]] = field(default_factory=list)

    def __str__(self) -> str:
        classes = sum(count > 0 for count in self.per_class.values())
        lines = [
            f"{self.source} ({self.format}): {self.images} images, {self.boxes} boxes, "
            f"{classes} of {len(self.per_class)} classes",
        ]
        most = sorted(self.per_class.items(), key=lambda item: -item[1])[:8]
        lines.append("  " + ", ".join(f"{name} {count}" for name, count in most))
        counts = {
            "images without boxes": self.empty,
            "crowd regions": self.crowds,
            "difficult": self.difficult,
            "boxes clipped to their image": self.clipped,
            **{f"boxes dropped, {why}": n for why, n in self.dropped.items()},
        }
        lines += [f"  {count} {what}" for what, count in counts.items() if count]
        if self.problems:
            lines.append(f"  {len(self.problems)} left out:")
            lines += [f"    {line}" for line in _listed(self.problems)]
        return "\n".join(lines)


def _listed(problems: Sequence[tuple[str, str]]) -> list[str]:
    lines = [f"{place}: {why}" for place, why in problems[:_LISTED]]
    more = len(problems) - _LISTED
    return [*lines, f"and {more} more"] if more > 0 else lines


class Dataset(torch.utils.data.Dataset[Sample]):
    """Images with boxes, of which each is read when it is asked for; :func:`open_dataset` makes it.

    Annotations are arrays, so that worker processes share them.

    Attributes:
        class_names: of labels 1, 2, …
        category_ids: the annotations' own id of labels 1, 2, …
        label_of: that id to the label.
        paths, ids: file and id of each image.
        sizes: (N, 2) int64 height and width of each image, upright.
        report: what was found when it was opened.
        skips_broken: training goes on with the next image where a file was broken since.
    """

    skips_broken = False

    def __init__(
        self,
        images: Sequence[RawImage],
        sizes: Sequence[tuple[int, int]],
        class_names: Sequence[str],
        category_ids: Sequence[int],
        report: Report,
    ) -> None:
        self.class_names = list(class_names)
        self.category_ids = list(category_ids)
        self.label_of = {category: i for i, category in enumerate(category_ids, 1)}
        self.paths = [image.path for image in images]
        self.ids: list[int | str] = [image.image_id for image in images]
        self.sizes = np.array(sizes, dtype=np.int64).reshape(-1, 2)
        self.report = report
        objects = [o for image in images for o in image.objects]
        counts = [len(image.objects) for image in images]
        self._starts = np.cumsum([0, *counts])
        self._raw = np.array([o.box for o in objects], dtype=np.float64).reshape(-1, 4)
        self._labels = np.array([o.label for o in objects], dtype=np.int64)
        self._crowd: np.ndarray[Any, Any] = np.array([o.crowd for o in objects], dtype=bool)
        difficult = [o.difficult for o in objects]
        self._difficult: np.ndarray[Any, Any] = np.array(difficult, dtype=bool)
        sides = self._raw[:, 2:] - self._raw[:, :2]
        self._areas = np.array([np.nan if o.area is None else o.area for o in objects])
        self._areas = np.where(np.isnan(self._areas), sides.prod(1), self._areas)
        self._clip(np.repeat(self.sizes, counts, 0), sides)
        self._count(counts)

    def _clip(self, sizes: np.ndarray[Any, Any], sides: np.ndarray[Any, Any]) -> None:
        limits = sizes[:, [1, 0, 1, 0]].astype(np.float64)
        self._boxes = np.clip(self._raw, 0, limits).astype(np.float32)
        empty = (sides <= 0).any(1)
        outside = ~empty & (self._boxes[:, 2:] <= self._boxes[:, :2]).any(1)
        self._kept = np.logical_not(np.logical_or(empty, outside))
        # label files in text are rounded: a hundredth of a pixel beyond the edge is none
        beyond = (np.abs(self._raw - np.clip(self._raw, 0, limits)) > 0.01).any(1)
        self.report.clipped = int((beyond & self._kept).sum())
        reasons = {"without width or height": empty, "outside of their image": outside}
        self.report.dropped = {why: int(m.sum()) for why, m in reasons.items() if m.any()}

    def _count(self, counts: Sequence[int]) -> None:
        kept, report = self._kept, self.report
        report.images, report.boxes = len(self.paths), int(kept.sum())
        report.crowds = int((self._crowd & kept).sum())
        report.difficult = int((self._difficult & kept).sum())
        found = np.bincount(self._labels[kept], minlength=len(self.class_names) + 1)[1:]
        report.per_class = dict(zip(self.class_names, found.tolist(), strict=True))
        owners = np.repeat(np.arange(len(counts)), counts)[kept]
        report.empty = len(self.paths) - len(np.unique(owners))

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, index: int) -> Sample:
        """The image and its objects.

        Raises:
            ImageError, OSError: the file cannot be read any more.
        """
        if not -len(self) <= index < len(self):
            raise IndexError(f"index must be below {len(self)}, got {index}")
        index %= len(self)
        image = load_image(self.paths[index])
        if image.dtype != torch.uint8:
            image = (image * 255).round().to(torch.uint8)
        size = (image.shape[1], image.shape[2])
        if size != tuple(self.sizes[index]):
            raise ImageError(f"{self.paths[index]} has changed since the data set was opened")
        rows = slice(self._starts[index], self._starts[index + 1])
        kept = self._kept[rows]
        boxes, labels, crowd, difficult = (
            torch.from_numpy(values[rows][kept])
            for values in (self._boxes, self._labels, self._crowd, self._difficult)
        )
        path = self.paths[index]
        return Sample(image, boxes, labels, crowd, difficult, self.ids[index], path)

    def truth(self, index: int) -> Truth:
        """The objects of an image as they stand in the file."""
        rows = slice(self._starts[index], self._starts[index + 1])
        boxes = self._raw[rows].copy()
        boxes[:, 2:] -= boxes[:, :2]
        crowd = np.logical_or(self._crowd[rows], self._difficult[rows])
        return Truth(boxes, self._areas[rows], self._labels[rows], crowd)

    def __repr__(self) -> str:
        return f"<Dataset {self.report}>"


# --- opening --------------------------------------------------------------------------------------


def _header(path: Path) -> tuple[int, int] | str:
    """(height, width) of an image file, upright, or why it cannot be used."""
    pil = require("PIL.Image", "image")
    if not path.is_file():
        return "the image is missing"
    try:
        # of images with enormous pixel counts, on which the decoder says more
        with warnings.catch_warnings(), pil.open(path) as image:
            warnings.simplefilter("ignore")
            width, height = image.size
            rotated = image.getexif().get(0x0112) in _ROTATED
    except Exception as error:  # decoders raise OSError, SyntaxError, struct.error, EOFError, …
        return f"not an image that can be read ({type(error).__name__})"
    return (width, height) if rotated else (height, width)


def _decoded(path: Path) -> tuple[int, int] | str:
    """As :func:`_header`, of the whole file decoded."""
    found = _header(path)
    if not isinstance(found, str):
        try:
            load_image(path)
        except (OSError, ValueError) as error:
            return str(error)
    return found


def _in_pixels(raw: RawObject, size: tuple[int, int]) -> RawObject:
    height, width = size
    x1, y1, x2, y2 = raw.box
    return raw._replace(box=(x1 * width, y1 * height, x2 * width, y2 * height))


def _check_pixels(found: Annotations, source: Path) -> None:
    """Refuses boxes of 0 … 1 where pixels are meant."""
    boxes = [o.box for image in found.images for o in image.objects]
    if boxes and not found.fractions and max(map(max, boxes)) <= 1.0:
        raise DatasetError(
            f"{source}: no box has a coordinate above 1, so they look like fractions of the image; "
            "boxes must be in pixels: multiply them by the image's width and height"
        )


def _check_corners(
    found: Annotations, images: Sequence[RawImage], sizes: Sequence[Any], source: Path
) -> None:
    """Refuses boxes of two corners where width and height are meant, by how they would fit."""
    if found.format == "VOC":
        return
    boxes = np.array([o.box for image in images for o in image.objects]).reshape(-1, 4)
    counts = [len(image.objects) for image in images]
    ends = np.repeat(np.array(sizes).reshape(-1, 2)[:, ::-1], counts, 0)
    first, last = boxes[:, :2], boxes[:, 2:]
    beyond = ((first < -1) | (last > ends + 1)).any(1)
    sides = last - first
    start = (first + last) / 2 if found.fractions else first  # YOLO's are centres
    as_corners = ((sides > start) & (sides <= ends + 1) & (start >= 0)).all(1)
    if len(boxes) > 2 and beyond.mean() >= 0.5 and as_corners.all():
        wanted = "x, y of the centre, width, height" if found.fractions else "x, y, width, height"
        raise DatasetError(
            f"{source}: {int(beyond.sum())} of {len(boxes)} boxes reach out of their images, and "
            f"all would fit as x1, y1, x2, y2; boxes must be {wanted}"
        )


def _checked(found: Annotations, source: Path, check: str) -> tuple[list[RawImage], list[Any]]:
    """The images that can be used and their sizes; the rest becomes problems."""
    probe = _decoded if check == "decode" else _header
    with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
        sizes = list(pool.map(probe, [image.path for image in found.images]))
    images: list[RawImage] = []
    kept: list[Any] = []
    for image, size in zip(found.images, sizes, strict=True):
        if isinstance(size, str):
            found.problems.append((str(image.path), size))
            continue
        if image.size is not None and tuple(image.size) != size:
            (height, width), (h, w) = image.size, size
            why = f"is {w}×{h} upright, its annotations say {width}×{height}"
            found.problems.append((str(image.path), why))
            continue
        objects = image.objects
        if found.fractions:
            objects = [_in_pixels(o, size) for o in objects]
        images.append(image._replace(objects=objects))
        kept.append(size)
    return images, kept


def _coco_file(folder: Path, split: str) -> Path | None:
    for place in (folder, folder / "annotations", folder / split):
        files = sorted(place.glob("*.json")) if place.is_dir() else []
        named = [p for p in files if split in p.stem]
        if len(named) > 1:  # person_keypoints_train2017 and captions_train2017 lie beside it
            named = [p for p in named if p.stem.startswith("instances")] or named
        if len(named) > 1:
            listed = ", ".join(p.name for p in named)
            raise DatasetError(f"{place} has {listed}: give the file of the split {split!r}")
        if named:
            return named[0]
        if len(files) == 1 and (place == folder / split or folder.name == split):
            return files[0]
    return None


def _read(path: Path, split: str, images: Path | None, names: Sequence[str] | None) -> Annotations:
    """Annotations of the format that ``path`` has."""
    if path.is_file():
        if path.suffix.lower() in (".yaml", ".yml"):
            return read_yolo(path, split)
        if path.suffix.lower() == ".json":
            return read_coco(path, images)
        raise DatasetError(f"{path} must be a .json (COCO) or .yaml (YOLO) file, or a folder")
    if not path.is_dir():
        raise FileNotFoundError(f"{path} does not exist")
    if any((path / "Annotations").glob("*.xml")) or any(path.glob("*.xml")):
        return read_voc(path, split, names)
    for name in ("data.yaml", "data.yml", "dataset.yaml"):
        if (path / name).is_file():
            return read_yolo(path / name, split)
    file = _coco_file(path, split)
    if file is not None:
        return read_coco(file, images)
    raise DatasetError(
        f"{path} holds no data set with a split {split!r}: expected a COCO file "
        f"(instances_{split}.json), a data.yaml (YOLO), or Annotations/*.xml (VOC)"
    )


def open_dataset(
    path: str | os.PathLike[str],
    split: str = "train",
    *,
    images: str | os.PathLike[str] | None = None,
    class_names: Sequence[str] | None = None,
    bad: str = "refuse",
    check: str = "header",
) -> Dataset:
    """Opens annotated images of COCO's, YOLO's or Pascal VOC's format, found out from the files.

    A COCO ``.json``, a YOLO ``data.yaml``, or a folder with one of them or with VOC's
    ``Annotations``. Boxes are clipped to their images; what has no area then is dropped and counted
    in the :class:`Report`.

    Args:
        path: the file or folder.
        split: which of a folder's or YAML's splits; a COCO file is one already.
        images: folder of a COCO file's images; looked for beside it when None.
        class_names: the names of labels 1, 2, …, which the data set must have (all formats), or in
            which VOC's are sorted; the data set's own when None.
        bad: ``refuse`` images and boxes that cannot be used, or ``skip`` and list them.
        check: ``header`` reads the size of each image, ``decode`` all of it.

    Raises:
        DatasetError (a ValueError): what cannot be used, where, and what to do.
        FileNotFoundError: no such file or folder.
    """
    for name, value, allowed in (
        ("bad", bad, ("refuse", "skip")),
        ("check", check, ("header", "decode")),
    ):
        if value not in allowed:
            raise ValueError(f"{name} must be one of {', '.join(allowed)}, got {value!r}")
    source = Path(path)
    found = _read(source, split, None if images is None else Path(images), class_names)
    if class_names is not None and list(class_names) != found.class_names:
        raise DatasetError(
            f"{source} must have the classes {', '.join(class_names)} in this order, "
            f"got {', '.join(found.class_names)}"
        )
    clashes = [x for x, n in Counter(str(image.path) for image in found.images).items() if n > 1]
    if clashes:
        raise DatasetError(f"{source} names the image {clashes[0]} twice: merge its annotations")
    if not found.images:
        listed = "".join(f"; {line}" for line in _listed(found.problems))
        raise DatasetError(f"{source} has no images ({', '.join(IMAGE_SUFFIXES)}){listed}")
    _check_pixels(found, source)
    usable, sizes = _checked(found, source, check)
    _check_corners(found, usable, sizes, source)
    if found.problems and bad == "refuse":
        listed = "; ".join(_listed(found.problems))
        raise DatasetError(
            f"{source} has {len(found.problems)} files or boxes that cannot be used "
            f'(bad="skip" leaves them out): {listed}'
        )
    if not usable:
        listed = "; ".join(_listed(found.problems))
        raise DatasetError(f"{source} has no image that can be used: {listed}")
    report = Report(found.format, str(source), problems=found.problems)
    dataset = Dataset(usable, sizes, found.class_names, found.category_ids, report)
    dataset.skips_broken = bad == "skip"
    return dataset
