"""FedAvg (McMahan et al. 2017, arXiv 1602.05629): the mean of the clients by their samples.

    A^{t+1} = A^t + server_lr * (sum_k p_k A_k - A^t),    p_k = n_k / sum_j n_j

`server_lr` is the step of the server along the mean update (Reddi et al. 2021, arXiv 2003.00295);
1 is FedAvg. `paper_compat` takes p_k = 1 / K, which is common in research code.
"""

from __future__ import annotations

from fed.methods.interface.method import Outcome
from fed.methods.interface.options import Positive
from fed.methods.interface.registry import method
from fed.methods.interface.sums import MeanOnly
from fed.numerics.weighted_mean import mean_shares, towards_mean
from fed.state import State


@method("fedavg", sums=MeanOnly)
def fedavg(
    states: list[State],
    *,
    weights: list[float],
    base: State,
    server_lr: Positive = 1.0,
    paper_compat: bool = False,
) -> Outcome:
    """The weighted mean in float64, or a step of another length towards it.

    One client, or identical clients, give that client: to the bit in float32 and narrower types.
    """
    p = mean_shares(weights, paper_compat)
    return Outcome(towards_mean(states, base, p, server_lr))
