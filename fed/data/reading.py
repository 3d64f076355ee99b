"""LLaVA JSON, read record by record: a file of any size takes the memory of one record."""

from __future__ import annotations

import json
import os
import sqlite3
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from fed.data.samples import LeftOut, Sample, check_picture
from llava.errors import InputError, reason


def stream_json(path: str | os.PathLike) -> Iterator[Any]:
    """The items of a JSON list; `InputError` if the file is not one, or ends before the list does.

    Numbers with a point become floats, as with `json.load`.
    """
    try:
        import ijson
    except ImportError:
        raise InputError("ijson is missing: pip install 'fedllava[data]'") from None
    count = 0
    try:
        with open(path, "rb") as file:
            start = file.read(3)
            file.seek(3 if start == b"\xef\xbb\xbf" else 0)  # a byte order mark
            place = file.tell()
            first = file.read(4096).lstrip()[:1]
            if first != b"[":
                found = f"starts with {first.decode(errors='replace')!r}" if first else "is empty"
                raise InputError(f"{path}: a JSON list of records is expected, but it {found}")
            file.seek(place)
            for item in ijson.items(file, "item", use_float=True):
                yield item
                count += 1
    except OSError as error:
        raise InputError(f"{path} cannot be read: {error.strerror}") from None
    except (ijson.JSONError, UnicodeDecodeError) as error:
        raise InputError(
            f"{path}: not JSON, or cut short, after {count} records ({reason(error)})"
        ) from None


class LlavaJson:
    """Records of a LLaVA JSON whose pictures lie in a folder.

    Args:
        path: the JSON.
        image_folder: where `image` is looked up.
        meta: a JSON list of objects with the same `id`s, whose keys join the records' fields.
        skip_bad: leave out, and count, a record whose picture is missing; else it is an error.
        decode: decode every picture to its end, so that a broken one is found.
    """

    def __init__(
        self,
        path: str,
        image_folder: str,
        meta: str | None = None,
        skip_bad: bool = False,
        decode: bool = False,
    ) -> None:
        if not Path(path).is_file():
            raise InputError(f"--input {path}: no such file")
        if not Path(image_folder).is_dir():
            raise InputError(f"--image_folder {image_folder}: no such folder")
        self.path = path
        self.image_folder: str | None = image_folder
        self.left_out = LeftOut(strict=not skip_bad)
        self._decode = decode
        self._meta_path = meta
        self._meta: Meta | None = None
        if meta and not Path(meta).is_file():
            raise InputError(f"--meta {meta}: no such file")

    def describe(self) -> list[str]:
        paths = [self.path, *([self._meta_path] if self._meta_path else [])]
        return [f"{path}, {os.path.getsize(path)} bytes" for path in paths]

    def read(self, check: bool) -> Iterator[Sample | None]:
        for index, record in enumerate(stream_json(self.path)):
            sample = self._sample(index, record)
            fault = self._fault(sample) if sample and check else None
            if sample and fault:
                self.left_out.add(sample.name, fault)
            yield None if fault else sample

    def _fault(self, sample: Sample) -> str | None:
        """The first fault of its pictures."""
        faults = (check_picture(picture, self._decode) for picture in sample.pictures())
        return next(filter(None, faults), None)

    def _sample(self, index: int, record: Any) -> Sample | None:
        """The sample; None (a subclass's) if the record is passed over. Malformed: `InputError`."""
        name = f"{self.path}: record {index}"
        if not isinstance(record, dict):
            raise InputError(f"{name} is not an object but {record!r:.80}")
        if "id" in record:
            name += f" (id {record['id']!r})"
        image = record.get("image")
        images: list[Any] = image if isinstance(image, list) else [image]
        if not images or not all(isinstance(path, str) and path for path in images):
            raise InputError(f"{name} has no `image`: a path, or a list of paths, is expected")
        turns = record.get("conversations")
        if (
            not isinstance(turns, list)
            or len(turns) < 2
            or not all(isinstance(t, dict) and isinstance(t.get("value"), str) for t in turns)
        ):
            raise InputError(f"{name} has no `conversations`: a list of turns is expected")
        fields = {**self._meta_of(record, name), **record}
        fields.setdefault("answer", turns[1]["value"])
        paths = [os.path.join(self.image_folder or "", path) for path in images]
        return Sample(record, fields, name, lambda: list(paths))

    def _meta_of(self, record: dict[str, Any], name: str) -> dict[str, Any]:
        if self._meta_path is None:
            return {}
        self._meta = self._meta or Meta(self._meta_path)
        found = self._meta.get(record.get("id"))
        if found is None:
            raise InputError(f"{name}: --meta {self._meta_path} has no entry of this id")
        return found


class Meta:
    """Objects by `id`, kept on the disk while the process lives (SQLite in a temporary file)."""

    def __init__(self, path: str) -> None:
        self._file = tempfile.NamedTemporaryFile(prefix="fedllava-meta-", suffix=".sqlite")  # noqa: SIM115
        self._base = sqlite3.connect(self._file.name)
        rows = ((_id(path, i, item), json.dumps(item)) for i, item in enumerate(stream_json(path)))
        try:
            self._base.execute("PRAGMA journal_mode = OFF")
            self._base.execute("PRAGMA synchronous = OFF")
            self._base.execute("CREATE TABLE meta (id TEXT PRIMARY KEY, fields TEXT)")
            self._base.executemany("INSERT OR REPLACE INTO meta VALUES (?, ?)", rows)
            self._base.commit()
        except sqlite3.Error as error:
            raise InputError(f"--meta {path}: {reason(error)} ({self._file.name})") from None

    def get(self, key: Any) -> dict[str, Any] | None:
        row = self._base.execute("SELECT fields FROM meta WHERE id = ?", (str(key),)).fetchone()
        return json.loads(row[0]) if row else None


def _id(path: str, index: int, item: Any) -> str:
    if not isinstance(item, dict) or "id" not in item:
        raise InputError(f"--meta {path}: entry {index} is no object with an `id`")
    return str(item["id"])
