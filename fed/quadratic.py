"""The minimum of a sum of squares over one matrix, as RegMean and WUDI have it."""

from __future__ import annotations

import torch
from torch import Tensor

RIDGE = 1e-10  # of the mean diagonal: nothing beside an input that is there, enough where none is


def correct(left: Tensor, right: Tensor) -> Tensor:
    """D with D right = left, for `left` (out, in) and a positive semidefinite `right` (in, in).

    Where the minimiser of sum_k tr((A - A_k) H_k (A - A_k)^T) is wanted, it is M + D for any M,
    with left = sum_k (A_k - M) H_k and right = sum_k H_k. In directions that `right` does not
    reach D is 0, by a ridge of 1e-10 of its mean diagonal, and A is M. Both in float64, and both
    overwritten.
    """
    ridge = RIDGE * float(right.diagonal().mean()) if len(right) else 0.0
    if ridge == 0:
        return left.zero_()
    right.diagonal().add_(ridge)
    return torch.linalg.solve(right, left, left=False)
