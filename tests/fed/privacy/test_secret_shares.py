import itertools

import pytest

from fed.privacy.keys import new_seed
from fed.privacy.secret_shares import combine, split
from tests.fed.privacy.federation import Federation


@pytest.mark.parametrize(("count", "threshold"), [(3, 2), (3, 3), (5, 3), (8, 6)])
def test_any_threshold_of_shares_is_the_secret(count, threshold):
    terms = Federation(count, threshold=threshold, least=2).terms
    secret = new_seed()
    shares = split(secret, terms)
    assert list(shares) == list(terms.names)
    assert len(set(shares.values())) == count
    for holders in itertools.combinations(shares, threshold):
        assert combine({name: shares[name] for name in holders}, terms) == secret
    assert combine(shares, terms) == secret  # more than are needed


def test_a_wrong_share_is_another_secret():
    terms = Federation(3, least=2).terms
    secret = new_seed()
    shares = {**split(secret, terms), "b": new_seed()}
    assert combine(shares, terms) != secret


def test_fewer_shares_fit_any_secret():
    """Two shares of three tell nothing: each third one makes another secret of them."""
    terms = Federation(3, threshold=3).terms
    shares = split(new_seed(), terms)
    thirds = {new_seed() for _ in range(100)}
    assert len({combine({**shares, "c": third}, terms) for third in thirds}) == 100
