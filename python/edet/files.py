"""Files that appear whole or not at all, and what a write to a path reaches."""

from __future__ import annotations

import errno
import fcntl
import os
import re
import secrets
import shutil
import stat
import tempfile
from collections.abc import Container, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import BinaryIO


@contextmanager
def replacing(path: str | os.PathLike[str], *, sync: bool = True) -> Iterator[Path]:
    """Gives a temporary path of the same suffix, put in the place of ``path`` when the block ends.

    A file takes the place of ``path`` by a rename: whoever reads it sees the old one or the new
    one, whole. Links are followed and stay, also those that lead to nothing yet; an existing file
    passes its permissions, owner and extended attributes on. What cannot be replaced is written to
    when the block has succeeded: a FIFO (which waits for a reader), a device, an open descriptor
    such as /dev/stdout, a mount point, a file in a folder that nothing can be added to.

    Args:
        path: the file to write.
        sync: wait until the file is on the disk, so that a power cut leaves the old or the new one.

    Raises:
        OSError: before the block, as :func:`check_target`; after it, the write failed. Nothing is
            left behind, and a file that could be replaced is as it was.
    """
    target, in_place = _target(path)
    suffix = Path(path).suffix  # the format is chosen by it, also where it names a link
    temporary = _new_file(
        Path(tempfile.gettempdir()) if in_place else target.parent,
        suffix if len(os.fsencode(suffix)) <= 16 else "",
        path,
        0o600 if in_place or target.exists() else 0o666,  # not more readable than what it replaces
    )
    try:
        yield temporary
        if in_place:
            _copy(temporary, target)
            temporary.unlink()
        else:
            _move(temporary, target, sync)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def check_target(path: str | os.PathLike[str]) -> None:
    """Checks that :func:`replacing` can write ``path``, to say so before the work is done.

    Raises:
        OSError: it is a folder, a socket or a loop of links, may not be written, its name is too
            long, or its folder does not exist or may not be written.
    """
    _target(path)


def _target(path: str | os.PathLike[str]) -> tuple[Path, bool]:
    """The file that a write to ``path`` reaches, and whether it is one to write in place."""
    real = Path(os.path.realpath(path))
    try:
        mode = os.stat(path).st_mode
    except FileNotFoundError:
        folder = os.stat(real.parent)  # there may be a link to what is to come
        if not stat.S_ISDIR(folder.st_mode):
            raise _error(errno.ENOTDIR, path) from None
        if not _may_write(real.parent, os.W_OK | os.X_OK):
            raise _error(errno.EACCES, path) from None
        return real, False
    if stat.S_ISDIR(mode):
        raise _error(errno.EISDIR, path)
    if stat.S_ISSOCK(mode):
        raise _error(errno.ENXIO, path)
    number = _descriptor(Path(path))
    if number is not None:
        if fcntl.fcntl(number, fcntl.F_GETFL) & os.O_ACCMODE == os.O_RDONLY:
            raise _error(errno.EBADF, path)
        return Path(path), True
    if not _may_write(path, os.W_OK):
        raise _error(errno.EACCES, path)
    if stat.S_ISREG(mode) and _may_write(real.parent, os.W_OK | os.X_OK):
        return real, False
    return Path(path), True


def _error(number: int, path: str | os.PathLike[str]) -> OSError:
    return OSError(number, os.strerror(number), os.fspath(path))


def _may_write(path: str | os.PathLike[str], mode: int) -> bool:
    return os.access(path, mode, effective_ids=True)


def _descriptor(path: Path) -> int | None:
    """The open descriptor of this process that ``path`` stands for, as /dev/stdout does."""
    own = f"/proc/{os.getpid()}/fd"
    while True:
        if os.path.realpath(path.parent) == own:
            return int(path.name)
        if not path.is_symlink():
            return None
        path = path.parent / path.readlink()


def leftovers(folder: Path, suffixes: Container[str]) -> list[Path]:
    """Files that :func:`replacing` left in ``folder`` when its process was killed."""
    return [
        path
        for path in folder.glob(".*")
        if path.suffix in suffixes and re.fullmatch(r"\.[0-9a-f]{8}", path.stem)
    ]


def _new_file(folder: Path, suffix: str, path: str | os.PathLike[str], mode: int) -> Path:
    """An empty file of a short name of its own, with the permissions ``mode`` less the umask."""
    while True:
        temporary = folder / f".{secrets.token_hex(4)}{suffix}"
        try:
            os.close(os.open(temporary, os.O_CREAT | os.O_EXCL | os.O_WRONLY, mode))
        except FileExistsError:
            continue
        except OSError as error:  # about the file that was asked for
            assert error.errno is not None
            raise _error(error.errno, path) from error
        return temporary


def _move(temporary: Path, target: Path, sync: bool) -> None:
    """Renames ``temporary`` to ``target``, which passes on whose it is and who may read it."""
    if target.exists():
        owner = target.stat()
        for user, group in ((owner.st_uid, -1), (-1, owner.st_gid)):
            with suppress(PermissionError):  # only root can give files away
                os.chown(temporary, user, group)
        shutil.copystat(target, temporary)
        os.utime(temporary)
    if sync:
        _sync(temporary)
    try:
        temporary.replace(target)
    except OSError:
        if not target.exists():
            raise
        # a mount point, or another's file in a folder like /tmp, can be written all the same
        _copy(temporary, target)
        temporary.unlink()
        return
    if sync:
        with suppress(OSError):  # the file itself is safe; not every file system syncs folders
            _sync(target.parent)


def _sync(path: Path) -> None:
    number = os.open(path, os.O_RDONLY)
    try:
        os.fsync(number)
    finally:
        os.close(number)


def _copy(source: Path, target: Path) -> None:
    """Writes the content of ``source`` to what ``target`` is now."""
    number = _descriptor(target)
    writer: BinaryIO = target.open("wb") if number is None else os.fdopen(os.dup(number), "wb")
    with source.open("rb") as reader, writer:  # a descriptor goes on where it is
        shutil.copyfileobj(reader, writer)
