"""FedAvg (McMahan et al. 2017, arXiv 1602.05629): the mean of the clients by their samples.

    A^{t+1} = A^t + server_lr * (sum_k p_k A_k - A^t),    p_k = n_k / sum_j n_j

`server_lr` is the step of the server along the mean update (Reddi et al. 2021, arXiv 2003.00295);
1 is FedAvg.
"""

from __future__ import annotations

import math

from fed.methods.registry import Outcome, method
from fed.space import shares, weighted_sum
from fed.state import State
from llava.errors import InputError


@method("fedavg")
def fedavg(
    states: list[State], *, weights: list[float], base: State, memory: dict, server_lr: float = 1.0
) -> Outcome:
    """The weighted mean in float64, or a step of another length towards it."""
    if not 0 < server_lr < math.inf:
        raise InputError(f"fedavg option server_lr: expected a positive number, found {server_lr}")
    p = shares(weights)
    state = {name: weighted_sum([s[name] for s in states], p) for name in base}
    if server_lr != 1:  # with 1 the result is the mean itself, free of the base's rounding
        state = {name: base[name] + server_lr * (state[name] - base[name]) for name in base}
    return Outcome(state)
