from __future__ import annotations

import pytest
import torch

from fed.numerics.consensus import consensus, consensus_of_gram, rest_of


def test_kappa_of_vectors_is_kappa_of_their_products():
    torch.manual_seed(0)
    vectors, p = torch.randn(3, 5, dtype=torch.float64), [0.5, 0.3, 0.2]
    shares = torch.tensor(p, dtype=torch.float64)
    energies = shares @ vectors.square().sum(1)
    by_rows = consensus((shares @ vectors)[None], energies[None])
    by_products = consensus_of_gram(vectors @ vectors.T, [5, 3, 2])
    assert by_products == pytest.approx(float(by_rows), abs=1e-12)


def test_kappa_by_hand():
    eye = torch.eye(2, dtype=torch.float64)
    assert consensus_of_gram(torch.ones_like(eye), [1, 3]) == pytest.approx(1)
    assert consensus_of_gram(eye, [1, 1]) == pytest.approx(1 / 2)
    assert consensus_of_gram(eye * 2 - 1, [1, 1]) == pytest.approx(0)
    assert consensus_of_gram(0 * eye, [1, 1]) is None
    assert consensus_of_gram(eye, [0, 0]) is None
    # Weights that sum to rho = 2, vectors of length 1 that agree; a direction in which none moves.
    rows, energies = torch.tensor([[2.0, 0.0], [0.0, 0.0]]), torch.tensor([2.0, 0.0])
    assert consensus(rows, energies, torch.full((2,), 2.0)).tolist() == [1, 0]


def test_the_mean_of_a_rest_that_cancels_is_not_lengthened_without_bound():
    mean, inside = torch.full((2, 2), 1e-9), torch.zeros(1, 2)
    rest = rest_of(mean, inside, energy=1.0, total=2.0, rescale=4.0)
    assert (rest.kappa < 1e-15, rest.gain) == (True, 4.0)
    assert rest_of(mean, inside, energy=0.0, total=2.0, rescale=4.0).gain == 1
