"""Task arithmetic (Ilharco et al. 2023, arXiv 2212.04089): the sum of the task vectors.

    A = A_0 + scale * K * sum_k p_k T_k,    T_k = A_k - A_0,    p_k = w_k / sum_j w_j

With weights of 1 each K p_k is 1, and this is the paper's A_0 + scale * sum_k T_k; that unequal
weights keep the sum's size is our reading. A scale of 1 / K gives the mean. The paper tunes the
scale on held-out data; 0.4 is what Yadav et al. (arXiv 2306.01708) find to do well without any.
"""

from __future__ import annotations

from fed.methods.interface.method import Outcome
from fed.methods.interface.options import Positive
from fed.methods.interface.registry import method
from fed.numerics.weighted_mean import shares, towards_mean
from fed.state import State


@method("task_arithmetic")
def task_arithmetic(
    states: list[State],
    *,
    weights: list[float],
    base: State,
    scale: Positive = 0.4,
) -> Outcome:
    """The base and `scale` times the weighted sum of the task vectors."""
    return Outcome(towards_mean(states, base, shares(weights), scale * len(states)))
