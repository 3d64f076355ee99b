import pytest

from fed.numerics.shrinkage import LEAST, drawn_shares


def test_shares_stay_in_range():
    sums = {"misled": [9.0, 3.0, 0.0], "perfect": [0.0, 5.0, 0.0], "nothing": [0.0, 0.0, 0.0]}
    shares = drawn_shares(sums, sums)
    assert shares == {"misled": LEAST, "perfect": 1.0, "nothing": LEAST}


@pytest.mark.parametrize("told", [[1.0, 1e-160, 0.0], [1.0, 1e-200, 1.0], [1e15, 1e-9, 1e15]])
def test_nonsense_of_one_leaves_the_others_apart(told):
    sums = {f"sound {k}": [4.0, 10.0, 0.0] for k in range(4)} | {"none": [10.0, 10.0, 0.0]}
    shares = drawn_shares(sums | {"liar": told}, sums)
    assert shares["sound 0"] > shares["none"] + 0.2


def test_who_says_nothing_has_the_mean_of_all_that_are_known():
    sums = {"a": [2.0, 10.0, 0.0], "b": [6.0, 10.0, 0.0], "away": [0.7, 1.0, 0.0]}
    shares = drawn_shares(sums, ["a", "silent", "b"])
    assert list(shares) == ["a", "silent", "b"]
    assert shares == pytest.approx({"a": 0.8, "b": 0.4, "silent": 0.5})
    assert drawn_shares({}, "ab") == {"a": 1.0, "b": 1.0}


def test_what_may_be_an_error_of_measurement_counts_for_less():
    shares = {"a": 0.3, "b": 0.1, "c": 0.2}
    differ = 0.01  # their variance

    def measured(**errors):
        sums = {n: [1 - r, 1.0, errors.get(n, 0.0)] for n, r in shares.items()}
        return drawn_shares(sums, shares)

    assert measured() == pytest.approx(shares)
    alike = measured(a=differ, b=differ, c=differ)
    assert alike == pytest.approx(dict.fromkeys(shares, 0.2))
    part = measured(a=0.003, b=0.006)
    own = differ - 0.003  # the mean error is taken off
    assert part["a"] == pytest.approx(0.2 + 0.1 * own / (own + 0.003))
    assert part["b"] == pytest.approx(0.2 - 0.1 * own / (own + 0.006))
    alone = drawn_shares({"a": [0.7, 1.0, 0.5]}, "a")
    assert alone == {"a": pytest.approx(0.3)}
