"""Many files, many processes: which are whose, and results that a kill does not take away."""

from __future__ import annotations

import fcntl
import json
import os
import secrets
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch

from ..files import replacing


class Place(NamedTuple):
    """Which process of how many this is.

    Attributes:
        rank: its number among all.
        world: how many there are.
        local: its number on this machine.
    """

    rank: int = 0
    world: int = 1
    local: int = 0

    def device(self, asked: torch.device) -> torch.device:
        """``asked``, but of several GPUs the one of this process."""
        if self.world == 1 or asked.type != "cuda" or asked.index is not None:
            return asked
        return torch.device("cuda", self.local % torch.cuda.device_count())


def place() -> Place:
    """This process's place, from the variables that ``torchrun`` sets; alone without them.

    Raises:
        ValueError: they are no such numbers.
    """
    names = ("RANK", "WORLD_SIZE", "LOCAL_RANK")
    texts = [os.environ.get(name, "") for name in names]
    if not (texts[0] and texts[1]):
        return Place()
    try:
        found = Place(*(int(text) for text in texts if text))
    except ValueError:
        found = Place(-1)
    if not 0 <= found.rank < found.world or found.local < 0:
        listed = ", ".join(f"{n}={t}" for n, t in zip(names, texts, strict=True))
        raise ValueError(f"torchrun's variables must be a rank below a number, got {listed}")
    return found


def stamp(path: Path) -> list[int] | None:
    """What changes when a file does, its size and time of change; None when there is none."""
    try:
        found = path.stat()
    except OSError:
        return None
    return [found.st_size, found.st_mtime_ns]


class Record(NamedTuple):
    """A file that is done: bytes ``start`` to ``end`` of ``part`` are its entries, a line each."""

    part: Path
    start: int
    end: int
    error: str | None


#: How the line begins that ends a file's entries.
_DONE = b'{"done": '


class Parts:
    """What has been found so far, in the folder ``FILE.parts`` until all of it is in FILE.

    Each process appends to a file of its own there: the entries of an image or a video, a line
    each, then a line that says it is done. Entries without that line, which a kill leaves at the
    end of a part, count for nothing; so do those of a file that has changed since.

    Args:
        target: the JSON file that is to hold all entries.
        options: what results depend on; a folder made with others is refused.
        rank: of this process.

    Raises:
        ValueError: there are results of other options.
        OSError: the folder cannot be made or written.
    """

    def __init__(self, target: Path, options: Mapping[str, Any], rank: int) -> None:
        self.target = target
        self.folder = target.with_name(target.name + ".parts")
        self.folder.mkdir(exist_ok=True)
        self._lock = (self.folder / "lock").open("a")
        fcntl.flock(self._lock, fcntl.LOCK_EX)
        try:
            self._check(options)
        except BaseException:
            self._lock.close()
            raise
        fcntl.flock(self._lock, fcntl.LOCK_UN)
        self.done = {path for path, record in self._read().items() if record is not None}
        name = f"{rank:05d}-{secrets.token_hex(4)}.jsonl"
        self._stream = (self.folder / name).open("x", encoding="utf-8")

    def _check(self, options: Mapping[str, Any]) -> None:
        """Writes the options, or compares them with those that are there."""
        mine = json.loads(json.dumps(dict(options)))
        file = self.folder / "options.json"
        if not file.exists():
            with replacing(file) as temporary:
                temporary.write_text(json.dumps(mine), encoding="utf-8")
            return
        theirs = json.loads(file.read_text(encoding="utf-8"))
        for name, value in mine.items():
            if value != theirs.get(name):
                raise ValueError(
                    f"{self.folder} holds results with {name} {theirs.get(name)}, not {value}: "
                    "remove it to begin anew, or give another --json"
                )

    def write(self, lines: Sequence[str]) -> None:
        """Appends entries of the file that is done next."""
        self._stream.writelines(line + "\n" for line in lines)

    def write_done(self, path: Path, error: Exception | None) -> None:
        """Says that the entries of ``path`` are complete; from here on they outlive a kill."""
        record = {
            "done": str(path),
            "stamp": stamp(path),
            "error": None if error is None else str(error),
        }
        self._stream.write(json.dumps(record) + "\n")
        self._stream.flush()

    def _read(self) -> dict[Path, Record | None]:
        """The record of each file; None of one that has changed since."""
        found: dict[Path, Record | None] = {}
        for part in self.folder.glob("*.jsonl"):
            start = end = 0
            with part.open("rb") as lines:
                for line in lines:
                    begin, end = end, end + len(line)
                    if not (line.startswith(_DONE) and line.endswith(b"\n")):
                        continue
                    plain = json.loads(line)
                    path = Path(plain["done"])
                    if plain["stamp"] == stamp(path):
                        found[path] = Record(part, start, begin, plain["error"])
                    else:
                        found.setdefault(path, None)
                    start = end
        return found

    def merge(self, files: Sequence[Path]) -> int | None:
        """Writes the JSON file if all ``files`` are done, and removes the folder.

        Every process calls this when it has done its own; the last one finds all done.

        Returns:
            how many files could not be read; None when other processes still have files to do,
            or one of them has merged already.
        """
        self._stream.close()
        fcntl.flock(self._lock, fcntl.LOCK_EX)  # until it is closed
        records = self._read()
        found = [records.get(path) for path in files]
        complete = [record for record in found if record is not None]
        if len(complete) < len(files):
            return None
        with replacing(self.target) as temporary, temporary.open("wb") as out:
            out.write(b"[")
            separator = b"\n"
            for record in complete:
                with record.part.open("rb") as part:
                    part.seek(record.start)
                    while part.tell() < record.end:
                        out.write(separator + part.readline().rstrip(b"\n"))
                        separator = b",\n"
            out.write(b"\n]\n")
        shutil.rmtree(self.folder)
        return sum(record.error is not None for record in complete)

    def close(self) -> None:
        """Lets go of the folder, which stays as it is for the next run if it was not merged."""
        self._stream.close()
        self._lock.close()
