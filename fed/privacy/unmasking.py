"""The keys of the masks that are left in a sum, from the shares that clients give at the end."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

from fed.privacy import derived_keys
from fed.privacy.keys import public_of
from fed.privacy.messages import AdvertiseKeys, ShareKeys, Unmasking
from fed.privacy.secret_shares import combine
from fed.privacy.terms import Terms
from llava.errors import InputError


def check_shares(
    message: Unmasking,
    holder: str,
    dealt: Mapping[str, ShareKeys],
    survivors: Sequence[str],
    terms: Terms,
) -> None:
    """Whether a client gives the shares that are asked for, each as its dealer committed to it.

    Args:
        dealt: the messages of U2.
        survivors: U3.

    Raises:
        InputError: it does not; the message names holder and dealer.
    """
    kinds = (
        ("mask key", message.mask_key_shares, dealt.keys() - set(survivors)),
        ("self mask", message.self_mask_shares, set(survivors)),
    )
    for kind, shares, expected in kinds:
        if shares.keys() != expected:
            raise InputError(
                f"client {holder}: gives shares of the {kind} of {_list(shares)}, "
                f"expected {_list(expected)}"
            )
        for dealer, share in shares.items():
            commitment = derived_keys.share_commitment(terms, kind, dealer, holder, share)
            if commitment != dealt[dealer].commitments(kind)[holder]:
                raise InputError(
                    f"client {holder}: its share of the {kind} of client {dealer} is not the one "
                    f"that {dealer} committed to"
                )


def mask_keys(
    messages: Mapping[str, Unmasking],
    advertised: Mapping[str, AdvertiseKeys],
    dropped: Sequence[str],
    survivors: Sequence[str],
    terms: Terms,
) -> Iterator[tuple[bytes, int]]:
    """The key of each mask in the sum over U3, with its sign.

    These are PRG(b_u) for each u of U3, and the mask that u shares with each of `dropped`, U2 less
    U3; masks of two survivors are not in it.

    Args:
        messages: of the holders, U5, with shares that were checked.

    Raises:
        InputError: the shares that a client dealt make another secret than it committed to.
    """
    for client in survivors:
        seed = combine({h: m.self_mask_shares[client] for h, m in messages.items()}, terms)
        commitment = derived_keys.self_mask_commitment(terms, client, seed)
        _check_dealer(commitment == advertised[client].self_mask, client, "self mask")
        yield derived_keys.self_mask(terms, client, seed), 1
    for client in dropped:
        seed = combine({h: m.mask_key_shares[client] for h, m in messages.items()}, terms)
        private = derived_keys.mask_key(terms, client, seed)
        _check_dealer(public_of(private) == advertised[client].mask_key, client, "mask key")
        for peer in survivors:
            public = advertised[peer].mask_key
            key = derived_keys.pair_mask(terms, private, public, client, peer, whose=peer)
            yield key, derived_keys.sign(peer, client)


def _check_dealer(right: bool, client: str, kind: str) -> None:
    if not right:
        raise InputError(
            f"client {client}: the shares that it dealt do not make the {kind} that it advertised"
        )


def _list(clients: object) -> str:
    return ", ".join(sorted(clients)) or "nobody"  # type: ignore[call-overload]
