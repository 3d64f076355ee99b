"""Shamir's secret sharing: any `threshold` of a secret's shares make it, fewer tell nothing of it.

The scheme is pycryptodome's, over GF(2^128): secrets and shares have 16 bytes. A client's two
secrets are seeds of 16 bytes, from which its mask key pair and its self mask's key are derived, so
that each is shared in one piece [R]; the paper shares the private key itself. With 128 bits they
are as strong as X25519, and labels keep them apart: many seeds are no easier to search than one.

The library's shares carry no proof. Their dealer therefore commits to each of them, in a message
that it signs (`messages.ShareKeys`).
"""

from __future__ import annotations

from collections.abc import Mapping

from fed.privacy.terms import Terms
from llava.errors import InputError

try:
    from Crypto.Protocol.SecretSharing import Shamir
except ImportError:
    raise InputError("secure sums need pip install 'fedllava[privacy]'") from None


def split(secret: bytes, terms: Terms) -> dict[str, bytes]:
    """A share of 16 bytes for each client of the terms; its place there is the share's point."""
    shares = Shamir.split(terms.threshold, len(terms.names), secret)
    return {holder: share for holder, (_, share) in zip(terms.names, shares, strict=True)}


def combine(shares: Mapping[str, bytes], terms: Terms) -> bytes:
    """The secret of 16 bytes, from the first shares that make the threshold, by holder.

    Shares that are not of one secret make another one, and no error.
    """
    point = {holder: i for i, holder in enumerate(terms.names, start=1)}
    return Shamir.combine([(point[h], shares[h]) for h in sorted(shares)][: terms.threshold])
