from __future__ import annotations

import torch

from fed.numerics.pairwise import gram, grams, moves


def test_products_of_several_blocks_are_those_of_whole_vectors(monkeypatch):
    monkeypatch.setattr("fed.numerics.chunks.CHUNK", 5)
    torch.manual_seed(0)
    base, *states = [{"weight": torch.randn(3, 4), "bias": torch.randn(3)} for _ in range(4)]
    vectors = {
        name: torch.stack([(state[name] - base[name]).flatten().double() for state in states])
        for name in base
    }
    found = grams(moves(states, base))
    assert list(found) == list(base)
    for name, rows in vectors.items():
        torch.testing.assert_close(found[name], rows @ rows.T, atol=1e-5, rtol=1e-5)
    whole = torch.cat(list(vectors.values()), dim=1)
    total = gram((rows for _, rows in moves(states, base)), 3)
    torch.testing.assert_close(total, whole @ whole.T, atol=1e-5, rtol=1e-5)


def test_vectors_without_values_have_products_of_zero():
    assert gram([], 2).tolist() == [[0, 0], [0, 0]]
    assert grams([]) == {}
