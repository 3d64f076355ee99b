"""The rows of a study: a JSON object a line, one for each finished job."""

from __future__ import annotations

import fcntl
import json
from collections.abc import Mapping
from pathlib import Path

from llava.errors import InputError


def read_rows(path: Path) -> list[dict]:
    """The finished jobs' rows; a last line that was being written when its process died is none."""
    if not path.exists():
        return []
    try:
        return [json.loads(line) for line in whole_lines(path.read_bytes()).splitlines()]
    except ValueError as error:
        raise InputError(f"{path}: not one JSON object a line ({error})") from None


def add_row(path: Path, row: Mapping) -> None:
    """Append a row, whichever other processes do so at the same time."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "a+b") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        file.seek(0)
        there = file.read()
        whole = whole_lines(there)
        file.truncate(min(len(whole), len(there)))
        file.write(whole[len(there) :] + json.dumps(row).encode() + b"\n")


def whole_lines(text: bytes) -> bytes:
    """`text` up to its last whole row, ending in a newline."""
    end = text.rfind(b"\n") + 1
    if end == len(text):
        return text
    try:
        json.loads(text[end:])
    except ValueError:
        return text[:end]
    return text + b"\n"
