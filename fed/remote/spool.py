"""A spool: a folder of requests to one site, and of the site's answers.

    KEY.req                 the ticket, JSON; appears last, when its state is whole
    KEY.state.safetensors   the tensors that are sent with it
    KEY.progress            JSON {step, steps, loss}, small, rewritten while the site is at work
    KEY.update.safetensors  the tensors that come back
    KEY.done                JSON {key, site, file: {sha256, bytes}, facts, seal}; appears last
    KEY.failed              JSON {key, site, reason, refused, seal}, in the place of KEY.done

Every file is whole or absent. KEY is a hash of the ticket, which has the hash of the state: the
same request has the same answer, whoever was killed in between. Whoever wrote a file removes it:
the driver its request once it has the answer, the site its answer once the request is gone.

Driver and site use this class alike, each on its own disk or both on one; a courier makes the two
folders alike: `DOWN` goes to the site, `UP` comes from it, and of each the last kind of a key is
written after the others and removed before them.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from llava.atomic import atomic_write, remove_leftovers, write_text
from llava.errors import InputError
from llava.json_files import read_json

STATE, REQUEST = ".state.safetensors", ".req"
PROGRESS, UPDATE, DONE, FAILED = ".progress", ".update.safetensors", ".done", ".failed"
DOWN = (STATE, REQUEST)
UP = (PROGRESS, UPDATE, FAILED, DONE)

KEY = re.compile("[0-9a-f]{32}")
"""A request's key."""


@dataclass(frozen=True)
class Answer:
    """A site's answer: facts and perhaps a file of tensors, or the reason why there are none.

    `refused` says that the site does not allow what was asked, so that asking again is in vain.
    """

    facts: dict[str, Any] = field(default_factory=dict)
    update: Path | None = None
    reason: str | None = None
    refused: bool = False


class Spool:
    """The spool of the site `site` in `folder`, which is made when missing."""

    def __init__(self, folder: str | os.PathLike, site: str):
        self.folder, self.site = Path(folder), site
        self.folder.mkdir(parents=True, exist_ok=True)

    def file(self, key: str, kind: str) -> Path:
        """Where a key's file of a kind lies, such as `REQUEST`."""
        return self.folder / f"{key}{kind}"

    def keys(self, *kinds: str) -> list[str]:
        """The keys that have a file of one of these kinds, the oldest file first."""
        found: dict[str, int] = {}
        for path in self.folder.iterdir() if self.folder.is_dir() else ():
            for kind in kinds:
                key = path.name.removesuffix(kind)
                if path.name.endswith(kind) and KEY.fullmatch(key):
                    with contextlib.suppress(FileNotFoundError):
                        found[key] = path.stat().st_mtime_ns
        return sorted(found, key=lambda key: (found[key], key))

    # The driver's side.

    def ask(self, ticket: dict[str, Any], state: Path | None = None) -> str:
        """Place a request; returns its key, and changes nothing where it is there already.

        Args:
            state: a file on the same disk that goes with it, and is taken: `ticket["state"]` is
                what `digest` says of it.
        """
        key = key_of(ticket)
        if self.file(key, REQUEST).exists():
            if state is not None:
                state.unlink()
            return key
        if state is not None:
            os.replace(state, self.file(key, STATE))
        write_text(self.file(key, REQUEST), json.dumps({**ticket, "key": key}, indent=1))
        return key

    def withdraw(self, key: str) -> None:
        """Take a request back; what the site has of it, it then removes."""
        for kind in reversed(DOWN):
            self.file(key, kind).unlink(missing_ok=True)

    def withdraw_all(self, but: set[str] | frozenset[str] = frozenset()) -> None:
        """Take back all requests but those with these keys, and what a killed driver left."""
        remove_leftovers(self.folder)
        for key in self.keys(*DOWN):
            if key not in but:
                self.withdraw(key)

    def answer(self, key: str) -> Answer | None:
        """The answer to a request, its file as the site wrote it; None if there is none yet.

        Raises:
            InputError: it is not the site's own answer to that key, or a file was changed or cut.
        """
        if self.file(key, DONE).exists():
            said = self._sealed(key, DONE)
            update = self.file(key, UPDATE) if said["file"] else None
            if update is not None:
                check_digest(update, said["file"], f"the answer of site {self.site}")
            return Answer(said["facts"], update)
        if self.file(key, FAILED).exists():
            said = self._sealed(key, FAILED)
            return Answer(reason=str(said["reason"]), refused=bool(said["refused"]))
        return None

    def reject(self, key: str) -> None:
        """Remove an answer that is of no use, so that the site gives it again."""
        for kind in reversed(UP):
            self.file(key, kind).unlink(missing_ok=True)

    def progress(self, key: str) -> dict[str, Any]:
        """How far the site is with a request; empty where it has not begun."""
        try:
            return read_json(self.file(key, PROGRESS))
        except InputError:
            return {}

    def _sealed(self, key: str, kind: str) -> dict[str, Any]:
        path = self.file(key, kind)
        said = read_json(path)
        who = f"the answer of site {self.site}"
        if said.pop("seal", None) != _seal(said):
            raise InputError(f"{who}, {path}: it was changed on its way")
        for name, expected in (("site", self.site), ("key", key)):
            if said.get(name) != expected:
                raise InputError(
                    f"{who}, {path}: it is for {name} {said.get(name)!r}, expected {expected!r}"
                )
        return said

    # The site's side.

    def requests(self) -> list[str]:
        """The keys of requests that have no answer yet, the oldest first."""
        answered = set(self.keys(DONE, FAILED))
        return [key for key in self.keys(REQUEST) if key not in answered]

    def ticket(self, key: str) -> dict[str, Any]:
        """A request's ticket; `InputError` if it is not what its key stands for."""
        path = self.file(key, REQUEST)
        ticket = read_json(path)
        ticket.pop("key", None)
        if key_of(ticket) != key:
            raise InputError(f"{path}: the ticket was changed on its way")
        return ticket

    def is_asked(self, key: str) -> bool:
        """Whether a request still stands."""
        return self.file(key, REQUEST).exists()

    def tell(self, key: str, progress: dict[str, Any]) -> None:
        """Say how far the site is."""
        with atomic_write(self.file(key, PROGRESS), sync=False) as file:
            file.write(json.dumps(progress).encode())

    def give(self, key: str, facts: dict[str, Any], update: Path | None = None) -> None:
        """Answer a request; `update` is a file on the same disk, which is taken."""
        said = digest(update) if update is not None else None
        if update is not None:
            os.replace(update, self.file(key, UPDATE))
        self._say(key, DONE, {"file": said, "facts": facts})

    def fail(self, key: str, reason: str, refused: bool = False) -> None:
        """Answer a request with the reason why it came to nothing."""
        self._say(key, FAILED, {"reason": reason, "refused": refused})

    def _say(self, key: str, kind: str, said: dict[str, Any]) -> None:
        said = {"key": key, "site": self.site, **said}
        write_text(self.file(key, kind), json.dumps({**said, "seal": _seal(said)}))
        self.file(key, PROGRESS).unlink(missing_ok=True)

    def forget(self) -> None:
        """Remove answers whose requests are gone, and what a killed site left half written."""
        remove_leftovers(self.folder)
        for key in self.keys(*UP):
            if not self.is_asked(key):
                self.reject(key)


def key_of(ticket: dict[str, Any]) -> str:
    """The key of a ticket, 32 hex digits."""
    return _seal(ticket)[:32]


def _seal(value: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


def digest(path: Path) -> dict[str, Any]:
    """A file's `sha256` in hex digits, and its `bytes`."""
    found = hashlib.sha256()
    with open(path, "rb") as file:
        while chunk := file.read(2**20):
            found.update(chunk)
        return {"sha256": found.hexdigest(), "bytes": file.tell()}


def check_digest(path: Path, said: dict[str, Any], who: str) -> None:
    """`InputError` unless a file is the one that `digest` described; `who` opens the message."""
    try:
        size = path.stat().st_size
    except FileNotFoundError:
        raise InputError(f"{who}, {path}: there is no such file") from None
    if size != said["bytes"]:
        raise InputError(f"{who}, {path}: it has {size} bytes, expected {said['bytes']}")
    if digest(path) != said:
        raise InputError(f"{who}, {path}: its content was changed on its way (SHA-256 differs)")
