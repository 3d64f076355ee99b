"""TIES-Merging (Yadav et al. 2023, arXiv 2306.01708): trim, elect a sign, take the disjoint mean.

    T'_k = T_k where it is among the `density` largest by magnitude, else 0;    T_k = A_k - A_0
    g    = sign(sum_k w_k T'_k)
    A    = A_0 + scale * sum_{k in S} w_k T'_k / sum_{k in S} w_k,    S = {k: sign(T'_k) = g != 0}

each value for itself. With weights of 1 each this is the paper's, except that the paper takes the
largest of a whole task vector and this of each tensor, as mergekit does: a layer's result then
depends on that layer alone. A fifth and a scale of 1 are the paper's choice without held-out data.

Where the experts' pulls cancel exactly, sign(0) = 0 as in the paper's equation and the value stays
as in the base; mergekit takes the positive side there.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fed.methods.interface.method import Outcome
from fed.methods.interface.options import Positive, Share
from fed.methods.interface.registry import method
from fed.numerics.chunks import blocks, empty
from fed.numerics.magnitude_cutoff import count, magnitudes, order_statistics
from fed.state import State


@method("ties")
def ties(
    states: list[State],
    *,
    weights: list[float],
    base: State,
    density: Share = 0.2,
    scale: Positive = 1.0,
) -> Outcome:
    """The merged task vector on the base; that of equal experts is their own, trimmed."""
    least = order_statistics(states, base, lambda n: [n - count(density, n)])
    result = empty(base)
    for block in blocks(states, base):
        moves = block.clients.sub_(block.base)
        moves.mul_(magnitudes(moves) >= least[block.name])
        block.write(result, block.base + scale * disjoint_mean(moves, weights))
    return Outcome(result)


def disjoint_mean(moves: Tensor, weights: list[float]) -> Tensor:
    """The mean over those of the elected sign, 0 where there is none: (n,) of (K, n), float64."""
    # Weights as they are, for the sake of exact sums: with shares of 1/3 pulls may fail to cancel.
    by = torch.tensor(weights, dtype=torch.float64)
    agree = moves * (by @ moves) > 0
    share = by @ agree.double()
    return by @ (moves * agree) / share.clamp(min=min(weights))
