"""The minimum of a sum of squares over one matrix, as RegMean and WUDI have it.

The minimiser of sum_k tr((A - A_k) H_k (A - A_k)^T) is M + D for any M, where D H = P with
P = sum_k (A_k - M) H_k and H = sum_k H_k. In float64: H has squares of singular values.
"""

from __future__ import annotations

import torch
from torch import Tensor

RIDGE = 1e-10  # of H's mean diagonal: nothing beside an input that is there, enough where none is
_ROWS = 512  # taken to float64 at once


def add_pull(pull: Tensor, matrix: Tensor, mean: Tensor, gram: Tensor, factor: float) -> None:
    """P += factor (A_k - M) H_k, for matrices (out, in) of any float type and H_k (in, in)."""
    for start in range(0, len(pull), _ROWS):
        rows = slice(start, start + _ROWS)
        pull[rows].addmm_(matrix[rows].double() - mean[rows], gram, alpha=factor)


def gram_of(matrix: Tensor) -> Tensor:
    """A^T A, (in, in), float64."""
    total = torch.zeros(matrix.shape[1], matrix.shape[1], dtype=torch.float64, device=matrix.device)
    for rows in matrix.split(_ROWS):
        rows = rows.double()
        total.addmm_(rows.T, rows)
    return total


def correction(pull: Tensor, total: Tensor) -> Tensor:
    """D, written over `pull`, P; `total`, H, is overwritten too.

    In directions that H does not reach D is 0, by a ridge of 1e-10 of its mean diagonal, or as much
    more as its rounding asks for.
    """
    ridge = RIDGE * float(total.diagonal().mean()) if len(total) else 0.0
    if ridge == 0:
        return pull.zero_()
    info = 1
    while info:
        total.diagonal().add_(ridge)
        factor, info = torch.linalg.cholesky_ex(total)
        ridge *= 100
    for rows in pull.split(_ROWS):
        rows.copy_(torch.cholesky_solve(rows.T, factor).T)
    return pull
