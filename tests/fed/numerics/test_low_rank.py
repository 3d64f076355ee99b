"""Large matrices' iterations against an SVD, on sizes where both can be had."""

import math

import pytest
import torch

from fed.numerics import low_rank
from fed.numerics.low_rank import isometry, leading

N = 300


@pytest.fixture
def all_large(monkeypatch):
    monkeypatch.setattr(low_rank, "LARGE", 8)


def spectra():
    torch.manual_seed(0)
    left, right = (torch.linalg.qr(torch.randn(N, N).double()).Q for _ in range(2))
    return {
        "noise": torch.randn(N, N).double(),
        "decaying": left * torch.logspace(0, -3, N).double() @ right,
        "steep": left * torch.logspace(0, -5, N).double() @ right,
        "tall": torch.randn(2 * N, N).double(),
        "wide": torch.randn(N, 2 * N).double(),
    }


@pytest.mark.parametrize("kind", spectra())
def test_isometry_is_that_of_the_svd(kind, all_large):
    matrix = spectra()[kind]
    u, _, vt = torch.linalg.svd(matrix, full_matrices=False)
    found = isometry(matrix.float())
    error = torch.linalg.vector_norm(found.double() - u @ vt) / math.sqrt(N)
    assert found.dtype == torch.float32
    assert found.shape == matrix.shape
    assert error < (1e-4 if kind == "steep" else 1e-5)


@pytest.mark.parametrize("kind", spectra())
@pytest.mark.parametrize("rank", [10, 75, 150])
def test_leading_leaves_out_hardly_more_than_need_be(kind, rank, all_large):
    matrix = spectra()[kind]
    lengths = torch.linalg.svdvals(matrix)
    found = leading(matrix.float(), rank)
    kept = (found.left.double() * found.lengths.double()) @ found.right.double().T
    left_out = torch.linalg.vector_norm(matrix - kept)
    assert left_out < 1.005 * torch.linalg.vector_norm(lengths[rank:])
    eye = torch.eye(rank, dtype=torch.float64)
    for side in (found.left.double(), found.right.double()):
        assert torch.allclose(side.T @ side, eye, atol=1e-5)


def test_small_matrices_are_exact_and_rounding_is_no_direction():
    torch.manual_seed(1)
    low = torch.randn(20, 3).double() @ torch.randn(3, 15).double()
    u, s, vt = torch.linalg.svd(low)
    found = leading(low, 8)
    assert len(found.lengths) == 3
    assert torch.allclose(found.lengths, s[:3])
    assert torch.allclose(isometry(low), u[:, :3] @ vt[:3])
    for size in (4, 2000):
        zero = torch.zeros(size, size)
        assert not isometry(zero).any()
        assert len(leading(zero, 2).lengths) == 0


def test_large_matrices_of_low_rank(all_large):
    torch.manual_seed(2)
    low = torch.randn(N, 5) @ torch.randn(5, N)
    u, _, vt = torch.linalg.svd(low.double())
    found = leading(low, 20)
    assert 5 <= len(found.lengths) <= 20
    kept = (found.left * found.lengths) @ found.right.T
    assert torch.allclose(kept, low, atol=1e-4)
    expected = u[:, :5] @ vt[:5]
    assert torch.linalg.vector_norm(isometry(low).double() - expected) < 0.2
