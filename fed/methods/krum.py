"""Krum and multi-Krum (Blanchard et al. 2017, arXiv 1703.02757).

    s(k) = sum of |A_k - A_j|^2 over the K - f - 2 other clients j that are nearest to k
    A^{t+1} = the client of the least s (`keep` 1), or the mean of the `keep` clients of least s

f is `byzantine`, how many clients may be bad; K >= 2 f + 3 is needed and checked, so Krum has no
answer for one or two clients. Unless given, f is the most that K clients bear. The mean is plain,
as published; `weighted` takes it by samples.

The paper breaks ties by the clients' numbers. With K - f - 2 = 1 there is always one, as the two
that are nearest to each other have one distance; so that the order of clients does not matter, ties
go to the client that is nearer to all others, then to the one with more samples: our reading.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import pdist

from fed.methods.interface.method import Outcome
from fed.methods.interface.options import Count, Natural
from fed.methods.interface.registry import method
from fed.numerics.chunks import blocks, empty
from fed.numerics.weighted_mean import mean_shares
from fed.state import State
from llava.errors import InputError


@method("krum", cross_layer=True)
def krum(
    states: list[State],
    *,
    weights: list[float],
    base: State,
    byzantine: Natural | None = None,
    keep: Count = 1,
    weighted: bool = False,
) -> Outcome:
    """One round.

    Facts: `byzantine`, f; by client `score`, the root of s / (K - f - 2), a typical distance from
    its nearest others, and `kept`, whether it is in the result.

    Raises:
        InputError: too few clients for f, or for `keep`.
    """
    k = len(states)
    f = max(0, (k - 3) // 2) if byzantine is None else byzantine
    if k < 2 * f + 3:
        raise InputError(
            f"krum option byzantine: {f} bad clients need at least {2 * f + 3} clients in a round, "
            f"found {k}"
        )
    if keep > k:
        raise InputError(
            f"krum option keep: expected at most the round's {k} clients, found {keep}"
        )

    near = squared_distances(states, base).sort(dim=1).values  # column 0 is a client and itself
    scores = near[:, 1 : k - f - 1].sum(1)
    rank = [
        (_rounded(score), _rounded(total), -weight, number)
        for number, (score, total, weight) in enumerate(
            zip(scores.tolist(), near.sum(1).tolist(), weights, strict=True)
        )
    ]
    kept = [number for *_, number in sorted(rank)[:keep]]
    kept.sort()

    result = empty(base)
    p = mean_shares([weights[i] for i in kept], not weighted)
    for block in blocks([states[i] for i in kept], base):
        block.write(result, block.mix(p))
    typical = (scores / (k - f - 2)).sqrt().tolist()
    return Outcome(
        result, None, {"byzantine": f, "score": typical, "kept": [i in kept for i in range(k)]}
    )


def squared_distances(states: list[State], base: State) -> Tensor:
    """|A_k - A_j|^2 over all tensors as one vector, (K, K); exactly 0 between equal clients."""
    k = len(states)
    pairs = torch.zeros(k * (k - 1) // 2, dtype=torch.float64)
    for block in blocks(states, base):
        pairs += pdist(block.clients).square()
    matrix = torch.zeros(k, k, dtype=torch.float64)
    i, j = torch.triu_indices(k, k, offset=1)
    matrix[i, j] = matrix[j, i] = pairs
    return matrix


def _rounded(value: float) -> float:
    """Rounded, so that values become equal that differ by the order of a sum alone."""
    return float(f"{value:.9e}")
