"""Files and folders that are either whole or not there."""

from __future__ import annotations

import contextlib
import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

from llava.processes import NAME, is_gone, name_of


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
        with open(temporary, "wb") as file:
            yield file
            file.flush()
            if sync:
                os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def write_text(path: str | os.PathLike, text: str) -> None:
    """Write `text` as UTF-8, whole or not at all."""
    with atomic_write(path) as file:
        file.write(text.encode())


def own_name(path: Path, end: str = "tmp") -> Path:
    """What this process alone calls `path` while it is not whole: `.NAME.HOST.PID.BEGAN.end`."""
    return path.with_name(f".{path.name}.{name_of()}.{end}")


def left_of(path: Path) -> list[Path]:
    """What processes of this host that have ended called `path`, under any `end`."""
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
