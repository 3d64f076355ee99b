import pytest

from fed.clients.measures import Explained
from fed.server.reliability import (
    DECAY,
    LEAST,
    doubtful,
    gathered_sums,
    reliabilities,
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
    shares = reliabilities(second, "ab")
    assert shares == {
        "a": pytest.approx(1 - (6 * DECAY + 2) / (8 * DECAY + 8)),
        "b": pytest.approx(0.75),
    }
    # A client that is away keeps what is known of it.
    assert gathered_sums(second, {"b": told(1.0, 4.0)})["a"] == second["a"]


def test_shares_stay_in_range():
    sums = {"misled": [9.0, 3.0, 0.0], "perfect": [0.0, 5.0, 0.0], "nothing": [0.0, 0.0, 0.0]}
    shares = reliabilities(sums, sums)
    assert shares == {"misled": LEAST, "perfect": 1.0, "nothing": LEAST}


def test_who_says_nothing_has_the_mean_of_all_that_are_known():
    sums = {"a": [2.0, 10.0, 0.0], "b": [6.0, 10.0, 0.0], "away": [0.7, 1.0, 0.0]}
    shares = reliabilities(sums, ["a", "silent", "b"])
    assert list(shares) == ["a", "silent", "b"]
    assert shares == pytest.approx({"a": 0.8, "b": 0.4, "silent": 0.5})
    assert reliabilities({}, "ab") == {"a": 1.0, "b": 1.0}


def test_what_may_be_an_error_of_measurement_counts_for_less():
    shares = {"a": 0.3, "b": 0.1, "c": 0.2}
    differ = 0.01  # their variance

    def measured(**errors):
        sums = {n: [1 - r, 1.0, errors.get(n, 0.0)] for n, r in shares.items()}
        return reliabilities(sums, shares)

    assert measured() == pytest.approx(shares)
    alike = measured(a=differ, b=differ, c=differ)
    assert alike == pytest.approx(dict.fromkeys(shares, 0.2))
    part = measured(a=0.003, b=0.006)
    own = differ - 0.003  # the mean error is taken off
    assert part["a"] == pytest.approx(0.2 + 0.1 * own / (own + 0.003))
    assert part["b"] == pytest.approx(0.2 - 0.1 * own / (own + 0.006))
    alone = reliabilities({"a": [0.7, 1.0, 0.5]}, "a")
    assert alone == {"a": pytest.approx(0.3)}


def test_weights_keep_their_sum():
    assert weighed([10, 30], [0.5, 0.5]) == pytest.approx([10, 30])
    assert weighed([10, 30], [0.9, 0.1]) == pytest.approx([30, 10])


def test_whose_pictures_are_doubted():
    shares = {"a": 0.5, "b": 0.6, "c": 0.1, "d": 0.4}
    assert list(doubtful(shares)) == [("c", 0.1, 0.5)]
    assert list(doubtful({name: share / 10 for name, share in shares.items()})) == []  # too early
    assert list(doubtful({"a": 0.5, "b": 0.01})) == []  # who of the two?
