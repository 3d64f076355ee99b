"""Question and answer files: JSON lines and tables; their chunks; ids for answers."""

from __future__ import annotations

import csv
import io
import json
import math
import os
import sys
import uuid
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from llava.errors import InputError
from llava.texts import half_character

ALPHABET = "23456789ABCDEFGHJKLMNPQRSTUVWXYZabcdefghijkmnopqrstuvwxyz"
"""The digits of upstream's answer ids (shortuuid's): no 0, 1, I, O and l."""

TEXTS = ("image", "text", "value", "prompt")
"""Keys that hold text wherever they stand."""


def read_jsonl(path: str | os.PathLike, *keys: str) -> list[dict]:
    """The objects of a file with one JSON object a line; every one must have all `keys`.

    Raises:
        InputError: no such file, no line, or a line that is not such an object (its number is
            named). Blank lines are passed over.
    """
    records = []
    for number, line in enumerate(_read(path).split("\n"), 1):
        if not line.strip():
            continue
        try:
            record = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise InputError(f"{path} line {number}: not JSON ({error})") from None
        check_keys(record, keys, f"{path} line {number}")
        records.append(record)
    return _some(records, path)


def answers_by_id(path: str | os.PathLike, *keys: str) -> dict[Any, dict]:
    """The answers of a file by their `question_id`; each has `text`, and `keys` too."""
    return {a["question_id"]: a for a in read_jsonl(path, "question_id", "text", *keys)}


def read_tsv(path: str | os.PathLike, *columns: str) -> list[dict[str, str]]:
    """The rows of a tab-separated table with a heading, which must name all `columns`."""
    csv.field_size_limit(sys.maxsize)  # a field may be a whole picture
    reader = csv.DictReader(io.StringIO(_read(path), newline=""), delimiter="\t")
    heading = reader.fieldnames or ()
    check_keys({name: name for name in heading}, columns, f"{path}: the heading")
    rows = []
    for row in reader:
        if None in row or None in row.values():
            raise InputError(f"{path} line {reader.line_num}: expected {len(heading)} columns")
        rows.append(row)
    return _some(rows, path)


def check_keys(record: Any, keys: Sequence[str], where: str) -> None:
    """`InputError` unless `record` is a dict with all `keys`, and text at those of `TEXTS`.

    `where` opens the message.
    """
    if not isinstance(record, dict):
        raise InputError(f"{where}: expected an object, found {type(record).__name__}")
    if missing := [key for key in keys if key not in record]:
        raise InputError(f"{where}: {missing[0]!r} is missing")
    for key in keys:
        text = record[key]
        if key in TEXTS and (not isinstance(text, str) or half_character(text) is not None):
            raise InputError(f"{where}: {key!r} is {text!r}, text is expected")


def _read(path: str | os.PathLike) -> str:
    try:
        with open(path, encoding="utf-8-sig", newline="") as file:
            return file.read()
    except FileNotFoundError:
        raise InputError(f"{path}: no such file") from None
    except UnicodeDecodeError as error:
        raise InputError(f"{path}: not UTF-8 text ({error})") from None


def _some(records: list, path: str | os.PathLike) -> list:
    if not records:
        raise InputError(f"{path}: the file is empty")
    return records


def get_chunk(items: Sequence, chunks: int, index: int) -> Sequence:
    """Slice `index` of `chunks`, of ceil(len / chunks) items each; the last ones may be empty."""
    if chunks < 1 or not 0 <= index < chunks:
        raise InputError(
            f"--num-chunks {chunks} --chunk-idx {index}: expected 0 <= chunk-idx < num-chunks"
        )
    size = math.ceil(len(items) / chunks)
    return items[index * size : (index + 1) * size]


def picture_path(folder: str | os.PathLike, name: str, question_id: Any) -> str:
    """The path of a question's picture; `InputError` with the question's id if there is no file."""
    path = Path(folder).expanduser() / name
    if not path.is_file():
        raise InputError(f"question {question_id}: picture {path} cannot be read: no such file")
    return str(path)


def answer_id() -> str:
    """A new id of 22 letters and digits that are hard to mix up, as upstream's."""
    number, digits = uuid.uuid4().int, ""
    while len(digits) < 22:
        number, digit = divmod(number, len(ALPHABET))
        digits = ALPHABET[digit] + digits
    return digits
