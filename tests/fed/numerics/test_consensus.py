from __future__ import annotations

import pytest
import torch

from fed.numerics.consensus import consensus, rest_of
from fed.numerics.weighted_mean import shares


def kappa(vectors: torch.Tensor, weights: list[float]) -> float:
    """Of vectors as rows, with weights that are made to sum to one."""
    p = torch.tensor(shares(weights), dtype=torch.float64)
    return float(consensus((p @ vectors)[None], (p @ vectors.square().sum(1))[None]))


def test_kappa_of_vectors_is_kappa_of_their_products():
    torch.manual_seed(0)
    vectors = torch.randn(3, 5, dtype=torch.float64)
    gram, p = vectors @ vectors.T, torch.tensor([0.5, 0.3, 0.2], dtype=torch.float64)
    by_products = float(p @ gram @ p) / float(p @ gram.diagonal())
    assert by_products == pytest.approx(kappa(vectors, [5, 3, 2]), abs=1e-12)


def test_kappa_by_hand():
    one = torch.tensor([[1.0, 0], [1, 0]], dtype=torch.float64)
    assert kappa(one, [1, 3]) == pytest.approx(1)
    assert kappa(torch.eye(2, dtype=torch.float64), [1, 1]) == pytest.approx(1 / 2)
    assert kappa(one * torch.tensor([[1.0], [-1]]), [1, 1]) == pytest.approx(0)
    assert kappa(0 * one, [1, 1]) == 0
    # Weights that sum to rho = 2, vectors of length 1 that agree; a direction in which none moves.
    rows, energies = torch.tensor([[2.0, 0.0], [0.0, 0.0]]), torch.tensor([2.0, 0.0])
    assert consensus(rows, energies, torch.full((2,), 2.0)).tolist() == [1, 0]


def test_the_mean_of_a_rest_that_cancels_is_not_lengthened_without_bound():
    mean, inside = torch.full((2, 2), 1e-9), torch.zeros(1, 2)
    rest = rest_of(mean, inside, energy=1.0, total=2.0, rescale=4.0)
    assert (rest.kappa < 1e-15, rest.gain) == (True, 4.0)
    assert rest_of(mean, inside, energy=0.0, total=2.0, rescale=4.0).gain == 1
