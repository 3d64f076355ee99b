"""Model Breadcrumbs (Davari and Belilovsky 2024, arXiv 2312.06795): both tails are cut off.

    T'_k = T_k without its `gamma` largest by magnitude, of the rest the `density` largest, else 0
    A    = A_0 + scale * K * sum_k p_k T'_k,    T_k = A_k - A_0,    p_k = w_k / sum_j w_j

`density` and `gamma` are shares of all values of a tensor, as in mergekit 0.1.5; where both cannot
be had, fewer of the largest are cut. In the paper's terms, which masks below the percentile beta
and above gamma, density = gamma - beta and our gamma = 1 - gamma. The paper cuts within a layer,
its code within each row of a weight, mergekit and we within a tensor. One value of a tensor is
always kept; mergekit may keep none of a tensor of fewer than 1 / density.

With weights of 1 each K p_k is 1. The defaults are the paper's for CLIP, beta 85 %, gamma 99.3 %
and a scale of 0.3, as they are quoted: we could not reach the paper's own text.
"""

from __future__ import annotations

import math
from typing import Annotated

from fed.methods.interface.method import Outcome
from fed.methods.interface.options import Positive, Range, Share
from fed.methods.interface.registry import method
from fed.numerics.chunks import blocks, empty
from fed.numerics.magnitude_cutoff import count, magnitudes, order_statistics
from fed.numerics.weighted_mean import shares
from fed.state import State


@method("breadcrumbs")
def breadcrumbs(
    states: list[State],
    *,
    weights: list[float],
    base: State,
    density: Share = 0.143,
    gamma: Annotated[float, Range("[0, 1)", "a share in [0, 1)")] = 0.007,
    scale: Positive = 0.3,
) -> Outcome:
    """The base and `scale` times the weighted sum of the masked task vectors."""
    ends = order_statistics(states, base, lambda n: middle(n, density, gamma))
    p, result = shares(weights), empty(base)
    for block in blocks(states, base):
        moves = block.clients.sub_(block.base)
        size, (least, most) = magnitudes(moves), ends[block.name][:, :, None].unbind(1)
        moves.mul_((least <= size) & (size <= most))
        block.write(result, block.base + scale * len(states) * block.mix(p))
    return Outcome(result)


def middle(n: int, density: float, gamma: float) -> list[int]:
    """The ranks of the least and the greatest of n magnitudes that are kept, 0 the least of all."""
    kept = count(density, n)
    first = max(0, n - kept - math.floor(gamma * n + 1e-9))
    return [first, first + kept - 1]
