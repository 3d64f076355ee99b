"""Samples, as both kinds of input give them, and those that had to be left out."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any, Protocol

from llava.errors import InputError
from llava.pictures import image_size, open_image

SHOWN = 20
"""So many samples that were left out are named; all are counted."""


@dataclass
class Sample:
    """A picture and its caption on the way through.

    Attributes:
        record: LLaVA's, its `image` as it will be written.
        fields: what keys and styles are read from; `answer` is the record's own caption.
        name: how a message calls it.
        pictures: gives the files of its pictures, path or bytes; valid until the next sample.
    """

    record: dict[str, Any]
    fields: dict[str, Any]
    name: str
    pictures: Callable[[], list[str | bytes]]


class SampleSource(Protocol):
    """An input, which may be read several times and gives its samples in the same order."""

    image_folder: str | None
    """Where the pictures lie; None: they are bytes, to be written beside the captions."""

    left_out: LeftOut

    def describe(self) -> list[str]:
        """The files and their sizes, a line each."""

    def read(self, check: bool) -> Iterator[Sample | None]:
        """The samples; None in place of one that is left out.

        With `check` every sample is looked at, and what is wrong goes to `left_out`. Without, which
        is quicker, samples whose fault is in the picture are given too.
        """


@dataclass
class LeftOut:
    """Samples that cannot be used: counted, the first ones named.

    With `strict` the first one is an `InputError` instead.
    """

    strict: bool
    count: int = 0
    names: list[str] = field(default_factory=list)

    def add(self, name: str, why: str) -> None:
        if self.strict:
            raise InputError(f"{name}: {why}")
        self.count += 1
        if len(self.names) < SHOWN:
            self.names.append(f"{name}: {why}")


def check_picture(picture: str | bytes, whole: bool) -> str | None:
    """The fault of a picture's file, or None; `whole` decodes all of it (slow)."""
    if isinstance(picture, str) and not os.path.isfile(picture):
        return f"picture {picture} does not exist"
    if isinstance(picture, str) and not whole:
        return None
    try:
        (open_image if whole else image_size)(picture, name_of(picture))
    except InputError as error:
        return str(error)
    return None


def name_of(picture: str | bytes) -> str:
    """A picture's file, as messages name it."""
    return "its picture" if isinstance(picture, bytes) else f"picture {picture}"
