"""RFA: the geometric median (Pillutla, Kakade, Harchaoui 2022, arXiv 1912.13445).

    A^{t+1} = the v that minimises sum_k p_k |v - A_k|,    p_k = n_k / sum_j n_j

by the smoothed Weiszfeld algorithm: from v = sum_k p_k A_k, repeat

    beta_k = p_k / max(eps, |v - A_k|),    v <- sum_k beta_k A_k / sum_k beta_k

Lengths are over all tensors as one vector. Clients with less than half of the samples can pull v
away only so far, whatever they send. One client gives that client; of two, the one with more
samples draws v to it (slowly, if it has not many more), and equal ones give their mean.

The paper makes a few steps, as each is a round of secure aggregation; here the clients' states are
at hand and a step costs one reading of them, so `iterations` only bounds how many there are: it
ends when v moves by less than 1e-5 of the clients' mean distance from it (our addition).
"""

from __future__ import annotations

import torch
from torch import Tensor

from fed.methods.interface.method import Outcome
from fed.methods.interface.options import Natural, Positive
from fed.methods.interface.registry import method
from fed.numerics.chunks import blocks, empty, squares
from fed.numerics.weighted_mean import shares
from fed.state import State

_STILL = 1e-5


@method("geometric_median", cross_layer=True)
def geometric_median(
    states: list[State],
    *,
    weights: list[float],
    base: State,
    iterations: Natural = 32,
    eps: Positive = 1e-6,
) -> Outcome:
    """One round; 0 `iterations` are FedAvg. `eps` is a distance, in the units of the weights.

    Facts: `iterations` made; by client its `weight` in the result, which sum to 1, and `distance`
    from it.
    """
    p = torch.tensor(shares(weights), dtype=torch.float64)
    share, done = p, 0
    result = empty(base)
    distance = mix(result, states, share, base)
    while done < iterations:
        beta = p / distance.clamp(min=eps)
        beta /= beta.sum()
        # v moves by sum_k (new - old share) (A_k - v), so by no more than this.
        if float((beta - share).abs() @ distance) <= _STILL * float(share @ distance):
            break
        share, done = beta, done + 1
        distance = mix(result, states, share, base)
    facts = {"iterations": done, "weight": share.tolist(), "distance": distance.tolist()}
    return Outcome(result, None, facts)


def mix(result: State, states: list[State], share: Tensor, base: State) -> Tensor:
    """Write v = sum_k share_k A_k into `result`; the distances |v - A_k| of v unrounded, (K,)."""
    apart = torch.zeros(len(states), dtype=torch.float64)
    for block in blocks(states, base):
        v = share @ block.clients
        block.write(result, v)
        apart += squares(block.clients - v)
    return apart.sqrt()
