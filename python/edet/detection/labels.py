"""The names of COCO's classes, keyed by the category ids that the published models predict."""

from __future__ import annotations

import codecs
import json
import os
import re
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path

#: Category id (1 … 90, ten of them unused) to name, as in COCO's instance annotations.
COCO_NAMES: dict[int, str] = {
    1: "person",
    2: "bicycle",
    3: "car",
    4: "motorcycle",
    5: "airplane",
    6: "bus",
    7: "train",
    8: "truck",
    9: "boat",
    10: "traffic light",
    11: "fire hydrant",
    13: "stop sign",
    14: "parking meter",
    15: "bench",
    16: "bird",
    17: "cat",
    18: "dog",
    19: "horse",
    20: "sheep",
    21: "cow",
    22: "elephant",
    23: "bear",
    24: "zebra",
    25: "giraffe",
    27: "backpack",
    28: "umbrella",
    31: "handbag",
    32: "tie",
    33: "suitcase",
    34: "frisbee",
    35: "skis",
    36: "snowboard",
    37: "sports ball",
    38: "kite",
    39: "baseball bat",
    40: "baseball glove",
    41: "skateboard",
    42: "surfboard",
    43: "tennis racket",
    44: "bottle",
    46: "wine glass",
    47: "cup",
    48: "fork",
    49: "knife",
    50: "spoon",
    51: "bowl",
    52: "banana",
    53: "apple",
    54: "sandwich",
    55: "orange",
    56: "broccoli",
    57: "carrot",
    58: "hot dog",
    59: "pizza",
    60: "donut",
    61: "cake",
    62: "chair",
    63: "couch",
    64: "potted plant",
    65: "bed",
    67: "dining table",
    70: "toilet",
    72: "tv",
    73: "laptop",
    74: "mouse",
    75: "remote",
    76: "keyboard",
    77: "cell phone",
    78: "microwave",
    79: "oven",
    80: "toaster",
    81: "sink",
    82: "refrigerator",
    84: "book",
    85: "clock",
    86: "vase",
    87: "scissors",
    88: "teddy bear",
    89: "hair drier",
    90: "toothbrush",
}


def label_map(names: Mapping[int, str] | Sequence[str] | None, num_classes: int) -> dict[int, str]:
    """The name of each label of a model with ``num_classes`` classes.

    Args:
        names: label to name; or the names of labels 1, 2, … in order; or None for COCO's when
            ``num_classes`` is 90 and for no names otherwise.
        num_classes: labels run from 1 to this number.

    Raises:
        TypeError: ``names`` is a single string.
        ValueError: a sequence whose length is not ``num_classes``, or a label out of range.
    """
    if names is None:
        return dict(COCO_NAMES) if num_classes == 90 else {}
    if isinstance(names, str):
        raise TypeError(f"class_names must be a list or a mapping, got the string {names!r}")
    if isinstance(names, Mapping):
        strangers = [label for label in names if label not in range(1, num_classes + 1)]
        if strangers:
            raise ValueError(
                f"class_names must name labels 1 to {num_classes}, got {strangers[0]!r}"
            )
        return dict(names)
    if len(names) != num_classes:
        raise ValueError(f"class_names must hold {num_classes} names, got {len(names)}")
    return dict(enumerate(names, start=1))


#: Encodings that a file can say it has, by its first bytes; those that begin alike: longest first.
_MARKS = (
    (codecs.BOM_UTF8, "utf-8-sig"),
    (codecs.BOM_UTF32_LE, "utf-32"),
    (codecs.BOM_UTF32_BE, "utf-32"),
    (codecs.BOM_UTF16_LE, "utf-16"),
    (codecs.BOM_UTF16_BE, "utf-16"),
)

#: The most bytes of a file of class names; more is something else.
_LARGEST = 1 << 24


def read_class_names(path: str | os.PathLike[str], num_classes: int) -> list[str]:
    """The names of classes from a text file, one on each line, in the order of the labels.

    UTF-8, or UTF-16 or UTF-32 with a byte-order mark, as Windows editors write it; lines end as on
    any system. Spaces around a name and empty lines at the end do not count.

    Raises:
        ValueError: not such a file, also JSON, YAML, protobuf or numbered lines, or not of
            ``num_classes`` names; the file is named.
        OSError: it does not exist or cannot be read.
    """
    with Path(path).open("rb") as file:
        data = file.read(_LARGEST + 1)
    if len(data) > _LARGEST:
        raise ValueError(f"{path} must be a text file of class names, got more than 16 MiB")
    encoding = next((name for mark, name in _MARKS if data.startswith(mark)), "utf-8")
    try:
        text = data.decode(encoding)
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        raise ValueError(
            f"{path} must be text in UTF-8, got the byte 0x{data[error.start]:02x} in line {line}: "
            "save it in that encoding"
        ) from error
    if "\0" in text:
        raise ValueError(f"{path} must be text in UTF-8, got a zero byte: save it in that encoding")
    # not splitlines, which also splits at characters that may be part of a name
    # a mark of another file that was put behind
    text = text.replace("\ufeff", "")
    names = [line.strip() for line in text.replace("\r\n", "\n").replace("\r", "\n").split("\n")]
    while names and not names[-1]:
        names.pop()
    other = _other_kind(text, names)
    if other:
        raise ValueError(f"{path} must hold {num_classes} names, one a line, got {other}")
    if len(names) != num_classes:
        raise ValueError(f"{path} must hold {num_classes} names, one a line, got {len(names)}")
    return names


#: A number before a name, marked off from it or not, and behind it. No "1.5 mm" and no "0:30".
_NUMBERED = (r"(\d+)\s*[:,;.)\t]\s*[^\s\d].*", r"(\d+)\s+\S.*", r".*\S\s*[,;\t]\s*(\d+)")


def _are_numbered(lines: Sequence[str]) -> bool:
    """Whether each line holds a number beside a name, from 0 or 1 on; marked off: with gaps."""
    for pattern in _NUMBERED:
        found = [re.fullmatch(pattern, line, re.ASCII) for line in lines]
        numbers = [int(number[1]) for number in found if number]
        if not lines or len(numbers) < len(lines):
            continue
        if numbers[0] in (0, 1) and numbers == list(range(numbers[0], numbers[0] + len(numbers))):
            return True
        if pattern == _NUMBERED[0] and len(numbers) > 1 and numbers == sorted(set(numbers)):
            return True
    return False


def _other_kind(text: str, lines: Sequence[str]) -> str | None:
    """What a file with more than the names is; its lines may be as many by chance."""
    with suppress(ValueError, RecursionError):
        if isinstance(json.loads(text), list | dict):
            return "JSON"
    given = [line for line in lines if line]
    table = bool(given) and re.search("[,;\\t]", given[0]) is not None  # it may have a header
    for rows in (given, given[1:] if table else []):
        if _are_numbered(rows):
            return f"numbered lines ({rows[0]!r})"
    if given and all(line.startswith("- ") for line in given):
        return f"a list in YAML ({given[0]!r})"
    if given and all(re.fullmatch(r"([\"']).*\1,?|.+,", line) for line in given):
        return f"names in quotes or with commas ({given[0]!r})"
    if any(re.fullmatch(r"item\s*\{", line) for line in lines):
        return "a label map in protobuf's text format"
    if any(re.fullmatch(r"names\s*:.*", line) for line in lines):
        return "YAML"
    return None


def label_name(label: int, names: Mapping[int, str]) -> str:
    """The name of ``label``, or ``class <label>`` for a label without one."""
    return names.get(label, f"class {label}")
