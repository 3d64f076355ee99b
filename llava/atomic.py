"""Files and folders that are either whole or not there."""

from __future__ import annotations

import contextlib
import io
import os
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

from llava.errors import InputError
from llava.processes import NAME, is_gone, name_of

_PIECE = 2**20  # bytes


class _Pieces(io.FileIO):
    """A file that takes a piece at a time, and begins at once to bring it to the disk.

    Of many megabytes in one call Linux puts each into its cache several times as slowly; and what
    is on the disk when the last piece comes need not be waited for.
    """

    def write(self, data: Any) -> int:
        begin = self.tell()
        count = super().write(memoryview(data)[:_PIECE])
        if count == _PIECE and hasattr(os, "posix_fadvise"):
            # Starts the transfer; what is still to be written stays in the cache.
            os.posix_fadvise(self.fileno(), begin, count, os.POSIX_FADV_DONTNEED)
        return count


@contextlib.contextmanager
def atomic_write(path: str | os.PathLike, sync: bool = True) -> Iterator[BinaryIO]:
    """Yield a binary file that takes the place of `path` once it is whole and on the disk.

    The parent folder is made when missing. If the block raises, or the process is killed, `path`
    is as it was before; a leftover may lie beside it (`own_name`) and harms nothing.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = own_name(path)
    try:
        with io.BufferedWriter(_Pieces(temporary, "wb")) as file:
            yield file
            file.flush()
            if sync:
                os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException as error:
        temporary.unlink(missing_ok=True)
        if isinstance(error, OSError) and error.errno and error.filename is None:
            # A full disk is not told with the name of the file that it had no room for.
            raise OSError(error.errno, error.strerror, str(path)) from None
        raise


def write_text(path: str | os.PathLike, text: str) -> None:
    """Write `text` as UTF-8, whole or not at all."""
    with atomic_write(path) as file:
        file.write(text.encode())


def sync(folder: str | os.PathLike) -> None:
    """Bring all files below a folder, and their names, to the disk."""
    for place, _, files in os.walk(os.fspath(folder)):
        for path in (*(Path(place, name) for name in files), Path(place)):
            descriptor = os.open(path, os.O_RDONLY)
            try:
                os.fsync(descriptor)
            finally:
                os.close(descriptor)


def write_secret(path: str | os.PathLike, content: str | bytes) -> None:
    """A file that its owner alone can read, whole, and on the disk with its name: after a power cut
    an older one is not back."""
    path = Path(path)
    data = content.encode() if isinstance(content, str) else content
    with atomic_write(path) as file:
        os.fchmod(file.fileno(), 0o600)  # before it has any content
        file.write(data)
    folder = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)


@contextlib.contextmanager
def new_folder(path: str | os.PathLike, replace: bool = False) -> Iterator[Path]:
    """Yield a folder to fill, which becomes `path` at the end of the block, or goes if it raises.

    A process that is killed leaves `.NAME.HOST.PID.BEGAN.tmp` beside it, and no `path`, or the one
    that was there; in the instant of an exchange it may leave that one as `.….old` (`left_of`).

    Args:
        replace: take the place of a folder that is not empty, which is removed at the end.

    Raises:
        InputError: `path` is there already and not empty, and is not to be replaced.
    """
    path = Path(path).absolute()
    if not replace and path.exists() and (not path.is_dir() or any(path.iterdir())):
        raise InputError(f"{path}: is there already; name a folder that is new or empty")
    temporary, aside = own_name(path), own_name(path, "old")
    temporary.mkdir(parents=True)
    try:
        yield temporary
        if replace and path.exists() and any(path.iterdir()):
            os.replace(path, aside)
        os.replace(temporary, path)  # an empty folder gives way
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        if aside.exists() and not path.exists():
            os.replace(aside, path)
        raise
    shutil.rmtree(aside, ignore_errors=True)


def own_name(path: Path, end: str = "tmp") -> Path:
    """The name that `path` has in this process until it is whole: `.NAME.HOST.PID.BEGAN.end`."""
    return path.with_name(f".{path.name}.{name_of()}.{end}")


def left_of(path: Path) -> list[Path]:
    """The `own_name`s of `path`, under any `end`, of processes of this host that have ended."""
    names = re.compile(rf"\.{re.escape(path.name)}\.({NAME})\.[a-z]+")
    return _abandoned(path.parent, names)


def remove_leftovers(folder: str | os.PathLike) -> None:
    """Remove the files that killed writers of this host have left in a folder."""
    for path in _abandoned(Path(folder), re.compile(rf"\..+\.({NAME})\.tmp")):
        if path.is_file():
            path.unlink(missing_ok=True)


def _abandoned(folder: Path, names: re.Pattern) -> list[Path]:
    if not folder.is_dir():
        return []
    found = [(path, names.fullmatch(path.name)) for path in sorted(folder.iterdir())]
    return [path for path, match in found if match and is_gone(match[1])]
