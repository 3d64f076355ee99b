"""The clients nearest to each client, and their weights in its average (Pilot)."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from fed.numerics.pairwise import gram, moves
from fed.numerics.weighted_mean import shares
from fed.state import State, StateError

EQUAL = 1e-13  # of squared lengths: differences below are rounding


def distances(states: Sequence[State], base: State, clients: Sequence[str]) -> Tensor:
    """Euclidean, all tensors as one vector: (K, K), float64, 0 between equals.

    From inner products of what clients moved away from `base`.

    Raises:
        StateError: a client so far away that a distance is no finite number.
    """
    products = gram((move for _, move in moves(states, base)), len(states))
    squares = products.diagonal()
    for client, length in zip(clients, squares.tolist(), strict=True):
        if not math.isfinite(4 * length):
            raise StateError(f"client {client}: its LoRA is too far from the start for a distance")
    both = squares[:, None] + squares[None, :]
    squared = both - products - products.T
    return torch.where(squared <= EQUAL * both, 0, squared).sqrt()


def nearest(apart: Tensor, samples: Sequence[float], many: int) -> list[list[int]]:
    """Each client's nearest others that have samples, the first of equally near ones first."""
    found = []
    for k, row in enumerate(apart):
        order = row.argsort(stable=True).tolist()
        found.append([j for j in order if j != k and samples[j] > 0][:many])
    return found


def mixture(
    apart: Tensor, samples: Sequence[float], near: list[list[int]], weighting: str, own: float
) -> Tensor:
    """w_kj, the weight of client j in k's LoRA: (K, K), rows that sum to one."""
    if weighting == "mean":
        return torch.tensor(shares(samples), dtype=torch.float64).repeat(len(samples), 1)
    mix = torch.zeros_like(apart)
    for k, of in enumerate(near):
        if not of or bool((apart[k, of] == 0).any()):
            mix[k, k] = 1
            continue
        inverse = 1 / apart[k, of]
        if weighting == "literal":
            mine, total = samples[k], samples[k] + float(inverse.sum())
        else:
            mine = own or samples[k] / (samples[k] + sum(samples[j] for j in of))
            inverse, total = (1 - mine) * inverse / inverse.sum(), 1.0
        mix[k, of], mix[k, k] = inverse / total, mine / total
    return mix
