"""Unpack playground/data/emoji.tar.xz into playground/data/emoji (ignored by git).

    python scripts/playground/unpack_data.py

Does nothing when that archive is unpacked already. The folder appears whole or not at all.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import tarfile
import tempfile
from pathlib import Path, PurePosixPath

ROOT = Path(__file__).resolve().parents[2]
ARCHIVE = ROOT / "playground/data/emoji.tar.xz"
TARGET = ROOT / "playground/data/emoji"


def unpack(archive: Path = ARCHIVE, target: Path = TARGET) -> bool:
    """Make `target` hold what `archive` holds; True if that took any work.

    A file `.sha256` in the folder says which archive it came from.
    """
    digest = hashlib.sha256(archive.read_bytes()).hexdigest()

    def is_done() -> bool:
        mark = target / ".sha256"
        return mark.exists() and mark.read_text() == digest

    if is_done():
        return False
    with tempfile.TemporaryDirectory(dir=target.parent, prefix=".unpack-") as folder:
        fresh, old = Path(folder, "new"), Path(folder, "old")
        with tarfile.open(archive) as tar:
            tar.extraction_filter = getattr(tarfile, "data_filter", None)  # since Python 3.11.4
            for member in tar:
                _check(member, archive)
                tar.extract(member, fresh)
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


def _check(member: tarfile.TarInfo, archive: Path) -> None:
    """Refuse links, and paths that lead outside, on any Python."""
    path = PurePosixPath(member.name)
    if not (member.isfile() or member.isdir()) or path.is_absolute() or ".." in path.parts:
        raise ValueError(f"{archive}: {member.name} is no plain file or folder inside it")


if __name__ == "__main__":
    if unpack():
        print(f"unpacked {TARGET.relative_to(ROOT)}")
