"""Unpack playground/data/emoji.tar.xz into playground/data/emoji (ignored by git), and cut clients.

    python scripts/playground/unpack_data.py

Does nothing when that is done already. The folder appears whole or not at all.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import tarfile
import tempfile
from pathlib import Path, PurePosixPath

import cut_clients

from fed import partition

ROOT = Path(__file__).resolve().parents[2]
ARCHIVE = ROOT / "playground/data/emoji.tar.xz"
CAPTIONS = ROOT / "playground/data/captions.json"
CUTS = (Path(cut_clients.__file__), Path(partition.__file__))  # decide who has which picture
TARGET = ROOT / "playground/data/emoji"


def unpack(
    archive: Path = ARCHIVE, target: Path = TARGET, captions: Path | None = CAPTIONS
) -> bool:
    """Make `target` hold what `archive` holds, with further clients; True if that took any work.

    A file `.sha256` in the folder says what it was made from.

    Args:
        captions: what the further clients say of the pictures; None: the archive alone.
    """
    sources = [archive, captions, *CUTS] if captions else [archive]
    digest = hashlib.sha256(b"".join(path.read_bytes() for path in sources)).hexdigest()

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
        if captions:
            cut_clients.cut(fresh, json.loads(captions.read_text()))
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
