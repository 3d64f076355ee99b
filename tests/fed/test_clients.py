from __future__ import annotations

import pytest

from fed.clients import seed_of, slices


@pytest.mark.parametrize(("samples", "rounds"), [(0, 3), (1, 5), (5, 5), (7, 3), (100, 7)])
def test_one_pass_sees_each_sample_once_and_slices_are_even(samples, rounds):
    cut = slices(samples, rounds, seed=1)
    assert len(cut) == rounds
    assert sorted(i for part in cut for i in part) == list(range(samples))
    sizes = [len(part) for part in cut]
    assert max(sizes) - min(sizes) <= 1


def test_slices_depend_on_the_seed_and_nothing_else():
    assert slices(50, 3, 1) == slices(50, 3, 1) != slices(50, 3, 2)


def test_seeds_are_fixed_numbers_that_depend_on_every_part():
    assert seed_of(0, "a", 1) == 427958307  # recorded: continued runs need it to stay
    parts = [(0, "a", 1), (1, "a", 1), (0, "b", 1), (0, "a", 2), (0, "a1", ""), (0, "a", "1", "")]
    assert len({seed_of(*p) for p in parts}) == len(parts)
    assert all(0 <= seed_of(i) < 2**31 for i in range(100))
