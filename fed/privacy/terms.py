"""Terms: what a server and its clients have in common before an attempt; all of it is public.

The server makes them and sends them to each client, which checks them against what it knows itself.
Each signature and each derived key covers them, so that clients with different terms cannot take
part in one sum.
"""

from __future__ import annotations

import hashlib
import json
import re
import secrets
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from functools import cached_property
from typing import Any

from fed.privacy.keys import KEY
from fed.privacy.layout import Layout, Slot
from fed.privacy.strict_json import read_object
from llava.errors import InputError

PROTOCOL = 1
"""Counts up when messages or derivations change; both sides must have the same."""

_MOST = 2**22  # bytes of terms
_PATTERNS = {
    "run": "[0-9a-f]{32}",
    "exchange": "[a-z0-9][a-z0-9_-]{0,63}",
    "attempt": "[0-9a-f]{32}",
}
_NAME = "[A-Za-z0-9][A-Za-z0-9._-]{0,127}"  # a client's, as clients.yaml has it


@dataclass(frozen=True)
class Terms:
    """One attempt at one sum.

    Attributes:
        run, round, exchange: which sum it is; a round may have several.
        attempt: 32 hex digits, new for each attempt.
        sites: the public Ed25519 key, 32 bytes, of each client that is asked.
        threshold: t, how many of the K clients it takes to unmask a sum; more than half. A server
            that lies may have fewer than 2 t - K clients on its side.
        layout: of the vectors.
        least: the fewest clients whose sum the server may learn.
    """

    run: str
    round: int
    exchange: str
    attempt: str
    sites: Mapping[str, bytes]
    threshold: int
    layout: Layout
    least: int = 3

    def __post_init__(self) -> None:
        for name, pattern in _PATTERNS.items():
            value = getattr(self, name)
            if not isinstance(value, str) or not re.fullmatch(pattern, value):
                raise InputError(f"secure sum: {name} is {value!r:.100}, expected {pattern}")
        for name in ("round", "threshold", "least"):
            if type(getattr(self, name)) is not int:
                raise InputError(
                    f"secure sum: {name} is {getattr(self, name)!r:.100}, not a number"
                )
        if self.round < 0:
            raise InputError(f"secure sum: round is {self.round}, expected 0 or more")
        for name, key in self.sites.items():
            if not re.fullmatch(_NAME, name) or len(key) != KEY:
                raise InputError(
                    f"secure sum: site {name!r:.150}: expected {_NAME} and a public key"
                )
        self._check_numbers()
        object.__setattr__(self, "sites", dict(sorted(self.sites.items())))

    def _check_numbers(self) -> None:
        count = len(self.sites)
        if len(set(self.sites.values())) < count:
            raise InputError("secure sum: two sites have the same public key")
        if self.layout.clients != count:
            raise InputError(
                f"secure sum: the layout is for {self.layout.clients} clients, there are {count}"
            )
        if not 2 <= self.least <= count:
            raise InputError(
                f"secure sum of {count} clients: the least is {self.least}, expected 2 to {count}"
            )
        if not count < 2 * self.threshold <= 2 * count:
            raise InputError(
                f"secure sum of {count} clients: the threshold is {self.threshold}, "
                f"expected {count // 2 + 1} to {count}"
            )

    @classmethod
    def new(
        cls,
        run: str,
        round: int,
        exchange: str,
        sites: Mapping[str, bytes],
        layout: Layout,
        threshold: int | None = None,
        least: int = 3,
    ) -> Terms:
        """The terms of a new attempt; `threshold` is the usual one where none is given."""
        if threshold is None:
            threshold = usual_threshold(len(sites))
        attempt = secrets.token_hex(16)
        return cls(run, round, exchange, attempt, sites, threshold, layout, least)

    @property
    def names(self) -> tuple[str, ...]:
        """The clients, sorted: their places are the points of secret sharing."""
        return tuple(self.sites)

    @property
    def needed(self) -> int:
        """How many clients must be there up to the masked inputs: the threshold, or `least`."""
        return max(self.threshold, self.least)

    @property
    def context(self) -> dict[str, Any]:
        """What every message of this attempt says of it."""
        known = {name: getattr(self, name) for name in ("run", "round", "exchange", "attempt")}
        return {**known, "terms": self.digest}

    def label(self, purpose: str, *names: str) -> bytes:
        """A label for a key or a commitment of this attempt, which no other use has."""
        context = ["fedllava secure sum", PROTOCOL, *self.context.values()]
        return json.dumps([*context, purpose, *names]).encode()

    @cached_property
    def digest(self) -> str:
        """SHA-256 of all of it, 64 hex digits."""
        return hashlib.sha256(self.to_bytes()).hexdigest()

    def to_bytes(self) -> bytes:
        values = {**vars(self), "protocol": PROTOCOL, "layout": asdict(self.layout)}
        values["sites"] = {name: key.hex() for name, key in self.sites.items()}
        kept = {"protocol", *self.__dataclass_fields__}
        return json.dumps({n: v for n, v in values.items() if n in kept}, sort_keys=True).encode()

    @classmethod
    def from_bytes(cls, data: bytes) -> Terms:
        """Terms as they came from the server; `InputError` if they are not well formed."""
        who = "the server's terms of a secure sum"
        values = read_object(data, _MOST, who)
        if values.get("protocol") != PROTOCOL:
            raise InputError(
                f"{who} are of version {values.get('protocol')!r:.20}, this site's of {PROTOCOL}: "
                "install the same fedllava on both sides"
            )
        try:
            del values["protocol"]
            layout = values["layout"]
            layout["slots"] = tuple(Slot(**_slot(slot)) for slot in layout["slots"])
            values["layout"] = Layout(**layout)
            values["sites"] = {n: bytes.fromhex(key) for n, key in values["sites"].items()}
            terms = cls(**values)
        except InputError:
            raise
        except (KeyError, TypeError, ValueError, AttributeError, OverflowError) as error:
            raise InputError(f"{who} are not well formed ({error})") from None
        if terms.to_bytes() != bytes(data):
            raise InputError(f"{who} are not in the one form that terms have")
        return terms


def usual_threshold(count: int) -> int:
    """floor(2 K / 3) + 1: a server that lies may have a third of the clients on its side."""
    return 2 * count // 3 + 1


def _slot(given: dict[str, Any]) -> dict[str, Any]:
    return {**given, "shape": tuple(given["shape"])}
