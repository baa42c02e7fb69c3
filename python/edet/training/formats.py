"""Readers of annotation formats: COCO's JSON, YOLO's ``data.yaml`` and label files, Pascal VOC."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path, PureWindowsPath
from typing import Any, NamedTuple
from xml.etree import ElementTree

from ..extras import require

#: Suffixes of image files that are looked for in folders.
IMAGE_SUFFIXES = (".bmp", ".jpeg", ".jpg", ".png", ".tif", ".tiff", ".webp")


class DatasetError(ValueError):
    """A data set that cannot be used; the message says which file and what to do."""


class RawObject(NamedTuple):
    """An object as its file has it.

    Attributes:
        box: x1, y1, x2, y2 in pixels, or as fractions of the image (:attr:`Annotations.fractions`).
        label: from 1.
        area: of COCO's segment in pixels, which its evaluation sorts by; None: the box's.
        crowd: COCO's ``iscrowd``.
        difficult: VOC's.
        source: where it stands, for messages.
    """

    box: tuple[float, float, float, float]
    label: int
    area: float | None
    crowd: bool
    difficult: bool
    source: str


class RawImage(NamedTuple):
    """An image file, its id, the (height, width) its annotations name (or None), its objects."""

    path: Path
    image_id: int | str
    size: tuple[int, int] | None
    objects: list[RawObject]


@dataclass
class Annotations:
    """What a reader found.

    Attributes:
        format: ``COCO``, ``YOLO`` or ``VOC``.
        images: all of them, also those without objects.
        class_names: of labels 1, 2, …
        category_ids: the file's own id of labels 1, 2, …
        fractions: boxes are fractions of width and height.
        problems: what can be left out: file or place, and why.
    """

    format: str
    images: list[RawImage]
    class_names: list[str]
    category_ids: list[int]
    fractions: bool = False
    problems: list[tuple[str, str]] = field(default_factory=list)


def _unique(values: Iterable[Any], what: str, path: Path) -> None:
    seen: set[Any] = set()
    for value in values:
        if value in seen:
            raise DatasetError(
                f"{path}: {what} {value!r} is there twice; every {what} must be unique"
            )
        seen.add(value)


_YES, _NO = ("1", "true", "yes"), ("", "0", "false", "no", "none")


def _flag(value: Any, what: str, source: str) -> bool:
    """A flag, however it is written."""
    word = str(value).strip().lower()
    if word in _YES or word in _NO:
        return word in _YES
    raise DatasetError(f"{source} has {what} {value!r}: it must be 0 or 1")


def _existing(folder: Path, name: str) -> Path:
    """The file of a name, which may be written as on Windows."""
    path = folder / name
    if "\\" in name and not path.exists():
        return folder / PureWindowsPath(name).as_posix()
    return path


def _is_apples(path: Path) -> bool:
    """Whether a file is none of the data set's but what macOS puts beside one."""
    return path.name.startswith("._")


def _text(path: Path) -> str:
    """The content of a text file; a byte-order mark is no part of it."""
    try:
        return path.read_bytes().decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise DatasetError(f"{path} must be text in UTF-8: {error}") from error


# --- COCO -----------------------------------------------------------------------------------------


def _coco_content(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_bytes())
    except (ValueError, RecursionError) as error:
        raise DatasetError(f"{path} is not JSON: {error}") from error
    keys = ("images", "annotations", "categories")
    lacking = [k for k in keys if not isinstance(content, dict) or k not in content]
    if lacking:
        raise DatasetError(
            f"{path} is not a COCO annotation file: it lacks {', '.join(lacking)} "
            "(a JSON object with the lists images, annotations and categories is required)"
        )
    bad = [k for k in keys if not isinstance(content[k], list)]
    if bad:
        raise DatasetError(f"{path}: {bad[0]} must be a list, got {type(content[bad[0]]).__name__}")
    return content


def _coco_folder(path: Path, names: Sequence[str]) -> Path:
    """The folder that the file names of a COCO file start from: where the first image is."""
    stem = path.stem.split("_")[-1]  # instances_train2017 → train2017
    near = [path.parent, path.parent.parent]
    tried = [
        folder / inner
        for folder in near
        for inner in ("", stem, "images", f"images/{stem}", f"{stem}/images")
    ]
    tried += sorted(p for p in path.parent.iterdir() if p.is_dir())
    for name in names[:100]:  # the first ones may be missing, or have names that need no folder
        for folder in tried:
            if not Path(name).is_absolute() and _existing(folder, name).is_file():
                return folder
    return path.parent


def read_coco(path: Path, images: Path | None = None) -> Annotations:
    """COCO's instance annotations; labels are the category ids in order, without their gaps.

    Args:
        images: folder of the images; looked for beside the file when None.

    Raises:
        DatasetError: another kind of file, or ids that clash or name nothing.
    """
    content = _coco_content(path)
    try:
        return _coco_annotations(path, content, images)
    except (KeyError, TypeError, AttributeError) as error:
        raise DatasetError(
            f"{path} is not a COCO annotation file: an entry lacks {error}"
            if isinstance(error, KeyError)
            else f"{path} is not a COCO annotation file: {error}"
        ) from error


def _coco_annotations(path: Path, content: dict[str, Any], images: Path | None) -> Annotations:
    categories = sorted(content["categories"], key=lambda c: c["id"])
    if not categories:
        raise DatasetError(f"{path} has no categories: list the classes under categories")
    _unique((c["id"] for c in categories), "category id", path)
    _unique((c["name"] for c in categories), "category name", path)
    if any(c["name"] in (None, "") for c in categories):
        raise DatasetError(f"{path} has a category without a name")
    _unique((im["id"] for im in content["images"]), "image id", path)
    _unique((a["id"] for a in content["annotations"] if "id" in a), "annotation id", path)
    labels = {c["id"]: i for i, c in enumerate(categories, 1)}
    objects: dict[Any, list[RawObject]] = {im["id"]: [] for im in content["images"]}
    result = Annotations("COCO", [], [str(c["name"]) for c in categories], list(labels))
    for i, entry in enumerate(content["annotations"]):
        source = f"annotation {entry.get('id', i)} of {path}"
        if entry["image_id"] not in objects:
            raise DatasetError(
                f"{source} has image_id {entry['image_id']!r}, which is no image of the file"
            )
        if entry["category_id"] not in labels:
            raise DatasetError(
                f"{source} has category_id {entry['category_id']!r}, which is none of the "
                f"{len(labels)} categories of the file"
            )
        box = entry["bbox"]
        if not (isinstance(box, list) and len(box) == 4) or not _numbers(box):
            result.problems.append((source, f"bbox must be four finite numbers, got {box}"))
            continue
        x, y, width, height = (float(v) for v in box)
        area = entry.get("area")
        if area is not None and not _numbers([area]):
            result.problems.append((source, f"area must be a number, got {area!r}"))
            continue
        objects[entry["image_id"]].append(
            RawObject(
                (x, y, x + width, y + height),
                labels[entry["category_id"]],
                None if area is None else float(area),
                _flag(entry.get("iscrowd", 0), "iscrowd", source),
                False,
                source,
            )
        )
    names = [str(im["file_name"]) for im in content["images"]]
    folder = images or _coco_folder(path, names)
    for name, entry in zip(names, content["images"], strict=True):
        size = (entry["height"], entry["width"]) if entry.get("height") else None
        result.images.append(
            RawImage(_existing(folder, name), entry["id"], size, objects[entry["id"]])
        )
    return result


def _numbers(values: Sequence[Any]) -> bool:
    largest = 1e30  # whole numbers in JSON may be too large for a float
    return all(isinstance(v, int | float) and abs(v) < largest for v in values)


# --- YOLO -----------------------------------------------------------------------------------------


def _yolo_names(path: Path, content: Any) -> list[str]:
    """The names, of a content in which every value is a word as it is written."""
    names = content.get("names") if isinstance(content, Mapping) else None
    if isinstance(names, Mapping) and set(names) == set(map(str, range(len(names)))):
        names = [names[str(i)] for i in range(len(names))]
    if not isinstance(names, list) or not names:
        raise DatasetError(
            f"{path} must list the classes under 'names' (a list, or a mapping from 0, 1, …), "
            f"got {names!r}"
        )
    count = content.get("nc", len(names))
    if count not in (len(names), str(len(names))):
        raise DatasetError(f"{path} says nc: {count} but names {len(names)} classes")
    _unique(map(str, names), "class name", path)
    return [str(name) for name in names]


def _yolo_images(path: Path, content: Mapping[str, Any], split: str) -> list[Path]:
    if split == "val" and "val" not in content and "valid" in content:
        split = "valid"
    entries = content.get(split)
    if not entries:
        known = [k for k in ("train", "val", "valid", "test") if content.get(k)]
        raise DatasetError(f"{path} has no {split!r}; it has {', '.join(known) or 'no split'}")
    root = Path(content.get("path") or ".")
    found: list[Path] = []
    for entry in entries if isinstance(entries, list) else [entries]:
        # relative to the file's folder; Roboflow writes ../train/images and means ./train/images
        folders = (path.parent / root, path.parent, path.parent, root)
        names = (entry, entry, str(entry).removeprefix("../"), entry)
        tries = [_existing(x, str(name)) for x, name in zip(folders, names, strict=True)]
        place = next((p for p in tries if p.exists()), None)
        if place is None:
            raise DatasetError(f"{path}: {split} is {entry}, which does not exist ({tries[0]})")
        if place.is_dir():
            inside = place.rglob("*")
            images = (p for p in inside if p.suffix.lower() in IMAGE_SUFFIXES)
            found += sorted(p for p in images if not _is_apples(p))
        else:
            lines = _text(place).split("\n")
            found += [_existing(place.parent, line.strip()) for line in lines if line.strip()]
    return found


def _yolo_label_file(image: Path) -> Path:
    """``…/labels/….txt`` for ``…/images/….jpg``; beside the image where there is no such folder."""
    parts = list(image.with_suffix(".txt").parts)
    if "images" in parts[:-1]:
        last = len(parts) - 2 - parts[-2::-1].index("images")
        parts[last] = "labels"
    return Path(*parts)


def _yolo_line(line: str, source: str, classes: int) -> RawObject:
    words = line.split()
    try:
        numbers = [float(word) for word in words]
    except ValueError:
        numbers = []
    if len(numbers) != 5 and not (len(numbers) >= 7 and len(numbers) % 2):
        raise DatasetError(
            f"{source} must be 'class x y width height', or a class and a polygon, got {line!r}"
        )
    index, values = numbers[0], numbers[1:]
    if index not in range(classes):  # nor is NaN
        raise DatasetError(
            f"{source} has class {words[0]}, outside of the {classes} names (0 to {classes - 1}): "
            "add the name, or correct the label"
        )
    if len(values) == 4:
        x, y, width, height = values
        box = x - width / 2, y - height / 2, x + width / 2, y + height / 2
    else:
        box = min(values[::2]), min(values[1::2]), max(values[::2]), max(values[1::2])
    if max(map(abs, values)) > 1.5:
        raise DatasetError(
            f"{source} must hold fractions of the image's width and height, 0 to 1, got "
            f"{line!r}: these look like pixels, divide them by the image's width and height"
        )
    return RawObject(box, int(index) + 1, None, False, False, source)


def read_yolo(path: Path, split: str) -> Annotations:
    """The images of a ``data.yaml``'s split and their label files; an image without one is empty.

    Raises:
        DatasetError: no such split, a class without a name, boxes that are no fractions.
    """
    yaml = require("yaml", "train")
    try:
        text = _text(path)
        content = yaml.safe_load(text)
        # the names as they are written: to YAML no, ~ and 010 are False, nothing and 8
        names = _yolo_names(path, yaml.load(text, Loader=yaml.BaseLoader))
    except (yaml.YAMLError, RecursionError) as error:
        raise DatasetError(f"{path} is not YAML: {error}") from error
    result = Annotations("YOLO", [], names, list(range(len(names))), fractions=True)
    images = _yolo_images(path, content, split)
    _unique(images, "image", path)
    folders: dict[Path, set[Path]] = {}  # of labels: those of the images
    labelled = False
    for image in images:
        file = _yolo_label_file(image)
        if not file.is_file() and file.with_suffix(".TXT").is_file():
            file = file.with_suffix(".TXT")
        folders.setdefault(file.parent, set()).add(image.parent)
        objects = []
        if file.is_file():
            labelled = True
            for number, line in enumerate(_text(file).splitlines(), 1):
                if line.strip():
                    source = f"{file}:{number}"
                    raw = _yolo_line(line, source, len(names))
                    if _numbers(raw.box):
                        objects.append(raw)
                    else:
                        result.problems.append((source, f"the box is not finite: {line!r}"))
        result.images.append(RawImage(image, str(image), None, objects))
    if images and not labelled:
        example = _yolo_label_file(images[0])
        raise DatasetError(
            f"{path}: no image of {split!r} has a label file, such as {example}; "
            "an empty one says that an image has no objects"
        )
    for folder, places in folders.items():
        if "labels" not in folder.parts:
            continue
        # images of another split may lie beside those of this one
        stems = {p.stem for place in places if place.is_dir() for p in place.iterdir()}
        result.problems += [
            (str(p), "a label file without its image")
            for p in sorted(folder.glob("*.txt"))
            if p.name not in ("classes.txt", "train.txt") and p.stem not in stems
        ]
    return result


# --- Pascal VOC -----------------------------------------------------------------------------------


def _voc_object(element: ElementTree.Element, labels: Mapping[str, int], path: Path) -> RawObject:
    name = (element.findtext("name") or "").strip()
    if name not in labels:
        raise DatasetError(
            f"{path} has an object of class {name!r}, which is none of the {len(labels)} names: "
            "add the name, or correct the file"
        )
    place = element.find("bndbox")
    try:
        if place is None:
            raise ValueError("no bndbox")
        x1, y1, x2, y2 = (float(place.findtext(k) or "") for k in ("xmin", "ymin", "xmax", "ymax"))
    except ValueError as error:
        raise DatasetError(f"{path}: the box of a {name} cannot be read: {error}") from error
    # VOC counts pixels from 1 and its last pixel is inside
    box = x1 - 1, y1 - 1, x2, y2
    difficult = _flag(element.findtext("difficult") or "0", "difficult", f"a {name} in {path}")
    return RawObject(box, labels[name], None, False, difficult, f"a {name} in {path}")


def _voc_trees(files: Sequence[Path]) -> dict[str, ElementTree.Element]:
    trees = {}
    for file in files:
        try:
            root = ElementTree.parse(file).getroot()
        except ElementTree.ParseError as error:
            raise DatasetError(f"{file} is not XML: {error}") from error
        for element in root.iter():  # without a namespace
            element.tag = str(element.tag).rpartition("}")[2]
        if root.tag != "annotation":
            raise DatasetError(f"{file} must hold an annotation of VOC, got {root.tag}")
        trees[file.stem] = root
    return trees


def _voc_size(tree: ElementTree.Element) -> tuple[int, int] | None:
    """(height, width) that the annotations are of, where they say so."""
    try:
        height, width = (int(float(tree.findtext(f"size/{k}") or 0)) for k in ("height", "width"))
    except ValueError:
        return None
    return (height, width) if height > 0 and width > 0 else None


def _voc_image(tree: ElementTree.Element, stem: str, places: Sequence[Path]) -> Path | None:
    """The image file; its name may be a path of another system, or lack its suffix."""
    name = PureWindowsPath((tree.findtext("filename") or f"{stem}.jpg").strip()).name
    suffixes = ("",) if Path(name).suffix.lower() in IMAGE_SUFFIXES else ("", *IMAGE_SUFFIXES)
    files = (place / f"{name}{suffix}" for place in places for suffix in suffixes)
    return next((file for file in files if file.is_file()), None)


def read_voc(folder: Path, split: str, class_names: Sequence[str] | None = None) -> Annotations:
    """A folder with ``Annotations``, ``JPEGImages`` and ``ImageSets/Main``, or one of XML files.

    Args:
        split: the list in ``ImageSets/Main``; every file where there is no such folder.
        class_names: of labels 1, 2, …; the names in all files, sorted, when None.

    Raises:
        DatasetError: a file that is not VOC's, a class without a name, no such split.
    """
    inside = (folder / "Annotations").is_dir()
    annotations = folder / "Annotations" if inside else folder
    files = sorted(p for p in annotations.glob("*.xml") if not _is_apples(p))
    trees = _voc_trees(files)
    found = {(o.findtext("name") or "").strip() for t in trees.values() for o in t.iter("object")}
    names = list(class_names) if class_names is not None else sorted(found)
    if "" in names:
        raise DatasetError(f"{annotations} has objects without a name")
    labels = {name: i for i, name in enumerate(names, 1)}
    lists = folder / "ImageSets" / "Main"
    stems = list(trees)
    if lists.is_dir():
        file = lists / f"{split}.txt"
        if not file.is_file():
            known = ", ".join(sorted(p.stem for p in lists.glob("*.txt"))) or "none"
            raise DatasetError(f"{lists} has no split {split!r}; it has {known}")
        stems = [line.split()[0] for line in _text(file).splitlines() if line.strip()]
    result = Annotations("VOC", [], names, list(range(1, len(names) + 1)))
    for stem in stems:
        path = annotations / f"{stem}.xml"
        if stem not in trees:
            result.problems.append((str(path), "the annotations of an image are missing"))
            continue
        tree = trees[stem]
        places = [folder / "JPEGImages", folder / "images", annotations]
        image = _voc_image(tree, stem, places)
        if image is None:
            name = (tree.findtext("filename") or f"{stem}.jpg").strip()
            image = places[0 if inside else 2] / name
        objects = [_voc_object(o, labels, path) for o in tree.iter("object")]
        for raw in [o for o in objects if not _numbers(o.box)]:
            objects.remove(raw)
            result.problems.append((raw.source, f"the box is not finite: {raw.box}"))
        result.images.append(RawImage(image, stem, _voc_size(tree), objects))
    return result
