"""The client of a secure sum: a message of the server in, its answer out, five times.

    client = Client(terms, "north", site_key, trusted, file=work / "sum.json")
    client.advertise()                        # round 0
    client.share_keys(roster)                 # round 1
    client.mask(shares, tensors, weight)      # round 2
    client.confirm(survivors)                 # round 3
    client.unmask(confirmations)              # round 4

Rounds and symbols are those of Bonawitz et al. 2017 (CCS), figure 4, with the steps against an
active adversary. The server gets for each client u of U3 shares of b_u, for each other one of U2
shares of s_u^SK, and never both: which it is follows from U3, and a client signs one U3 and unmasks
that one. The same message again gets the same answer, byte by byte; another one is refused.
"""

from __future__ import annotations

import hashlib
from collections.abc import Collection, Iterator, Mapping
from pathlib import Path

import numpy as np

from fed.privacy import derived_keys
from fed.privacy.client_checks import (
    Pair,
    advertisers,
    check_confirmed,
    check_survivors,
    check_terms,
    opened,
)
from fed.privacy.client_memory import Memory
from fed.privacy.envelope import decode, encode
from fed.privacy.keys import Ed25519PrivateKey, public_of, seal
from fed.privacy.masks import Masks
from fed.privacy.messages import (
    AdvertiseKeys,
    ConsistencyCheck,
    MaskedInput,
    Message,
    ShareKeys,
    Survivors,
    Unmasking,
)
from fed.privacy.secret_shares import split
from fed.privacy.terms import Terms
from fed.state import State
from llava.errors import InputError


class Client:
    """One client in one attempt."""

    def __init__(
        self,
        terms: Terms,
        name: str,
        key: Ed25519PrivateKey,
        trusted: Mapping[str, bytes],
        *,
        least: int = 3,
        threshold: int | None = None,
        file: Path | None = None,
    ):
        """Take part under `terms`, or go on with what `file` remembers.

        Args:
            key: the site's own.
            trusted: the public Ed25519 keys of the other sites, from a source that is not the
                server: one that could bring clients of its own would learn the last one's vector.
            least: the fewest clients that this site takes part with.
            threshold: the lowest that it takes part with; None: the usual one of `terms`.
            file: where the state is kept (`client_memory`); None: a client that is killed has
                dropped out, and nothing keeps this site from a second attempt at the same sum.

        Raises:
            InputError: the terms are not those of this site, or the file is not.
        """
        public = key.public_key().public_bytes_raw()
        check_terms(terms, name, public, trusted, least, threshold)
        self.terms, self.name, self._key = terms, name, key
        self._memory = Memory(terms, name, file)

    def advertise(self) -> bytes:
        """Round 0, AdvertiseKeys: two public keys, and a commitment to the self mask's seed."""
        if answer := self._memory.answer("AdvertiseKeys", b""):
            return answer
        secrets = self._memory.secrets
        message = AdvertiseKeys(
            public_of(secrets.channel_key),
            public_of(derived_keys.mask_key(self.terms, self.name, secrets.mask_key_seed)),
            derived_keys.self_mask_commitment(self.terms, self.name, secrets.self_mask_seed),
        )
        return self._memory.keep("AdvertiseKeys", b"", self._encode(message))

    def share_keys(self, roster: bytes) -> bytes:
        """Round 1, ShareKeys: for each client of U1 its shares of the two seeds, sealed.

        Raises:
            InputError: U1 is too small, a key or a signature is wrong, or two keys are the same.
        """
        if answer := self._memory.answer("ShareKeys", roster):
            return answer
        terms, secrets = self.terms, self._memory.secrets
        mask_key = split(secrets.mask_key_seed, terms)
        self_mask = split(secrets.self_mask_seed, terms)
        message = ShareKeys({}, {}, {})
        for peer, keys in advertisers(roster, terms, self.name).items():
            pair = Pair(mask_key[peer], self_mask[peer])
            commitments = derived_keys.share_commitments(terms, self.name, peer, *pair)
            channel = derived_keys.channel(
                terms, secrets.channel_key, keys, self.name, peer, whose=peer
            )
            label = derived_keys.sealed_label(terms, self.name, peer, *commitments)
            message.sealed[peer] = seal(channel, b"".join(pair), label)
            message.mask_key_commitments[peer], message.self_mask_commitments[peer] = commitments
        return self._memory.keep("ShareKeys", roster, self._encode(message))

    def mask(self, shares: bytes, tensors: State, weight: float = 1.0) -> bytearray:
        """Round 2, MaskedInputCollection: y_u = x_u + PRG(b_u) + sum_v +-PRG(s_{u,v}).

        The answer has 8 bytes a value with a ring of 64 bits. It is not kept: after a restart it is
        made again, from the same tensors and weight. From others it is refused.

        Raises:
            InputError: U2 is too small, a share is not one, a value cannot be summed, or the input
                is a second one in this attempt.
        """
        step = "MaskedInputCollection"
        known = self._memory.answer(step, shares)
        masks = Masks(self._mask_keys(self._opened(shares)), self.terms.layout.dtype)
        head = self._encode(MaskedInput(bytes(32)))  # as long as it will be
        message = bytearray(len(head) + self.terms.layout.nbytes)
        values = np.frombuffer(message, self.terms.layout.dtype, offset=len(head))
        for where, chunk in self.terms.layout.encode(tensors, weight, f"client {self.name}"):
            masks.add_to(chunk)
            values[where] = chunk
        head = self._encode(MaskedInput(hashlib.sha256(values.data).digest()))
        if known is None:
            self._memory.keep(step, shares, head)
        elif known != head:
            raise InputError(
                f"client {self.name}: a second, different input in the same attempt; its masks "
                "serve one, and a new attempt is needed"
            )
        message[: len(head)] = head
        return message

    def confirm(self, survivors: bytes) -> bytes:
        """Round 3, ConsistencyCheck: this client's signature over U3, one U3 an attempt.

        Raises:
            InputError: U3 is too small, is not a part of U2, or is without this client.
        """
        if answer := self._memory.answer("ConsistencyCheck", survivors):
            return answer
        there = decode(survivors, Survivors, self.terms).clients
        check_survivors(there, self._peers(), self.terms, self.name)
        message = self._encode(ConsistencyCheck(there))
        return self._memory.keep("ConsistencyCheck", survivors, message)

    def unmask(self, confirmations: bytes) -> bytes:
        """Round 4, Unmasking: shares of b_v for v in U3, of s_v^SK for the other v in U2.

        Afterwards this client's keys are destroyed.

        Raises:
            InputError: fewer than the threshold have signed the U3 that this client signed, or one
                has signed another: the server, or that client, has told different things.
        """
        if answer := self._memory.answer("Unmasking", confirmations):
            return answer
        there = decode(self._memory.received("ConsistencyCheck"), Survivors, self.terms).clients
        check_confirmed(confirmations, there, self.terms, self.name)
        peers = self._peers().items()
        message = Unmasking(
            {peer: pair.mask_key for peer, pair in peers if peer not in there},
            {peer: pair.self_mask for peer, pair in peers if peer in there},
        )
        return self._memory.keep("Unmasking", confirmations, self._encode(message))

    def _encode(self, message: Message) -> bytes:
        return encode(message, self.terms, self.name, self._key)

    def _advertised(self) -> dict[str, AdvertiseKeys]:
        """The keys of U1, of the roster that was answered."""
        return advertisers(self._memory.received("ShareKeys"), self.terms, self.name)

    def _opened(self, shares: bytes) -> dict[str, Pair]:
        private = self._memory.secrets.channel_key
        return opened(shares, self._advertised(), self.terms, self.name, private)

    def _peers(self) -> dict[str, Pair]:
        """What each client of U2 has dealt to this one."""
        return self._opened(self._memory.received("MaskedInputCollection"))

    def _mask_keys(self, peers: Collection[str]) -> Iterator[tuple[bytes, int]]:
        """The keys of this client's masks, each with its sign."""
        terms, secrets = self.terms, self._memory.secrets
        yield derived_keys.self_mask(terms, self.name, secrets.self_mask_seed), 1
        own = derived_keys.mask_key(terms, self.name, secrets.mask_key_seed)
        advertised = self._advertised()
        for peer in peers:
            if peer != self.name:
                public = advertised[peer].mask_key
                key = derived_keys.pair_mask(terms, own, public, self.name, peer, whose=peer)
                yield key, derived_keys.sign(self.name, peer)
