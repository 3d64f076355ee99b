"""Linear merging (Wortsman et al. 2022, "Model soups", arXiv 2203.05482): the experts' mean.

    A = sum_k p_k A_k,    p_k = w_k / sum_j w_j

With weights of 1 each this is the paper's uniform soup. The base plays no part. It is what FedAvg
does in a round, by the same code; the name is the one that merging has for it.
"""

from __future__ import annotations

from fed.methods.interface.method import Outcome
from fed.methods.interface.registry import method
from fed.numerics.weighted_mean import shares, towards_mean
from fed.state import State


@method("linear")
def linear(states: list[State], *, weights: list[float], base: State) -> Outcome:
    """The weighted mean, in float64. Equal experts give that expert."""
    return Outcome(towards_mean(states, base, shares(weights)))
