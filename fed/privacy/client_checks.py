"""What a client believes of what the server sends: all is checked before it is used."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any, NamedTuple

from fed.privacy import derived_keys
from fed.privacy.envelope import decode
from fed.privacy.keys import SEED, unseal
from fed.privacy.messages import (
    AdvertiseKeys,
    Confirmations,
    ConsistencyCheck,
    Roster,
    Shares,
)
from fed.privacy.terms import Terms, usual_threshold
from llava.errors import InputError


class Pair(NamedTuple):
    """A holder's shares of a dealer's two seeds."""

    mask_key: bytes
    self_mask: bytes


def check_terms(
    terms: Terms,
    name: str,
    public: bytes,
    trusted: Mapping[str, bytes],
    least: int,
    threshold: int | None,
) -> None:
    """Whether a site takes part: its own key, trusted ones beside it, and enough of them."""
    if terms.sites.get(name) != public:
        raise InputError(f"client {name}: the terms of the secure sum have another key for it")
    for site, key in terms.sites.items():
        if site != name and trusted.get(site) != key:
            raise InputError(
                f"client {name}: does not trust the key that the terms have for {site}"
            )
    if terms.least < least:
        raise InputError(
            f"client {name}: the run asks for sums of {terms.least} clients or more, this site "
            f"takes part in those of {least} or more"
        )
    lowest = usual_threshold(len(terms.sites)) if threshold is None else threshold
    if terms.threshold < lowest:
        raise InputError(
            f"client {name}: the run's threshold is {terms.threshold} of {len(terms.sites)}, this "
            f"site takes part with {lowest} or more"
        )


def advertisers(roster: bytes, terms: Terms, name: str) -> dict[str, AdvertiseKeys]:
    """The keys of U1, each signed by its owner, and all different."""
    messages = decode(roster, Roster, terms).advertised
    check_size(messages, terms.needed, "clients with keys", name)
    found = {peer: decode(text, AdvertiseKeys, terms, peer) for peer, text in messages.items()}
    owners: dict[bytes, str] = {}
    for peer, keys in found.items():
        for key in (keys.channel_key, keys.mask_key):
            if key in owners:
                raise InputError(f"client {peer}: its key is one of client {owners[key]}, too")
            owners[key] = peer
    return found


def opened(
    shares: bytes, advertised: Mapping[str, AdvertiseKeys], terms: Terms, name: str, private: bytes
) -> dict[str, Pair]:
    """The two shares that each client of U2 has dealt to `name`.

    Args:
        private: the key of this client's channels.
    """
    given = decode(shares, Shares, terms)
    first, second = given.mask_key_commitments, given.self_mask_commitments
    if not first.keys() == second.keys() == given.sealed.keys() <= advertised.keys():
        raise InputError(f"client {name}: the server's shares and commitments do not match")
    check_size(given.sealed, terms.needed, "clients with shares", name)
    found = {}
    for dealer, sealed in given.sealed.items():
        key = derived_keys.channel(terms, private, advertised[dealer], dealer, name, whose=dealer)
        label = derived_keys.sealed_label(terms, dealer, name, first[dealer], second[dealer])
        plain = unseal(key, sealed, label)
        if plain is None:
            raise InputError(f"client {dealer}: what it sealed for client {name} does not open")
        pair = Pair(plain[:SEED], plain[SEED:])
        if derived_keys.share_commitments(terms, dealer, name, *pair) != (
            first[dealer],
            second[dealer],
        ):
            raise InputError(
                f"client {dealer}: the shares that it dealt to client {name} are not those that "
                "it committed to"
            )
        found[dealer] = pair
    return found


def check_survivors(
    there: tuple[str, ...], peers: Collection[str], terms: Terms, name: str
) -> None:
    """Whether U3 is a large enough part of U2 with this client."""
    if strangers := [peer for peer in there if peer not in peers]:
        raise InputError(f"client {name}: client {strangers[0]} survives, and had dealt no shares")
    check_size(there, terms.needed, "survivors", name)


def check_confirmed(confirmations: bytes, there: tuple[str, ...], terms: Terms, name: str) -> None:
    """Whether the threshold of survivors have signed the same U3 as this client."""
    confirmed = decode(confirmations, Confirmations, terms).confirmed
    for peer, message in confirmed.items():
        said = decode(message, ConsistencyCheck, terms, peer).survivors
        if said != there:
            raise InputError(
                f"client {name}: client {peer} signed the survivors {', '.join(said)}, expected "
                f"{', '.join(there)}: the server told clients different ones"
            )
        if peer not in there:
            raise InputError(f"client {name}: client {peer} signed, and is no survivor")
    check_size(confirmed, terms.threshold, "signed survivors", name)


def check_size(clients: Collection[Any], needed: int, kind: str, name: str) -> None:
    if name not in clients:
        raise InputError(f"client {name}: the server's {kind} are without this client")
    if len(clients) < needed:
        raise InputError(
            f"client {name}: {needed} {kind} are needed, there are {len(clients)}; this client "
            "sends nothing more"
        )
