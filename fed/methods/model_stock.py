"""Model Stock (Jang et al. 2024, arXiv 2403.19522): how far towards the mean, by the angle.

    A = t * sum_k p_k A_k + (1 - t) * A_0,    p_k = w_k / sum_j w_j
    t = c / (s + (1 - s) c),    s = sum_k p_k^2,    c = mean over pairs of cos(T_i, T_j)

tensor by tensor, T_k = A_k - A_0 as one vector. With weights of 1 each s is 1 / K and t the paper's
K c / (1 + (K - 1) c). For unequal weights pairs count by p_i p_j, and s follows from the paper's
geometry, in which all T_k are of one length and at one angle: our reading. In it c is not below 0;
where it is, we take 0, which leaves the base. mergekit goes on with the formula, away from the
mean or far beyond it.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fed.methods.interface.method import Outcome
from fed.methods.interface.registry import method
from fed.numerics.chunks import blocks, empty
from fed.numerics.pairwise import grams, moves
from fed.numerics.weighted_mean import shares
from fed.state import State
from llava.errors import InputError


@method("model_stock")
def model_stock(states: list[State], *, weights: list[float], base: State) -> Outcome:
    """The base drawn towards the mean. Equal experts give that expert, unrelated ones the base.

    Facts: `t` by tensor.

    Raises:
        InputError: fewer than two experts, between which there is no angle.
    """
    if len(states) < 2:
        raise InputError(f"model_stock needs at least two experts, found {len(states)}")
    p = shares(weights)
    shared = torch.tensor(p, dtype=torch.float64)
    steps = {name: step(gram, shared) for name, gram in grams(moves(states, base)).items()}

    result = empty(base)
    for block in blocks(states, base):
        t = steps[block.name]
        block.write(result, t * block.mix(p) + (1 - t) * block.base)
    return Outcome(result, None, {"t": steps})


def step(gram: Tensor, p: Tensor) -> float:
    """t from the inner products of the task vectors, (K, K), and shares, (K,).

    A task vector of length 0 is at right angles to all others.
    """
    lengths = gram.diagonal().sqrt()
    cosines = gram / (lengths[:, None] * lengths).clamp(min=torch.finfo(gram.dtype).tiny)
    pairs = torch.outer(p, p).triu(1)
    c = float((cosines * pairs).sum() / pairs.sum())
    s = float(p.square().sum())
    c = min(max(c, 0.0), 1.0)
    return c / (s + (1 - s) * c)
