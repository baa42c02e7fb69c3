"""Where 'edet predict' writes: names of annotated copies, and that no input is overwritten."""

from __future__ import annotations

import os
import unicodedata
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

from ..detection import video
from .common import check_target

#: Suffixes of images whose copies are of the same format; those of others are PNG.
KEPT = (".jpg", ".jpeg", ".png", ".webp")

#: The longest file name, in bytes, that Linux file systems take.
LONGEST = 255


def is_video(path: Path) -> bool:
    """Whether the file is taken for a video."""
    return path.suffix.lower() in video.SUFFIXES


def _folded(name: str) -> str:
    """The same for names that are one on file systems that ignore case or composition."""
    return unicodedata.normalize("NFC", name).casefold()


def _named(stem: str, end: str) -> str:
    """``stem`` and ``end``, the stem cut to what makes a file name."""
    while len(os.fsencode(stem + end)) > LONGEST:
        stem = stem[:-1]
    return stem + end


def annotated_names(files: Sequence[Path], folder: Path) -> dict[Path, Path]:
    """Where the annotated copy of each file goes; files of one name get numbers."""
    names: dict[Path, Path] = {}
    taken: set[str] = set()
    for path in files:
        suffix = path.suffix if path.suffix.lower() in KEPT else ".png"
        suffix = ".mp4" if is_video(path) else suffix
        name, number = _named(path.stem, suffix), 2
        while _folded(name) in taken:
            name, number = _named(path.stem, f"-{number}{suffix}"), number + 1
        taken.add(_folded(name))
        names[path] = folder / name
    return names


def _identity(path: Path) -> tuple[int, int] | None:
    """The file that ``path`` leads to, by whatever name; None when there is none."""
    try:
        found = path.stat()
    except OSError:
        return None
    return found.st_dev, found.st_ino


def check_targets(
    inputs: Iterable[Path], copies: Mapping[Path, Path], json_file: Path | None
) -> None:
    """Checks, before anything is done, that all that is written can be, and is lost by none of it.

    Args:
        inputs: files that must stay as they are.
        copies: original to annotated copy.
        json_file: the file of detections.

    Raises:
        ValueError: a target is an input, by this name or another, or is a target twice, or cannot
            be written.
    """
    kept = {identity: path for path in inputs if (identity := _identity(path)) is not None}
    targets = [("--output", copy) for copy in copies.values()]
    if json_file is not None:
        targets.append(("--json", json_file))
    written: dict[str, Path] = {}
    for option, target in targets:
        identity = _identity(target)
        if identity in kept:
            raise ValueError(
                f"{option}: {target} is the input {kept[identity]}, which would be replaced"
            )
        place = os.path.realpath(target)  # two links may lead to one file
        key = str(identity) if identity is not None else _folded(place)
        if key in written and (identity is None or os.path.isfile(place)):
            raise ValueError(f"{option}: {target} would replace {written[key]}")
        written[key] = target
        if identity is not None or option == "--json":  # the folder of copies may not exist yet
            check_target(target, option)
