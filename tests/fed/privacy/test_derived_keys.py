from fed.privacy import derived_keys, keys
from fed.privacy.messages import AdvertiseKeys
from tests.fed.privacy.federation import Federation


def derived(terms, seed, private, public):
    """All keys, labels and commitments that can be made of one secret, by what is named."""
    advertised = AdvertiseKeys(public, public, bytes(32))
    found = []
    for name in "ab":
        found += [
            derived_keys.mask_key(terms, name, seed),
            derived_keys.self_mask(terms, name, seed),
            derived_keys.self_mask_commitment(terms, name, seed),
        ]
    for one, two in ("ab", "ba", "ac", "aa"):
        found += [
            derived_keys.channel(terms, private, advertised, one, two, whose=two),
            derived_keys.sealed_label(terms, one, two, bytes(32), bytes(32)),
            *derived_keys.share_commitments(terms, one, two, seed, seed),
        ]
    for one, two in ("ab", "ac", "bc"):
        found.append(derived_keys.pair_mask(terms, private, public, one, two, whose=two))
    return found


def test_one_secret_has_another_key_for_each_use_client_and_attempt():
    made, found = Federation(4), []
    given = keys.new_seed(), keys.new_key(), keys.public_of(keys.new_key())
    for changes in ({}, {}, {"round": 2}, {"exchange": "x"}, {"least": 2}):
        made.attempt(**changes)
        found += derived(made.terms, *given)
    assert len(set(found)) == len(found) == 5 * 25
    assert derived(made.terms, *given) == found[-25:]


def test_two_clients_derive_one_mask_with_opposite_signs():
    terms = Federation(4).terms
    a, b = keys.new_key(), keys.new_key()
    one = derived_keys.pair_mask(terms, a, keys.public_of(b), "a", "b", whose="b")
    assert one == derived_keys.pair_mask(terms, b, keys.public_of(a), "b", "a", whose="a")
    assert derived_keys.sign("a", "b") == -derived_keys.sign("b", "a")


def test_a_commitment_binds():
    terms = Federation(4).terms
    seed, other = keys.new_seed(), keys.new_seed()
    for kind in ("mask key", "self mask"):
        one = derived_keys.share_commitment(terms, kind, "a", "b", seed)
        assert one == derived_keys.share_commitment(terms, kind, "a", "b", seed)
        assert one != derived_keys.share_commitment(terms, kind, "a", "b", other)
