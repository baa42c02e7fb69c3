"""Frames of video files, read and written with PyAV (extra ``video``)."""

from __future__ import annotations

import os
from collections.abc import Iterator
from fractions import Fraction
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any

import numpy as np

from ..extras import require

if TYPE_CHECKING:
    from PIL.Image import Image

#: Suffixes of files that are taken for videos.
SUFFIXES = (".avi", ".m4v", ".mkv", ".mov", ".mp4", ".mpeg", ".mpg", ".ts", ".webm", ".wmv")


class VideoError(ValueError):
    """A video that cannot be read."""


class VideoReader:
    """The frames of a video file, upright (H, W, 3) uint8 RGB, decoded as they are asked for.

    Args:
        path: the file.

    Attributes:
        path: the file.
        frames: how many there are as the file says; None when it does not.
        rate: frames per second.

    Raises:
        VideoError: not a video, or one without frames.
        OSError: the file does not exist or cannot be read.
        ImportError: PyAV is not installed.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        av = require("av", "video")
        self.path = Path(path)
        with self.path.open("rb"):  # an error of the file system has its usual name
            pass
        self._errors = av.error.FFmpegError
        try:
            self._container: Any = av.open(os.fspath(path))
        except self._errors as error:
            raise VideoError(f"{path} is not a video that can be read: {error.strerror}") from error
        if not self._container.streams.video:
            self._container.close()
            raise VideoError(f"{path} has no video in it")
        stream = self._container.streams.video[0]
        stream.thread_type = "AUTO"
        self.frames: int | None = stream.frames or None
        self.rate = Fraction(stream.average_rate or 25)

    def __iter__(self) -> Iterator[np.ndarray[Any, Any]]:
        """The frames, once.

        Raises:
            VideoError: a frame cannot be decoded, or there is none.
        """
        count = 0
        with self._container:
            try:
                for frame in self._container.decode(video=0):
                    quarters = round(getattr(frame, "rotation", 0) / 90)  # since PyAV 14
                    yield np.rot90(frame.to_ndarray(format="rgb24"), quarters)
                    count += 1
            except self._errors as error:
                raise VideoError(
                    f"{self.path} cannot be decoded after frame {count}: {error.strerror}"
                ) from error
        if count == 0:
            raise VideoError(f"{self.path} has no frames")


class VideoWriter:
    """Writes images as an H.264 video (MPEG-4 where PyAV lacks the encoder).

    Args:
        path: the file; its suffix says the container.
        rate: frames per second.
    """

    def __init__(self, path: str | os.PathLike[str], rate: Fraction) -> None:
        self._av = require("av", "video")
        self._container = self._av.open(os.fspath(path), "w")
        encoder = "libx264" if "libx264" in self._av.codec.codecs_available else "mpeg4"
        self._stream = self._container.add_stream(encoder, rate=rate)
        self._stream.pix_fmt = "yuv420p"
        self._begun = False

    def write(self, image: Image) -> None:
        """Appends an image; an odd last row or column is cut off, which the format cannot hold.

        One of another size than the first is scaled to it.
        """
        even = max(2, image.width // 2 * 2), max(2, image.height // 2 * 2)
        if not self._begun:
            self._stream.width, self._stream.height = even
            self._begun = True
        frame = self._av.VideoFrame.from_image(image.crop((0, 0, *even)))
        self._container.mux(self._stream.encode(frame))

    def __enter__(self) -> VideoWriter:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if kind is None and self._begun:
            self._container.mux(self._stream.encode())  # what the encoder still holds
        self._container.close()
