"""A client's side of a round of which the server gets sums alone (`fed/privacy`).

The server asks for one step of one exchange at a time. What a client adds to an exchange's sum are
the terms of its method's `Sums`, of what its task has left. It trusts the server with nothing: the
exchange's name has the digest of what the server gives for it, of the flags of the task and of what
the task began with, and every signature covers that name: clients that were given different ones
cannot take part in one sum, so that none is made to stand still beside another. Range and names of
the terms are what client and run have agreed on.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fed.methods.interface.explained_sums import ExplainedSums
from fed.methods.interface.method import Method
from fed.methods.interface.sums import Own, Sums, begun_with
from fed.privacy.client import Client
from fed.privacy.keys import Ed25519PrivateKey
from fed.privacy.layout import Layout
from fed.privacy.terms import Terms
from fed.state import State, fingerprint
from llava.errors import InputError

_COVERS = (
    "; it covers what is given for the sum, the run's flags, and what the round's task began with"
)
_SPREAD = 2.0**-20  # of a bound: the rounding with which terms may be beyond it


@dataclass(frozen=True)
class Agreed:
    """What all sides of a round know before it.

    Attributes:
        run: the run's name, 32 hex digits.
        round: from 1.
        weight: the largest weight that a client may have.
        norm: the largest Euclidean norm of what a client sends, or of one layer of it.
        least: the fewest clients whose sum the server may learn.
        threshold: how many clients it takes to unmask a sum; None: the usual number.
        settings: a digest of the flags that all clients train with.
    """

    run: str
    round: int
    weight: float
    norm: float
    least: int = 3
    threshold: int | None = None
    settings: str = ""

    def layout(self, sums: Sums, terms: State, clients: int) -> Layout:
        """The layout of the vectors of `clients` clients with terms like these."""
        bounds = {
            name: max(1.0, sums.bound(name, self.weight, self.norm)) * (1 + _SPREAD)
            for name in terms
        }
        return Layout.of(terms, bounds, clients)


@dataclass(frozen=True)
class SumRequest:
    """One step of one exchange, as the server asks a client for it.

    Attributes:
        exchange: 0, 1, … of the round.
        step: one of `fed.privacy.client_memory.STEPS`.
        terms: of the attempt, `Terms.to_bytes`.
        message: the server's for this step; empty in the first.
        given: what the server gives for the exchange.
    """

    exchange: int
    step: str
    terms: bytes
    message: bytes
    given: State


def sums_of(method: Method, options: Mapping[str, Any], explains: bool) -> Sums:
    """A method's two sides; `explains` has clients weigh by what their pictures explain."""
    sums = method.summed(options)
    return ExplainedSums(sums) if explains else sums


def exchange_name(exchange: int, given: State, settings: str, begun: Mapping[str, str]) -> str:
    """The name of an exchange in its terms: the number, and a digest of what is given for it, of
    `Agreed.settings`, and of what all its clients have begun with (`begun_with`)."""
    about = json.dumps([fingerprint(given), settings, sorted(begun.items())])
    return f"e{exchange}-{hashlib.sha256(about.encode()).hexdigest()[:56]}"


def common_of(sums: Sums, exchange: int, begun: Mapping[str, str]) -> dict[str, str]:
    """Of the digests of `begun_with` those that an exchange's name covers."""
    return {name: begun[name] for name in sums.common(exchange, begun)}


class SumClient:
    """One client in the sums of one round.

    Args:
        key: the site's own; `trusted` are the public keys of the others, by name, from a source
            that is not the server.
        folder: of the client's own, for what it remembers of each exchange.
        own: what its task has left.
    """

    def __init__(
        self,
        name: str,
        key: Ed25519PrivateKey,
        trusted: Mapping[str, bytes],
        folder: Path,
        sums: Sums,
        own: Own,
        agreed: Agreed,
    ):
        self.name, self.folder = name, folder
        self._key, self._trusted = key, trusted
        self._sums, self._own, self._agreed = sums, own, agreed
        if not 0 < own.weight <= agreed.weight:
            raise InputError(
                f"client {name}: its weight is not above 0 and at most {agreed.weight:g}, as agreed"
            )
        self._begun = begun_with(own.base) if own.begun is None else own.begun

    def answer(self, request: SumRequest) -> bytes | bytearray:
        """The client's message for a step; the same request has the same answer.

        Raises:
            InputError: the request is not one of this round, or what was agreed.
        """
        terms = self._checked(request)
        client = Client(
            terms,
            self.name,
            self._key,
            self._trusted,
            least=self._agreed.least,
            threshold=self._agreed.threshold,
            file=self.folder / f"sum-{self._agreed.round:04d}-{request.exchange}.json",
        )
        if request.step == "MaskedInputCollection":
            return client.mask(request.message, self._terms(request, terms))
        answers = {
            "AdvertiseKeys": lambda message: client.advertise(),
            "ShareKeys": client.share_keys,
            "ConsistencyCheck": client.confirm,
            "Unmasking": client.unmask,
        }
        if request.step not in answers:
            raise InputError(f"client {self.name}: there is no step {request.step!r:.100}")
        return answers[request.step](request.message)

    def _checked(self, request: SumRequest) -> Terms:
        """The terms of a request, if it is one of this round's exchanges."""
        terms = Terms.from_bytes(request.terms)
        if not 0 <= request.exchange < self._sums.most_exchanges:
            raise InputError(
                f"client {self.name}: is asked for exchange {request.exchange}; "
                f"{self._sums.method.name} has {self._sums.most_exchanges}"
            )
        expected = {
            "run": self._agreed.run,
            "round": self._agreed.round,
            "exchange": exchange_name(
                request.exchange,
                request.given,
                self._agreed.settings,
                common_of(self._sums, request.exchange, self._begun),
            ),
        }
        for name, value in expected.items():
            if getattr(terms, name) != value:
                raise InputError(
                    f"client {self.name}: the terms' {name} is {getattr(terms, name)!r}, "
                    f"expected {value!r}" + _COVERS * (name == "exchange")
                )
        return terms

    def _terms(self, request: SumRequest, terms: Terms) -> State:
        """This client's terms, of the layout that was agreed."""
        found = self._sums.terms(request.exchange, self._own, request.given)
        if terms.layout != self._agreed.layout(self._sums, found, len(terms.sites)):
            raise InputError(
                f"client {self.name}: the vector that the server asks for is not that of "
                f"{self._sums.method.name} with the agreed weight and norm"
            )
        return found
