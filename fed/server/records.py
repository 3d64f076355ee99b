"""rounds.jsonl: one JSON object a round, added at its end."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Mapping
from pathlib import Path

from llava.atomic import atomic_write
from llava.errors import InputError


class Records:
    """The records of a run: `OUTPUT/fed/rounds.jsonl`, and `OUTPUT/rounds.jsonl`, a copy for users.

    A round's record is added before the round's state is written, and counts when that is: the
    state has `mark`, and what lies behind it is cut off when the run is continued.
    """

    def __init__(self, output_dir: Path):
        self.files = output_dir / "fed" / "rounds.jsonl", output_dir / "rounds.jsonl"
        self._size, self._digest = 0, hashlib.sha256()

    @property
    def mark(self) -> dict[str, int | str]:
        """The bytes so far, and their digest."""
        return {"bytes": self._size, "sha256": self._digest.hexdigest()}

    def resume(self, mark: Mapping[str, int | str], write: bool) -> None:
        """Go on behind `mark`; the users' copy is made anew. Without `write` nothing is changed.

        Raises:
            InputError: the records up to there are not those that were written.
        """
        size = int(mark["bytes"])
        own, copy = self.files
        text = b""
        if own.exists():
            with open(own, "rb") as file:
                text = file.read(size)
        self._size, self._digest = len(text), hashlib.sha256(text)
        if self.mark != mark:
            raise InputError(
                f"{own}: its first {size} bytes, the records of finished rounds, are not those "
                "that were written"
            )
        if write:
            for path in (own, copy):
                with atomic_write(path) as file:
                    file.write(text)

    def add(self, record: dict, write: bool) -> None:
        """Add a round's record. A process that does not `write` keeps count only."""
        line = json.dumps(record).encode() + b"\n"
        self._size += len(line)
        self._digest.update(line)
        if not write:
            return
        own, copy = self.files
        own.parent.mkdir(parents=True, exist_ok=True)
        with open(own, "ab") as file:
            file.write(line)
            file.flush()
            os.fsync(file.fileno())
        if copy.is_file() and copy.stat().st_size == self._size - len(line):
            with open(copy, "ab") as file:
                file.write(line)
        else:  # somebody has changed it
            shutil.copyfile(own, copy)
