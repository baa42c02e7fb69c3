"""Frames of video files, read and written with PyAV (extra ``video``)."""

from __future__ import annotations

import math
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
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


#: The most pixels of a frame, 8192 × 8192; decoders hold many frames at once.
MAX_PIXELS = 1 << 26


class VideoError(ValueError):
    """A video that cannot be read."""


def _too_large(picture: Any) -> str:
    return (
        f"must have frames of at most {MAX_PIXELS:,} pixels (edet.detection.video.MAX_PIXELS), "
        f"got {picture.width} × {picture.height}"
    )


def _address(path: str | os.PathLike[str]) -> str:
    """The file for FFmpeg, to which ``12:30.mp4`` is else an address of the protocol ``12``."""
    return f"file:{os.fspath(path)}"


class Frame(np.ndarray[Any, np.dtype[np.uint8]]):
    """The pixels of a frame, (H, W, 3) uint8 RGB.

    Attributes:
        time: when it is shown, in seconds of the video's own clock; of a view or copy None.
    """

    time: Fraction | None

    def __array_finalize__(self, source: Any) -> None:
        self.time = None


class VideoReader:
    """The frames of a video file, upright (H, W, 3) uint8 RGB, decoded as they are asked for.

    Args:
        path: the file.

    Attributes:
        path: the file.
        frames: how many there are as the file says; None when it does not.
        rate: frames per second; their average where it varies.
        time_base: what the frames' times are whole multiples of, in seconds.

    Raises:
        VideoError: not a video, or one without frames.
        OSError: the file does not exist or cannot be read.
        ImportError: PyAV is not installed.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = Path(path)
        with self._open() as container:
            if not container.streams.video:
                raise VideoError(f"{path} has no video in it")
            stream = container.streams.video[0]
            if stream.width * stream.height > MAX_PIXELS:
                raise VideoError(f"{path} {_too_large(stream)}")
            self.frames: int | None = stream.frames or None
            self.rate = Fraction(stream.average_rate or 25)
            self.time_base = Fraction(stream.time_base or 1 / self.rate)
            self._end = _declared_end(container, self.rate)

    def _open(self) -> Any:
        av = require("av", "video")
        with self.path.open("rb"):  # an error of the file system has its usual name
            pass
        try:
            return av.open(_address(self.path))
        except av.error.FFmpegError as error:
            raise VideoError(
                f"{self.path} is not a video that can be read: {error.strerror}"
            ) from error

    def __iter__(self) -> Iterator[Frame]:
        """The frames from the first one on, each with its time.

        What is damaged is left out, and told at the end.

        Raises:
            VideoError: after the last frame: something could not be decoded, the file was cut off,
                or there is no frame.
        """
        count = 0
        time = end = Fraction(0)
        damage: list[str] = []
        with self._open() as container:
            for frame in _decoded(container, damage):
                if frame.pts is not None:
                    time = frame.pts * Fraction(frame.time_base)
                if frame.width * frame.height > MAX_PIXELS:  # it may change on the way
                    raise VideoError(f"{self.path} {_too_large(frame)}")
                quarters = round(getattr(frame, "rotation", 0) / 90)  # since PyAV 14
                pixels = np.rot90(frame.to_ndarray(format="rgb24"), quarters).view(Frame)
                pixels.time = time
                yield pixels
                lasts = (getattr(frame, "duration", 0) or 0) * Fraction(frame.time_base or 0)
                end = time + max(lasts, 1 / self.rate)
                time += 1 / self.rate  # of a frame without a time of its own
                count += 1
        if damage:
            raise VideoError(
                f"{self.path} is damaged in {len(damage)} places ({damage[0]}), "
                f"what could be read: {count} frames"
            )
        if count == 0:
            raise VideoError(f"{self.path} has no frames")
        if self._end is not None and end + _SLACK + self._end / 50 < self._end:
            raise VideoError(
                f"{self.path} was cut off after {float(end):.1f} of {float(self._end):.1f} s, "
                f"what could be read: {count} frames"
            )


#: Seconds that a file's length may be off, and 2 % of it.
_SLACK = 1


def _declared_end(container: Any, rate: Fraction) -> Fraction | None:
    """When the video ends, in seconds, as a header says that a cut does not change; else None.

    That of MP4 counts frames that an edit list hides, and its reader tells of a cut by itself.
    """
    stream = container.streams.video[0]
    if container.format.name == "avi" and stream.frames:
        return stream.frames / rate
    if "matroska" not in container.format.name:
        return None
    tags = [value for key, value in stream.metadata.items() if key.startswith("DURATION")]
    if tags and (clock := re.fullmatch(r"(\d+):(\d\d):(\d\d(?:\.\d+)?)", tags[0])):
        return int(clock[1]) * 3600 + int(clock[2]) * 60 + Fraction(clock[3])
    alone = len(container.streams) == 1 and container.duration
    return Fraction(container.duration, 10**6) if alone else None


#: Errors in a row after which the rest of a file is given up.
_ERRORS_IN_A_ROW = 1000


def _decoded(container: Any, damage: list[str]) -> Iterator[Any]:
    """The frames of the first video stream; to ``damage`` is added what is wrong with each packet.

    PyAV decodes in threads of slices unless told otherwise. In threads of frames the decoder waits
    for ever on some damaged files while PyAV's logging is on, and errors come late.
    """
    errors = require("av", "video").error.FFmpegError
    packets = container.demux(video=0)
    failed = 0
    while failed < _ERRORS_IN_A_ROW:
        try:
            packet = next(packets, None)
            if packet is None:
                return
            frames = packet.decode()
        except EOFError:  # the decoder was emptied
            return
        except errors as error:
            damage.append(str(error.strerror))
            failed += 1
            packets = container.demux(video=0)  # an error in it ends the old one
        else:
            failed = 0
            if packet.is_corrupt or any(frame.is_corrupt for frame in frames):
                damage.append("Corrupt data")  # what is shown of it is made up by the decoder
            yield from frames


class VideoWriter:
    """Writes images as an H.264 video (MPEG-4 where PyAV lacks the encoder).

    Args:
        path: the file; its suffix says the container.
        rate: frames per second; their average where it varies.
        time_base: what the times given to :meth:`write` were rounded to, such as
            :attr:`VideoReader.time_base`; None when none are given.
    """

    def __init__(
        self, path: str | os.PathLike[str], rate: Fraction, time_base: Fraction | None = None
    ) -> None:
        self._av = require("av", "video")
        self._container = self._av.open(_address(path), "w")
        encoder = "libx264" if "libx264" in self._av.codec.codecs_available else "mpeg4"
        self._stream = self._container.add_stream(encoder, rate=rate)
        self._stream.pix_fmt = "yuv420p"
        self._interval = 1 / rate
        self._rounding = time_base or self._interval
        # a unit that holds the times as they are, and those of a constant rate
        unit = Fraction(1, math.lcm(rate.numerator, self._rounding.denominator))
        if unit.denominator > (65535 if encoder == "mpeg4" else 10**6):  # more is not held
            unit = max(self._rounding, Fraction(1, 60000))
        self._unit = unit if time_base is not None else self._interval
        self._stream.codec_context.time_base = self._unit
        self._count = 0
        self._first = self._time = Fraction(0)
        self._pts = -1

    def write(self, image: Image, time: Fraction | float | None = None) -> None:
        """Appends an image; an odd last row or column is cut off, which the format cannot hold.

        One of another size than the first is scaled to it.

        Args:
            image: the picture.
            time: when it is shown, in seconds, later than the one before; None: one interval of the
                rate after it. Times that a constant rate explains become exact.

        Raises:
            VideoError: the encoder does not take its size, or the container its time.
            OSError: the file cannot be written.
        """
        even = max(2, image.width // 2 * 2), max(2, image.height // 2 * 2)
        if self._count == 0:
            self._stream.width, self._stream.height = even
        frame = self._av.VideoFrame.from_image(image.crop((0, 0, *even)))
        self._time = self._exact(time)
        pts = round(self._time / self._unit)
        self._pts = pts if self._count == 0 else max(pts, self._pts + 1)
        frame.pts, frame.time_base = self._pts, self._unit
        with self._encoding():
            self._container.mux(self._stream.encode(frame))
        self._count += 1

    @contextmanager
    def _encoding(self) -> Iterator[None]:
        """What the encoder or the container refuses becomes a VideoError."""
        try:
            yield
        except self._av.error.FFmpegError as error:
            if isinstance(error, OSError):  # of the file system
                raise
            size = f"{self._stream.width} × {self._stream.height}"
            raise VideoError(
                f"a video of {size} pixels cannot be encoded: {error.strerror}"
            ) from error

    def _exact(self, time: Fraction | float | None) -> Fraction:
        """The time of the next frame, without the rounding of the file that it comes from."""
        if time is None:
            return self._time + self._interval if self._count else Fraction(0)
        given = Fraction(time)
        if self._count == 0:
            self._first = given
        constant = self._first + self._count * self._interval
        return constant if abs(constant - given) <= self._rounding / 2 else given

    def __enter__(self) -> VideoWriter:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        with self._encoding():
            if kind is None and self._count:
                self._container.mux(self._stream.encode())  # what the encoder still holds
            self._container.close()
