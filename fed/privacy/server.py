"""The server of a secure sum: messages of clients in, messages to clients out, step by step.

    server = Server(terms)
    server.receive("north", message)     # of each client, in any order
    server.waiting                       # of whom nothing has come yet
    server.proceed()                     # the step is over: the next message to each client
    total = server.finish()              # after the last step

Steps and sets are those of Bonawitz et al. 2017 (CCS), figure 4. The server has no secrets and
draws no random numbers: one that was killed is what it was after the same messages in the same
order. A masked input is added to the sum as it comes, and not kept.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from fed.privacy.client_memory import STEPS
from fed.privacy.envelope import decode, encode, head_of
from fed.privacy.fixed_point import Ring
from fed.privacy.layout import CHUNK
from fed.privacy.masks import Masks
from fed.privacy.messages import (
    AdvertiseKeys,
    Confirmations,
    ConsistencyCheck,
    MaskedInput,
    Message,
    Roster,
    ShareKeys,
    Shares,
    Survivors,
    Unmasking,
)
from fed.privacy.terms import Terms
from fed.privacy.unmasking import check_shares, mask_keys
from fed.state import State
from llava.errors import InputError

_KINDS = (AdvertiseKeys, ShareKeys, MaskedInput, ConsistencyCheck, Unmasking)


@dataclass(frozen=True)
class Total:
    """sum_k weight_k x_k (float32), sum_k weight_k, and the clients k: U3."""

    sums: State
    weight: float
    clients: tuple[str, ...]


class Server:
    """One attempt at one sum."""

    def __init__(self, terms: Terms):
        self.terms = terms
        self._step = 0
        self._there = terms.names  # who may answer in this step
        self._heads: dict[str, set[bytes]] = {name: set() for name in terms.names}
        self._raw: dict[str, bytes] = {}  # of this step
        self._advertised: dict[str, AdvertiseKeys] = {}
        self._dealt: dict[str, ShareKeys] = {}
        self._survivors: tuple[str, ...] = ()
        self._unmasking: dict[str, Unmasking] = {}
        self._total = np.zeros(0, terms.layout.dtype)

    @property
    def step(self) -> str:
        """The step whose messages are received."""
        return STEPS[self._step]

    @property
    def waiting(self) -> list[str]:
        """The clients whose message of this step has not come."""
        return [name for name in self._there if name not in self._raw]

    def receive(self, sender: str, data: Any) -> None:
        """Take a client's message, bytes or a buffer such as a mapped file.

        One that has come before is passed over. After an `InputError` all is as it was: the client
        may send another message, or is dropped by `proceed`.

        Raises:
            InputError: the message is not one of this client, step and attempt, is a second one, or
                what it says is wrong; it names the client.
        """
        if sender not in self.terms.sites:
            raise InputError(f"client {sender} is not one of this secure sum")
        if (head := head_of(data)) in self._heads[sender]:
            return
        message: Message = decode(data, _KINDS[self._step], self.terms, sender)
        if sender in self._raw:
            raise InputError(f"client {sender}: a second, different message in {self.step}")
        if sender not in self._there:
            raise InputError(f"client {sender}: has dropped out: it was not in time before")
        self._take(sender, message)
        self._heads[sender].add(head)
        self._raw[sender] = head

    def proceed(self) -> dict[str, bytes]:
        """End this step without those who are waited for; the messages that begin the next.

        Raises:
            InputError: too few clients are there; nothing is revealed, and more may yet come.
        """
        there = self._enough()
        step, terms = _KINDS[self._step], self.terms
        messages: dict[str, Message]
        if step is AdvertiseKeys:
            messages = dict.fromkeys(there, Roster(self._raw))
        elif step is ShareKeys:
            messages = {name: self._shares_for(name) for name in there}
        elif step is MaskedInput:
            self._survivors = there
            messages = dict.fromkeys(there, Survivors(there))
        elif step is ConsistencyCheck:
            messages = dict.fromkeys(there, Confirmations(self._raw))
        else:
            raise RuntimeError("the last step ends with finish()")
        answers = {name: encode(message, terms) for name, message in messages.items()}
        self._step, self._there, self._raw = self._step + 1, there, {}
        return answers

    def finish(self) -> Total:
        """The sum over U3, once the threshold of clients have given their shares.

        Raises:
            InputError: too few have, or the shares that a client dealt are of no use.
        """
        total = self._unmasked()
        return Total(*self.terms.layout.decode(total), self._survivors)

    def _unmasked(self) -> Ring:
        """The sum in the ring."""
        if _KINDS[self._step] is not Unmasking:
            raise RuntimeError(f"{self.step} is not the last step")
        self._enough()
        dropped = [name for name in self._dealt if name not in self._survivors]
        keys = mask_keys(self._unmasking, self._advertised, dropped, self._survivors, self.terms)
        masks = Masks([(key, -sign) for key, sign in keys], self.terms.layout.dtype)
        total = self._total.copy()  # so that it may be asked for again
        for start in range(0, len(total), CHUNK):
            masks.add_to(total[start : start + CHUNK])
        return total

    def _take(self, sender: str, message: Message) -> None:
        """Check what a message says, and remember it."""
        if isinstance(message, AdvertiseKeys):
            _check_new_keys(message, sender, self._advertised)
            self._advertised[sender] = message
        elif isinstance(message, ShareKeys):
            self._check_shared(message, sender)
            self._dealt[sender] = message
        elif isinstance(message, MaskedInput):
            if not len(self._total):
                self._total = np.zeros(self.terms.layout.size, self.terms.layout.dtype)
            self._total += message.values
        elif isinstance(message, ConsistencyCheck):
            if message.survivors != self._survivors:
                raise InputError(
                    f"client {sender}: signed the survivors {', '.join(message.survivors)}, "
                    f"expected {', '.join(self._survivors)}"
                )
        elif isinstance(message, Unmasking):
            check_shares(message, sender, self._dealt, self._survivors, self.terms)
            self._unmasking[sender] = message

    def _check_shared(self, message: ShareKeys, sender: str) -> None:
        parts = (message.sealed, message.mask_key_commitments, message.self_mask_commitments)
        for part in parts:
            if part.keys() != set(self._there):
                raise InputError(
                    f"client {sender}: deals shares to {', '.join(part)}, expected "
                    f"{', '.join(self._there)}"
                )

    def _shares_for(self, name: str) -> Shares:
        """What each of U2 has dealt to `name`."""
        dealt = {dealer: self._dealt[dealer] for dealer in sorted(self._dealt)}
        return Shares(
            {dealer: message.sealed[name] for dealer, message in dealt.items()},
            {dealer: message.mask_key_commitments[name] for dealer, message in dealt.items()},
            {dealer: message.self_mask_commitments[name] for dealer, message in dealt.items()},
        )

    def _enough(self) -> tuple[str, ...]:
        """The clients whose message of this step is there."""
        there = tuple(name for name in self._there if name in self._raw)
        early = self._step <= STEPS.index("MaskedInputCollection")
        needed = self.terms.needed if early else self.terms.threshold
        if len(there) < needed:
            terms = self.terms
            raise InputError(
                f"secure sum {terms.exchange} of round {terms.round}: {needed} clients are needed "
                f"in {self.step}, there are {len(there)}; waiting for {', '.join(self.waiting)}"
            )
        return there


def _check_new_keys(message: AdvertiseKeys, sender: str, known: dict[str, AdvertiseKeys]) -> None:
    own = (message.channel_key, message.mask_key)
    if own[0] == own[1]:
        raise InputError(f"client {sender}: its two public keys are the same")
    for other, keys in known.items():
        if {*own} & {keys.channel_key, keys.mask_key}:
            raise InputError(f"client {sender}: advertises a key of client {other}")
