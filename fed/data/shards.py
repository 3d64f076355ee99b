"""WebDataset shards: tar files in which the members of a sample stand together under one name."""

from __future__ import annotations

import glob
import json
import os
import re
import tarfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from fed.data.samples import LeftOut, Sample, check_picture
from llava.errors import InputError, reason
from llava.texts import half_character

PICTURES = ("jpg", "jpeg", "png", "webp")
MAX_TEXT = 1 << 20
"""The largest .txt or .json member that is read, in bytes."""
MAX_PICTURE = 256 << 20
"""The largest picture that is read, in bytes."""


def expand(patterns: Sequence[str]) -> list[str]:
    """Paths of `shard-{0000..0009}.tar`, `{a,b}.tar` and `*.tar`, in order, each once.

    Raises:
        InputError: a path that braces name does not exist, or a `*` finds nothing.
    """
    paths: dict[str, None] = {}
    for pattern in patterns:
        for path in _braces(pattern):
            found = sorted(glob.glob(path)) if glob.has_magic(path) else [path]
            if not found or not os.path.isfile(found[0]):
                raise InputError(f"--input {path}: no such file")
            paths.update(dict.fromkeys(found))
    return list(paths)


def _braces(pattern: str) -> Iterator[str]:
    match = re.search(r"\{([^{}]+)\}", pattern)
    if not match:
        yield pattern
        return
    inside = match[1]
    if span := re.fullmatch(r"(\d+)\.\.(\d+)", inside):
        width, first, last = len(span[1]), int(span[1]), int(span[2])
        parts = [f"{i:0{width}d}" for i in range(first, last + 1)]
    else:
        parts = inside.split(",")
    for part in parts:
        yield from _braces(pattern[: match.start()] + part + pattern[match.end() :])


class TarShards:
    """Samples of tar files: KEY.jpg (.png, .webp), KEY.txt and KEY.json, whatever their order.

    A sample's fields are those of its .json, `txt`, and `shard`, the tar's name without `.tar`. Its
    picture will be SHARD/KEY.jpg. What has no picture, no caption, two of one kind, or a member
    that cannot be read, is left out and counted.

    Args:
        paths: the tar files, not compressed.
        caption: the field that becomes the answer.
        question: what the human asks, before which the picture stands.
        decode: decode every picture to its end; else its header alone is read.
    """

    image_folder: str | None = None

    def __init__(
        self, paths: Sequence[str], caption: str, question: str, decode: bool = False
    ) -> None:
        self.paths = list(paths)
        names = [Path(path).name.removesuffix(".tar") for path in paths]
        for name in names:
            if names.count(name) > 1:
                raise InputError(f"--input: two shards are called {name}.tar")
        self._names = names
        self._caption = caption
        self._question = question
        self._decode = decode
        self.left_out = LeftOut(strict=False)

    def describe(self) -> list[str]:
        size = sum(os.path.getsize(path) for path in self.paths)
        if len(self.paths) == 1:
            return [f"{self.paths[0]}, {size} bytes"]
        return [f"{self.paths[0]} to {self.paths[-1]}, {len(self.paths)} files, {size} bytes"]

    def read(self, check: bool) -> Iterator[Sample | None]:
        for path, shard in zip(self.paths, self._names, strict=True):
            with open_tar(path) as tar:
                for key, members in _groups(tar, path):
                    name = f"{path}: {key}"
                    sample, fault = self._sample(tar, shard, key, members, name)
                    if sample and check:
                        fault = check_picture(sample.pictures()[0], self._decode)
                    if fault and check:
                        self.left_out.add(name, fault)
                    yield None if fault else sample

    def _sample(
        self, tar: tarfile.TarFile, shard: str, key: str, members: list[_Member], name: str
    ) -> tuple[Sample | None, str | None]:
        """The sample, or what is wrong with it."""
        parts = {kind: member for kind, member in members}
        if len(parts) < len(members):
            return None, "two members of one kind"
        kinds = [kind for kind in parts if kind in PICTURES]
        if len(kinds) != 1:
            return None, "two pictures" if kinds else "no picture"
        picture = parts[kinds[0]]
        fields: dict[str, Any] = {}
        try:
            if "json" in parts:
                fields = json.loads(_read(tar, parts["json"], MAX_TEXT))
                if not isinstance(fields, dict):
                    return None, "its .json is no object"
            if "txt" in parts:
                fields["txt"] = _read(tar, parts["txt"], MAX_TEXT).decode().strip()
            if picture.size > MAX_PICTURE:
                return None, f"its picture has more than {MAX_PICTURE >> 20} MiB"
        except (ValueError, RecursionError) as error:
            return None, f"its text cannot be read ({reason(error)})"
        if (half := half_character(fields)) is not None:
            return None, f"its text has half a character in {half!r}"
        answer = fields.get(self._caption)
        if not isinstance(answer, str) or not answer.strip():
            return None, f"no caption: `{self._caption}` is missing or empty"
        fields |= {"shard": shard, "answer": answer.strip()}
        record = {
            "id": key,
            "image": f"{shard}/{key}.{kinds[0]}",
            "conversations": [
                {"from": "human", "value": f"<image>\n{self._question}"},
                {"from": "gpt", "value": answer.strip()},
            ],
        }
        return Sample(record, fields, name, lambda: [_read(tar, picture, MAX_PICTURE)]), None


_Member = tuple[str, tarfile.TarInfo]
"""Kind (`jpg`, `txt`, …) and member."""


def open_tar(path: str) -> tarfile.TarFile:
    """A tar that is not compressed; `InputError` otherwise."""
    try:
        return tarfile.open(path, "r:")
    except tarfile.ReadError as error:
        if os.path.getsize(path) == 0:
            raise InputError(f"{path}: is empty") from None
        raise InputError(f"{path}: not a tar file, or a compressed one ({reason(error)})") from None
    except OSError as error:
        raise InputError(f"{path} cannot be read: {error.strerror}") from None


def _groups(tar: tarfile.TarFile, path: str) -> Iterator[tuple[str, list[_Member]]]:
    """Neighbours that share a key: the path up to the first dot of its last part."""
    key, seen = "", 0
    group: list[_Member] = []
    for member in _members(tar, path):
        folder, name = os.path.split(member.name.removeprefix("./"))
        stem, _, kind = name.partition(".")
        this = f"{folder}/{stem}" if folder else stem
        if this != key and group:
            yield key, group
            group = []
        key = this
        group.append((kind.lower(), member))
        seen += 1
    if group:
        yield key, group
    if not seen:
        raise InputError(f"{path}: holds no files")


def _members(tar: tarfile.TarFile, path: str) -> Iterator[tarfile.TarInfo]:
    """Plain files; a link, or a path that leads outside, is an `InputError`, and so is a cut."""
    try:
        while (member := tar.next()) is not None:
            # Or the list would grow with the file; typeshed does not know of it.
            tar.members.clear()  # type: ignore[attr-defined]
            if member.isdir():
                continue
            parts = member.name.split("/")
            if not member.isfile() or parts[0] == "" or ".." in parts or "\0" in member.name:
                raise InputError(f"{path}: {member.name!r} is no plain file inside the shard")
            yield member
    except tarfile.TarError as error:
        raise InputError(f"{path}: damaged or cut short ({reason(error)})") from None
    # tarfile takes a damaged header, or the end of the file, for the end of the tar.
    tar.fileobj.seek(tar.offset)
    if tar.fileobj.read(512) != bytes(512):
        raise InputError(f"{path}: damaged or cut short at byte {tar.offset}")


def _read(tar: tarfile.TarFile, member: tarfile.TarInfo, limit: int) -> bytes:
    """A member's bytes; ValueError if there are more than `limit`."""
    if member.size > limit:
        raise ValueError(f"{member.size} bytes")
    try:
        file = tar.extractfile(member)
        assert file is not None  # `_members` gives plain files alone
        return file.read()
    except tarfile.TarError as error:
        path = os.fsdecode(tar.name or "")
        raise InputError(f"{path}: cut short in {member.name} ({reason(error)})") from None
