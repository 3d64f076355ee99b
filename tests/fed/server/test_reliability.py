import pytest

from fed.clients.measures import Explained
from fed.numerics.shrinkage import drawn_shares
from fed.server.reliability import (
    DECAY,
    doubtful,
    gathered_sums,
    weighed,
)


def told(own, other, samples=4, spread=0.0):
    return Explained(own, other, spread, 10, samples)


def test_the_share_is_of_all_that_was_told_and_earlier_rounds_fade():
    new = {"a": told(6.0, 8.0, spread=1.0), "b": None, "c": told(0.0, 0.0, samples=0)}
    first = gathered_sums({}, new)
    assert first == {"a": [6.0, 8.0, 1.0]}
    second = gathered_sums(first, {"a": told(2.0, 8.0), "b": told(1.0, 4.0)})
    assert first == {"a": [6.0, 8.0, 1.0]}
    assert second == {"a": [6 * DECAY + 2, 8 * DECAY + 8, DECAY**2], "b": [1.0, 4.0, 0.0]}
    second["a"][2] = 0.0
    shares = drawn_shares(second, "ab")
    assert shares == {
        "a": pytest.approx(1 - (6 * DECAY + 2) / (8 * DECAY + 8)),
        "b": pytest.approx(0.75),
    }
    # A client that is away keeps what is known of it.
    assert gathered_sums(second, {"b": told(1.0, 4.0)})["a"] == second["a"]


def test_weights_keep_their_sum():
    assert weighed([10, 30], [0.5, 0.5]) == pytest.approx([10, 30])
    assert weighed([10, 30], [0.9, 0.1]) == pytest.approx([30, 10])


def test_whose_pictures_are_doubted():
    shares = {"a": 0.5, "b": 0.6, "c": 0.1, "d": 0.4}
    assert list(doubtful(shares)) == [("c", 0.1, 0.5)]
    assert list(doubtful({name: share / 10 for name, share in shares.items()})) == []  # too early
    assert list(doubtful({"a": 0.5, "b": 0.01})) == []  # who of the two?
