"""DARE with TIES (Yu et al. 2024, arXiv 2311.03099): random drop, then sign and disjoint mean.

    A = A_0 + scale * sum_{k in S} w_k T~_k / sum_{k in S} w_k,    S = {k: sign(T~_k) = g != 0}
    g = sign(sum_k w_k T~_k)

T~_k, see `fed.numerics.dare`, is the task vector with a random share `density` kept, rescaled by
1 / density. The random drop stands in the place of TIES's trimming, as in mergekit; the authors'
code trims after it too. The mean over those of one sign is TIES's; mergekit 0.1.5 sums them unless
it is told `normalize: true`. With a density of 1 this is `ties` with a density of 1.
"""

from __future__ import annotations

from fed.methods.interface.method import Outcome
from fed.methods.interface.options import Positive, Share
from fed.methods.interface.registry import method
from fed.methods.ties import disjoint_mean
from fed.numerics.chunks import empty
from fed.numerics.dare import dropped
from fed.state import State


@method("dare_ties")
def dare_ties(
    states: list[State],
    *,
    weights: list[float],
    base: State,
    density: Share = 0.8,
    scale: Positive = 1.0,
    seed: int = 0,
) -> Outcome:
    """The base and `scale` times the disjoint mean of the thinned task vectors."""
    result = empty(base)
    for block, moves in dropped(states, base, density, seed):
        block.write(result, block.base + scale * disjoint_mean(moves, weights))
    return Outcome(result)
