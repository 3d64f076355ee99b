"""DARE with task arithmetic (Yu et al. 2024, arXiv 2311.03099): random drop, then the sum.

    A = A_0 + scale * K * sum_k p_k T~_k,    p_k = w_k / sum_j w_j

T~_k, see `fed.numerics.dare`, is the task vector with a random share `density` kept, rescaled by
1 / density. In expectation, and exactly with a density of 1, this is `task_arithmetic`, whose scale
it has. 0.8 is the density in the authors' examples of merging language models; alone, an expert
bears far less.
"""

from __future__ import annotations

from fed.methods.interface.method import Outcome
from fed.methods.interface.options import Positive, Share
from fed.methods.interface.registry import method
from fed.numerics.chunks import empty
from fed.numerics.dare import dropped
from fed.numerics.weighted_mean import shares
from fed.state import State


@method("dare_linear")
def dare_linear(
    states: list[State],
    *,
    weights: list[float],
    base: State,
    density: Share = 0.8,
    scale: Positive = 0.4,
    seed: int = 0,
) -> Outcome:
    """The base and `scale` times the weighted sum of the thinned task vectors."""
    p, result = shares(weights), empty(base)
    for block, _ in dropped(states, base, density, seed):
        block.write(result, block.base + scale * len(states) * block.mix(p))
    return Outcome(result)
