"""Keys and commitments that both a client and the server, or two clients, derive alike."""

from __future__ import annotations

from fed.privacy.keys import agree, commit, derive
from fed.privacy.messages import AdvertiseKeys
from fed.privacy.terms import Terms


def mask_key(terms: Terms, client: str, seed: bytes) -> bytes:
    """s_u^SK, from the seed that is shared in its place."""
    return derive(seed, terms.label("mask key", client))


def self_mask(terms: Terms, client: str, seed: bytes) -> bytes:
    """The key of the mask PRG(b_u)."""
    return derive(seed, terms.label("self mask", client))


def pair_mask(
    terms: Terms, private: bytes, public: bytes, client: str, peer: str, whose: str
) -> bytes:
    """The key of the mask PRG(s_{u,v}); `whose` is the owner of `public`."""
    return agree(private, public, terms.label("pair mask", *sorted((client, peer))), whose)


def sign(client: str, peer: str) -> int:
    """Delta_{u,v}: with which sign `client` adds the mask that it shares with `peer`."""
    return 1 if client > peer else -1


def channel(
    terms: Terms, private: bytes, keys: AdvertiseKeys, dealer: str, holder: str, whose: str
) -> bytes:
    """The key with which `dealer` seals shares for `holder`; `whose` advertised `keys`."""
    return agree(private, keys.channel_key, terms.label("channel", dealer, holder), whose)


def sealed_label(terms: Terms, dealer: str, holder: str, *commitments: bytes) -> bytes:
    """The data that is authenticated with sealed shares."""
    return terms.label("sealed shares", dealer, holder, *(each.hex() for each in commitments))


def self_mask_commitment(terms: Terms, client: str, seed: bytes) -> bytes:
    return commit(terms.label("self mask seed", client), seed)


def share_commitment(terms: Terms, kind: str, dealer: str, holder: str, share: bytes) -> bytes:
    """A dealer's commitment to a holder's share; `kind` is "mask key" or "self mask"."""
    return commit(terms.label(f"{kind} share", dealer, holder), share)


def share_commitments(
    terms: Terms, dealer: str, holder: str, mask_key_share: bytes, self_mask_share: bytes
) -> tuple[bytes, bytes]:
    """Those to both shares of a holder."""
    return (
        share_commitment(terms, "mask key", dealer, holder, mask_key_share),
        share_commitment(terms, "self mask", dealer, holder, self_mask_share),
    )
