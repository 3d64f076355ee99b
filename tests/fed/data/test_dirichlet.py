"""The Dirichlet cut: every sample once, sizes and skew as asked, the same for a seed anywhere."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest

from fed.data.dirichlet import dirichlet, dirichlet_owners
from llava.errors import InputError

KEYS = [f"topic {i * i % 7}" for i in range(1000)]
RECORDED = [[1, 4, 6], [7], [0, 2, 3, 5, 8, 9, 10, 11]]
RECORDED_SIZES = [[1, 6, 7], [2, 4, 5, 8, 9, 10, 11], [0, 3]]
OPTIONS = [{}, {"size_alpha": 0.5}, {"minimum": 40}, {"size_alpha": 0.2, "minimum": 40}]


@pytest.mark.parametrize("alpha", [1e-4, 0.3, 1.0, 1e6])
@pytest.mark.parametrize("options", OPTIONS)
def test_every_sample_goes_to_one_client_and_none_has_too_few(alpha, options):
    cut = dirichlet(KEYS, 12, alpha=alpha, seed=3, **options)
    assert len(cut) == 12
    assert sorted(i for part in cut for i in part) == list(range(1000))
    assert all(part == sorted(part) for part in cut)
    assert min(map(len, cut)) >= options.get("minimum", 1)
    assert all(type(i) is int for part in cut for i in part)


@pytest.mark.parametrize("options", [{}, {"size_alpha": 1.0}])
def test_the_cut_is_of_the_seed_alone(options):
    cuts = [dirichlet(KEYS, 5, alpha=0.5, seed=seed, **options) for seed in (1, 1, 2)]
    assert cuts[0] == cuts[1] != cuts[2]


def test_recorded_cuts():
    """Clients that were made once are made again, on every machine and numpy."""
    keys = ["ab"[i % 2] for i in range(12)]
    assert dirichlet(keys, 3, alpha=0.5, seed=7) == RECORDED
    assert dirichlet(keys, 3, alpha=0.5, size_alpha=1.0, seed=7) == RECORDED_SIZES


def shares(cut: list[list[int]]) -> np.ndarray:
    """(clients, keys): of each client's samples, the share of each key."""
    names = sorted(set(KEYS))
    counts = [Counter(KEYS[i] for i in part) for part in cut]
    table = np.array([[count[name] for name in names] for count in counts], dtype=float)
    return table / table.sum(1, keepdims=True)


@pytest.mark.parametrize("size_alpha", [None, 50.0])
def test_alpha_says_how_much_clients_differ(size_alpha):
    def main_share(alpha):
        options = {"alpha": alpha, "size_alpha": size_alpha}
        cuts = [dirichlet(KEYS, 5, seed=seed, minimum=1, **options) for seed in range(10)]
        return np.mean([shares(cut).max(1).mean() for cut in cuts])

    whole = max(Counter(KEYS).values()) / len(KEYS)
    assert main_share(0.01) > 0.8 > main_share(1.0) > whole + 0.05
    assert main_share(1e7) == pytest.approx(whole, abs=0.02)


def test_a_keys_shares_are_dirichlet():
    """Of one key's split over two clients, mean and variance of Beta(alpha, alpha)."""
    alpha = 0.7
    first = [
        len(dirichlet([0] * 400, 2, alpha=alpha, minimum=0, seed=seed)[0]) / 400
        for seed in range(3000)
    ]
    assert np.mean(first) == pytest.approx(0.5, abs=0.02)
    assert np.var(first) == pytest.approx(1 / (4 * (2 * alpha + 1)), rel=0.05)


def test_size_alpha_says_how_much_sizes_differ_whatever_the_keys():
    def sizes(size_alpha, alpha=0.1):
        return [len(p) for p in dirichlet(KEYS, 10, alpha=alpha, size_alpha=size_alpha, seed=5)]

    assert max(sizes(1e7)) - min(sizes(1e7)) <= 2
    assert max(sizes(0.2)) > 300
    assert sorted(sizes(0.2))[4] < 50
    assert sizes(0.2) == sizes(0.2, alpha=10.0)


def test_keys_may_be_products_and_arrays():
    pairs = [(key, i % 2) for i, key in enumerate(KEYS)]
    assert sorted(sum(dirichlet(pairs, 3, alpha=1.0, seed=0), [])) == list(range(1000))
    numbers = np.array([int(key[-1]) for key in KEYS], dtype=np.int16)
    assert dirichlet(numbers, 4, alpha=1.0, seed=0) == dirichlet(KEYS, 4, alpha=1.0, seed=0)


def test_owners_and_lists_agree():
    owner = dirichlet_owners(KEYS, 4, alpha=1.0, seed=2)
    assert (owner.dtype, owner.shape) == (np.int32, (1000,))
    parts = dirichlet(KEYS, 4, alpha=1.0, seed=2)
    assert all(owner[i] == c for c, part in enumerate(parts) for i in part)


def test_a_client_of_nothing_is_possible_if_allowed():
    assert dirichlet([], 2, alpha=1.0, minimum=0, seed=0) == [[], []]
    assert dirichlet([], 2, alpha=1.0, size_alpha=1.0, minimum=0, seed=0) == [[], []]
    assert sorted(map(len, dirichlet("a", 2, alpha=1.0, minimum=0, seed=0))) == [0, 1]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"clients": 0}, "0 clients: at least one"),
        ({"alpha": 0.0}, "alpha is 0.0: a number over 0"),
        ({"alpha": float("nan")}, "alpha is nan"),
        ({"alpha": float("inf")}, "alpha is inf"),
        ({"size_alpha": -1.0}, "size_alpha is -1.0"),
        ({"minimum": -1}, "a minimum of -1"),
        ({"clients": 1001}, "1000 samples are too few for 1001 clients of at least 1"),
        ({"minimum": 251}, "1000 samples are too few for 4 clients of at least 251"),
    ],
)
def test_what_cannot_be_cut_is_refused(changes, message):
    arguments = {"clients": 4, "alpha": 1.0, "seed": 0, **changes}
    with pytest.raises(InputError, match=message):
        dirichlet(KEYS, **arguments)
