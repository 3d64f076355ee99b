"""Messages of a secure sum: what each side says, step by step. `envelope` has how they travel.

Names and steps are those of Bonawitz et al. 2017 (CCS), figure 4, the protocol against an active
adversary; U1 to U5 are the clients that are there after rounds 0 to 4.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any, ClassVar

from fed.privacy.fixed_point import Ring
from fed.privacy.keys import KEY, SEALED, SEED
from fed.privacy.strict_json import Form, by_client, clients, encoded, octets

_DIGEST = 32


def _field(form: Form) -> Any:
    """A field of the header, in a form that is checked."""
    return dataclasses.field(metadata={"form": form})


@dataclass(frozen=True)
class Message:
    """A kind of message; `of_client` is whether clients send it, signed, or the server."""

    of_client: ClassVar[bool] = True


@dataclass(frozen=True)
class AdvertiseKeys(Message):
    """Round 0, client: c_u^PK, s_u^PK, and a commitment to the seed b_u of its self mask [R]."""

    channel_key: bytes = _field(octets(KEY))
    mask_key: bytes = _field(octets(KEY))
    self_mask: bytes = _field(octets(_DIGEST))


@dataclass(frozen=True)
class Roster(Message):
    """Round 0, server: the messages of U1, as they came."""

    of_client = False
    advertised: dict[str, bytes] = _field(by_client(encoded))


@dataclass(frozen=True)
class ShareKeys(Message):
    """Round 1, client: for each of U1, two sealed shares (e_{u,v}) and commitments to them [R].

    A client deals to itself as to the others; the paper lets it keep that share.
    """

    sealed: dict[str, bytes] = _field(by_client(octets(SEALED)))
    mask_key_commitments: dict[str, bytes] = _field(by_client(octets(_DIGEST)))
    self_mask_commitments: dict[str, bytes] = _field(by_client(octets(_DIGEST)))

    def commitments(self, kind: str) -> dict[str, bytes]:
        """Those to shares of a "mask key" or a "self mask"."""
        return self.mask_key_commitments if kind == "mask key" else self.self_mask_commitments


@dataclass(frozen=True)
class Shares(ShareKeys):
    """Round 1, server: the same for one client, by dealer, of all of U2."""

    of_client = False


@dataclass(frozen=True)
class MaskedInput(Message):
    """Round 2, client: y_u. `values` is the body."""

    sha256: bytes = _field(octets(_DIGEST))
    values: Ring | None = None


@dataclass(frozen=True)
class Survivors(Message):
    """Round 2, server: U3, whose masked inputs came."""

    of_client = False
    clients: tuple[str, ...] = _field(clients)


@dataclass(frozen=True)
class ConsistencyCheck(Message):
    """Round 3, client: U3 as it was told; the message's signature is sigma'_u."""

    survivors: tuple[str, ...] = _field(clients)


@dataclass(frozen=True)
class Confirmations(Message):
    """Round 3, server: the messages of U4, as they came."""

    of_client = False
    confirmed: dict[str, bytes] = _field(by_client(encoded))


@dataclass(frozen=True)
class Unmasking(Message):
    """Round 4, client: its shares of s_v^SK for v in U2 less U3, and of b_v for v in U3."""

    mask_key_shares: dict[str, bytes] = _field(by_client(octets(SEED)))
    self_mask_shares: dict[str, bytes] = _field(by_client(octets(SEED)))
