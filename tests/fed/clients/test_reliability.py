import math

import pytest

from fed.clients import reliability
from fed.clients.measures import Explained


def test_few_samples_of_a_slice_the_same_every_time():
    assert reliability.drawn([7, 3, 9], 0) == [7, 3, 9]
    assert reliability.drawn([], 0) == []
    indices = list(range(100, 0, -1))
    drawn = reliability.drawn(indices, 1)
    assert len(set(drawn)) == len(drawn) == reliability.LEAST
    assert drawn == sorted(drawn, reverse=True)  # in the slice's order
    assert drawn == reliability.drawn(indices, 1) != reliability.drawn(indices, 2)
    assert len(reliability.drawn(range(2000), 0)) == round(reliability.SHARE * 2000)
    assert len(reliability.drawn(range(10**6), 0)) == reliability.MOST


def test_what_was_told_is_read():
    told = Explained(1.5, 4.0, 0.7, 12, 5)
    assert reliability.read(told._asdict()) == told
    assert reliability.read(None) is None


@pytest.mark.parametrize(
    ("told", "said"),
    [
        (0.5, "own, other, spread, tokens, samples are expected, found 0.5"),
        ({"own": 1.0}, "are expected"),
        ({"own": "1", "other": 2.0, "spread": 0.1, "tokens": 3, "samples": 1}, "numbers from 0 to"),
        (
            {"own": True, "other": 2.0, "spread": 0.1, "tokens": 3, "samples": 1},
            "numbers from 0 to",
        ),
        (
            {"own": -1.0, "other": 2.0, "spread": 0.1, "tokens": 3, "samples": 1},
            "numbers from 0 to",
        ),
        (
            {"own": 1.0, "other": math.nan, "spread": 0.1, "tokens": 3, "samples": 1},
            "numbers from 0 to",
        ),
        (
            {"own": 1.0, "other": math.inf, "spread": 0.1, "tokens": 3, "samples": 1},
            "numbers from 0 to",
        ),
        (
            {"own": 1.0, "other": 1e300, "spread": 0.1, "tokens": 3, "samples": 1},
            "numbers from 0 to",
        ),
    ],
)
def test_nonsense_is_refused(told, said):
    with pytest.raises(ValueError, match=said):
        reliability.read(told)
