"""Two spools on two machines made alike by messages that the site sends and the server answers.

The site asks, always: it fetches requests and states, and brings progress and answers, in pieces.
Each message may be lost, cut or sent twice, and either side may be killed: a file grows as
`.NAME.part` beside its place, goes on from where it was, and takes its place once its SHA-256 is
what was said of it. What messages travel on is not known here: `fed/remote/flare_job.py` sends them
through FLARE.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from fed.remote.spool import (
    DONE,
    DOWN,
    FAILED,
    KEY,
    PROGRESS,
    REQUEST,
    STATE,
    UPDATE,
    Spool,
    digest,
)
from llava.atomic import atomic_write, write_text
from llava.errors import InputError

PIECE = 2**20
"""Bytes of a file in one message: a line of 0.2 Mbit/s brings one within a job's patience."""

Message = dict[str, Any]
Call = Callable[[Message], Message]
"""Sends a message and gives the other side's answer; raises `LostError` where there is none."""

_LONGEST_TEXT = 2**20


class LostError(Exception):
    """A message had no answer, or a bad one; to be sent again."""


class ServerEnd:
    """The server's side of one site: what the site may see and write of its spool.

    Attributes:
        carried: bytes of files that have passed.
    """

    def __init__(self, spool: Spool):
        self.spool, self.carried = spool, 0
        self._brought: set[str] = set()  # keys whose answers have come while this lives

    def answer(self, message: Message) -> Message:
        """The answer to a site's message; `error` in it says why there is no other."""
        try:
            return _DEEDS[str(message.get("do"))](self, message)
        except (InputError, OSError, KeyError, TypeError, ValueError) as error:
            return {"error": f"{type(error).__name__}: {error}"}

    def _look(self, message: Message) -> Message:
        """Requests and the answers that are here; takes the site's progress."""
        asked = self.spool.keys(REQUEST)
        for key, progress in dict(message["progress"]).items():
            if key in asked:
                self.spool.tell(key, dict(progress))
        self.spool.forget()
        _drop_parts(self.spool, set(asked))
        answered = set(self.spool.keys(DONE, FAILED))
        # What has come and is gone again, though still asked for, the driver has refused.
        rejected = [key for key in self._brought if key in asked and key not in answered]
        self._brought -= set(rejected)
        return {"asked": asked, "answered": sorted(answered), "rejected": rejected}

    def _get(self, message: Message) -> Message:
        """A piece of a request's file."""
        path = self._path(message, DOWN)
        with open(path, "rb") as file:
            file.seek(int(message["at"]))
            piece = file.read(PIECE)
        self.carried += len(piece)
        return {"data": piece, "size": path.stat().st_size}

    def _put(self, message: Message) -> Message:
        """Take a piece of an update; says from where to go on."""
        path, piece = self._path(message, (UPDATE,)), message["data"]
        at = _grow(path, int(message["at"]), piece, message["file"])
        self.carried += len(piece)
        return {"at": at}

    def _say(self, message: Message) -> Message:
        """Take an answer's text, which comes last."""
        path = self._path(message, (DONE, FAILED))
        text = str(message["text"])
        if len(text) > _LONGEST_TEXT:
            raise ValueError(f"{path.name} has {len(text)} letters")
        write_text(path, text)
        self.spool.file(str(message["key"]), PROGRESS).unlink(missing_ok=True)
        self._brought.add(str(message["key"]))
        return {}

    def _path(self, message: Message, kinds: tuple[str, ...]) -> Path:
        """The file that a message is about: of a request that stands, and of these kinds."""
        key, kind = str(message["key"]), str(message["kind"])
        if not KEY.fullmatch(key) or kind not in kinds or not self.spool.is_asked(key):
            raise KeyError(f"no request {key!r} with a file {kind!r}")
        return self.spool.file(key, kind)


_DEEDS = {
    "look": ServerEnd._look,
    "get": ServerEnd._get,
    "put": ServerEnd._put,
    "say": ServerEnd._say,
}


class SiteEnd:
    """The site's side; `call` brings its messages to the `ServerEnd`."""

    def __init__(self, spool: Spool, call: Call):
        self.spool, self._call = spool, call

    def step(self) -> bool:
        """Look once and move what is there to be moved; True if something was.

        Raises:
            LostError: a message was not answered; the next step goes on from there.
        """
        found = self._ask(do="look", progress=dict(self._progress()))
        asked = [str(key) for key in found["asked"] if KEY.fullmatch(str(key))]
        self.spool.withdraw_all(but=set(asked))
        _drop_parts(self.spool, set(asked))
        for key in found["rejected"]:
            if key in asked:
                self.spool.reject(key)
        moved = False
        for key in asked:
            if not self.spool.is_asked(key):
                self._fetch(key)
                moved = True
        for key in self.spool.keys(DONE, FAILED):
            if key in asked and key not in found["answered"]:
                self._bring(key)
                moved = True
        return moved

    def _progress(self) -> Iterator[tuple[str, dict[str, Any]]]:
        for key in self.spool.keys(PROGRESS):
            if progress := self.spool.progress(key):
                yield key, progress

    def _fetch(self, key: str) -> None:
        """Get a request: its state first, for the ticket says that all is there."""
        text = b""
        while piece := self._piece(key, REQUEST, len(text)):
            text += piece
        said = json.loads(text)["state"]
        if said is not None:
            state = self.spool.file(key, STATE)
            at = _grow(state, 0, b"", said)
            while at < said["bytes"]:
                at = _grow(state, at, self._piece(key, STATE, at), said)
        with atomic_write(self.spool.file(key, REQUEST)) as file:
            file.write(text)

    def _piece(self, key: str, kind: str, at: int) -> bytes:
        return bytes(self._ask(do="get", key=key, kind=kind, at=at)["data"])

    def _bring(self, key: str) -> None:
        """Bring an answer: the update first, for the text says that all is there."""
        update = self.spool.file(key, UPDATE)
        kind = DONE if self.spool.file(key, DONE).exists() else FAILED
        if kind == DONE and update.exists():
            said = digest(update)
            # A first message without bytes asks how much of it is there.
            at = self._ask(do="put", key=key, kind=UPDATE, at=0, data=b"", file=said)["at"]
            with open(update, "rb") as file:
                while at < said["bytes"]:
                    file.seek(at)
                    piece = file.read(PIECE)
                    at = self._ask(do="put", key=key, kind=UPDATE, at=at, data=piece, file=said)[
                        "at"
                    ]
        self._ask(do="say", key=key, kind=kind, text=self.spool.file(key, kind).read_text())

    def _ask(self, **message: Any) -> Message:
        found = self._call(message)
        if "error" in found:
            raise LostError(str(found["error"]))
        return found


def _grow(path: Path, at: int, piece: bytes, said: dict[str, Any]) -> int:
    """Append a piece to the part of a file that has come; returns how much there is now.

    Args:
        at: where the piece belongs; one that does not follow on what is there is not taken.
        said: what `digest` says of the whole file.
    """
    size, part = int(said["bytes"]), path.with_name(f".{path.name}.part")
    if path.exists() and path.stat().st_size == size:
        return size
    with open(part, "ab") as file:
        if file.tell() == at:
            file.write(piece)
        if file.tell() < size:
            return file.tell()
        file.flush()
        os.fsync(file.fileno())
    if digest(part) == said:
        os.replace(part, path)
        return size
    part.unlink()  # changed on its way: once more from the start
    return 0


def _drop_parts(spool: Spool, asked: set[str]) -> None:
    """Remove the parts of files that nobody asks for any more."""
    for part in spool.folder.glob(".*.part"):
        if part.name[1:33] not in asked:
            part.unlink(missing_ok=True)
