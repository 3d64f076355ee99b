"""Coordinate-wise median (Yin et al. 2018, arXiv 1803.01498, Algorithm 1, option I).

    A^{t+1}[i] = median over k of A_k[i]

Each value for itself; of an even number of clients the mean of the two in the middle. So one client
gives that client, and two give their plain mean, which is not robust: fewer than half may be bad.
As published, samples count for nothing. `weighted` gives the median by samples: the value at which
half of all samples lie on either side, or the mean of two values where half is met exactly; with
equal weights that is the plain median. A client that lies about its samples gains by it.
"""

from __future__ import annotations

import numpy as np
import torch

from fed.methods.interface.method import Outcome
from fed.methods.interface.registry import method
from fed.numerics.chunks import blocks, empty, squares
from fed.numerics.weighted_mean import shares
from fed.state import State

_ROUNDING = 1e-9  # shares so close to one half meet it


@method("median")
def median(
    states: list[State],
    *,
    weights: list[float],
    base: State,
    weighted: bool = False,
) -> Outcome:
    """One round. Facts: `distance`, of each client from the result, over all tensors."""
    p = np.array(shares(weights))
    result = empty(base)
    apart = torch.zeros(len(states), dtype=torch.float64)
    for block in blocks(states, base):
        columns = block.clients.T.contiguous().numpy()
        middle = torch.from_numpy(by_samples(columns, p) if weighted else plain(columns))
        block.write(result, middle)
        apart += squares(block.clients - middle)
    return Outcome(result, None, {"distance": apart.sqrt().tolist()})


def plain(columns: np.ndarray) -> np.ndarray:
    """The median of every row: (n,) of (n, K)."""
    columns, k = np.sort(columns, axis=1), columns.shape[1]
    return (columns[:, (k - 1) // 2] + columns[:, k // 2]) / 2


def by_samples(columns: np.ndarray, p: np.ndarray) -> np.ndarray:
    """The median of every row by shares p, (K,): (n,) of (n, K)."""
    order = columns.argsort(axis=1)
    below = p[order].cumsum(axis=1)
    rows = np.arange(len(columns))
    low = (below < 0.5 - _ROUNDING).sum(axis=1)  # the first value that reaches one half
    high = (below < 0.5 + _ROUNDING).sum(axis=1)  # the first that passes it
    return (columns[rows, order[rows, low]] + columns[rows, order[rows, high]]) / 2
