"""Unpack playground/data/*.tar.xz into playground/data/{emoji,tasks} (ignored by git), cut clients.

    python -m playground.tools.unpack_data

Does nothing when that is done already. Each folder appears whole or not at all.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import tarfile
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path, PurePosixPath

from fed.data import dirichlet as partition
from playground.tools import cut_clients, cut_tasks, tasks

ROOT = Path(__file__).resolve().parents[2]
ARCHIVE = ROOT / "playground/data/emoji.tar.xz"
CAPTIONS = ROOT / "playground/data/captions.json"
CUTS = (Path(cut_clients.__file__), Path(partition.__file__))  # decide who has which picture
TARGET = ROOT / "playground/data/emoji"
SHAPES = ROOT / "playground/data/easy_vqa.tar.xz"
TASKS_CUTS = (Path(cut_tasks.__file__), Path(tasks.__file__))
TASKS = ROOT / "playground/data/tasks"


def unpack(
    archive: Path = ARCHIVE, target: Path = TARGET, captions: Path | None = CAPTIONS
) -> bool:
    """Make `target` hold what `archive` holds, with further clients; True if that took any work.

    Args:
        captions: what the further clients say of the pictures; None: the archive alone.
    """

    def fill(fresh: Path) -> None:
        _extract(archive, fresh)
        if captions:
            cut_clients.cut(fresh, json.loads(captions.read_text()))

    return _replace(target, [archive, captions, *CUTS] if captions else [archive], fill)


def unpack_tasks(archive: Path = SHAPES, target: Path = TASKS, emoji: Path = TARGET) -> bool:
    """Make `target` hold the tasks; True if that took any work.

    Args:
        archive: easy-VQA's part.
        emoji: the folder that `unpack` makes.
    """

    def fill(fresh: Path) -> None:
        _extract(archive, fresh)
        cut_tasks.cut(fresh, emoji)

    return _replace(target, [archive, emoji / ".sha256", *TASKS_CUTS], fill)


def _replace(target: Path, sources: Sequence[Path], fill: Callable[[Path], None]) -> bool:
    """Make the folder `target` anew by `fill`, if it was not made from these sources.

    A file `.sha256` in the folder says what it was made from.
    """
    digest = hashlib.sha256(b"".join(path.read_bytes() for path in sources)).hexdigest()

    def is_done() -> bool:
        mark = target / ".sha256"
        return mark.exists() and mark.read_text() == digest

    if is_done():
        return False
    with tempfile.TemporaryDirectory(dir=target.parent, prefix=".unpack-") as folder:
        fresh, old = Path(folder, "new"), Path(folder, "old")
        fill(fresh)
        (fresh / ".sha256").write_text(digest)
        if target.exists():
            os.rename(target, old)
        try:
            os.rename(fresh, target)
        except OSError:
            if not is_done():  # else another process was faster
                raise
        shutil.rmtree(old, ignore_errors=True)
    return True


def _extract(archive: Path, folder: Path) -> None:
    """Unpack a .tar.xz that holds plain files and folders only."""
    with tarfile.open(archive) as tar:
        tar.extraction_filter = getattr(tarfile, "data_filter", None)  # since Python 3.11.4
        for member in tar:
            _check(member, archive)
            tar.extract(member, folder)


def _check(member: tarfile.TarInfo, archive: Path) -> None:
    """Refuse links, and paths that lead outside, on any Python."""
    path = PurePosixPath(member.name)
    if not (member.isfile() or member.isdir()) or path.is_absolute() or ".." in path.parts:
        raise ValueError(f"{archive}: {member.name} is no plain file or folder inside it")


if __name__ == "__main__":
    if unpack():
        print(f"unpacked {TARGET.relative_to(ROOT)}")
    if unpack_tasks():
        print(f"unpacked {TASKS.relative_to(ROOT)}")
