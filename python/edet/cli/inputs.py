"""Which files 'edet predict' reads: those that files, folders and patterns name."""

from __future__ import annotations

import glob
from collections.abc import Sequence
from pathlib import Path

from ..detection import video
from ..extras import require
from .targets import is_video


def _waits(path: Path) -> bool:
    """Whether reading it may wait for ever; such a file has to be named."""
    return path.is_fifo() or path.is_char_device()


def find_files(arguments: Sequence[str]) -> list[Path]:
    """The image and video files that files, folders and patterns name, in order, each once.

    Raises:
        ValueError: an argument names nothing.
    """
    suffixes = (*require("PIL.Image", "image").registered_extensions(), *video.SUFFIXES)
    found: dict[Path, None] = {}
    for argument in arguments:
        path = Path(argument)
        if path.is_dir():
            inside = sorted(
                p for p in path.iterdir() if p.suffix.lower() in suffixes and not _waits(p)
            )
            if not inside:
                raise ValueError(
                    f"the folder {argument} holds no images or videos (.jpg, .png, .mp4, ...)"
                )
            found.update(dict.fromkeys(inside))
        elif path.exists():
            found[path] = None
        else:
            matches = sorted(Path(p) for p in glob.glob(argument, recursive=True))
            matches = [p for p in matches if p.is_file()]
            if not matches:
                pattern = glob.has_magic(argument)
                raise ValueError(
                    f"no file matches {argument}" if pattern else f"{argument} does not exist"
                )
            found.update(dict.fromkeys(matches))
    if any(map(is_video, found)):
        require("av", "video")
    return list(found)
