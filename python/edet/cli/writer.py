"""Writes what ``edet predict`` finds as it comes: one JSON array, or parts of one; drawings."""

from __future__ import annotations

import json
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from fractions import Fraction
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

from torch import Tensor

from ..detection import video
from ..detection.draw import draw_detections
from ..detection.results import Detections
from .parts import Parts

if TYPE_CHECKING:
    from PIL.Image import Image


class Writer:
    """Draws and saves annotated images, in a thread that is never more than a few images behind.

    Entries go nowhere: see :class:`ArrayWriter` and :class:`PartWriter`.
    """

    def __init__(self, font: Path | None) -> None:
        self._font = font
        self._drawer = ThreadPoolExecutor(1, "edet-draw")
        self._drawing: deque[Future[None]] = deque()

    @contextmanager
    def open(self) -> Iterator[None]:
        """What is drawn inside is written when it ends, also by an exception."""
        try:
            yield
        finally:
            self._drawer.shutdown()
            self.wait()

    def entry(self, **values: Any) -> None:
        """Writes what was found in an image or a frame."""

    def done(self, path: Path, error: Exception | None = None) -> None:
        """Says that there is no more of a file, perhaps since it could not be read."""

    def draw(self, pixels: Tensor, objects: Detections, save: Callable[[Image], None]) -> None:
        """Draws the objects and saves the drawing, in the background."""
        self.later(lambda: save(draw_detections(pixels, objects, font=self._font)))

    def later(self, job: Callable[[], None]) -> None:
        """Does ``job`` in the background, after what is to be done there already."""
        self.wait(4)
        self._drawing.append(self._drawer.submit(job))

    def wait(self, most: int = 0) -> None:
        """Waits until no more than ``most`` drawings are to be done.

        Raises:
            OSError: a drawing could not be written.
        """
        while len(self._drawing) > most:
            self._drawing.popleft().result()


def as_text(values: dict[str, Any]) -> str:
    """An entry as a line of JSON."""
    return json.dumps(values, allow_nan=False)


class ArrayWriter(Writer):
    """Writes entries as they come, as one array."""

    def __init__(self, stream: IO[str], font: Path | None) -> None:
        super().__init__(font)
        self._stream = stream
        self._entries = 0

    @contextmanager
    def open(self) -> Iterator[None]:
        """The array ends when the block does, also by an exception."""
        self._stream.write("[")
        with super().open():
            yield
        self._stream.write("\n]\n")

    def entry(self, **values: Any) -> None:
        """Appends an entry to the array."""
        self._stream.write((",\n" if self._entries else "\n") + as_text(values))
        self._entries += 1


#: Entries of one file that are held back until it is done, or there are more.
_HELD = 1000


class PartWriter(Writer):
    """Writes the entries of one file after the other to a part, each with its drawings saved."""

    def __init__(self, parts: Parts, font: Path | None) -> None:
        super().__init__(font)
        self._parts = parts
        self._lines: list[str] = []

    def entry(self, **values: Any) -> None:
        """Holds an entry back until drawings of the files before are saved."""
        self._lines.append(as_text(values))
        if len(self._lines) == _HELD:
            self.wait()
            self._parts.write(self._lines)
            self._lines = []

    def done(self, path: Path, error: Exception | None = None) -> None:
        """Writes the file's entries and that it is done, once its drawings are saved."""
        lines, self._lines = self._lines, []
        before = list(self._drawing)

        def write() -> None:
            for drawing in before:
                drawing.result()  # what could not be saved is not done
            self._parts.write(lines)
            self._parts.write_done(path, error)

        self.later(write)


class CopyFailed(Exception):
    """Ends the writing of a copy, of which nothing is left then."""


class VideoCopy:
    """The annotated copy of a video. What its encoder refuses ends the copy alone.

    Attributes:
        error: why there is no copy.
    """

    def __init__(self, path: Path, reader: video.VideoReader) -> None:
        self.error: video.VideoError | None = None
        self._writer = video.VideoWriter(path, reader.rate, reader.time_base)

    def write(self, picture: Image, time: Fraction) -> None:
        """Appends a frame."""
        try:
            if self.error is None:
                self._writer.write(picture, time)
        except video.VideoError as error:
            self.error = error

    def __enter__(self) -> VideoCopy:
        return self

    def __exit__(self, kind: Any, error: Any, trace: Any) -> None:
        try:
            self._writer.__exit__(CopyFailed if self.error else kind, error, trace)
        except video.VideoError as late:
            self.error = self.error or late
        if self.error is not None and kind is None:
            raise CopyFailed
