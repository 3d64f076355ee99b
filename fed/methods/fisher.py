"""Fisher merging (Matena and Raffel 2022, arXiv 2111.09832): each value by what it matters.

    A[i] = sum_k p_k F_k[i] A_k[i] / sum_k p_k F_k[i]                                        [paper]

F_k is the diagonal of expert k's Fisher matrix: the squared gradient of the log-likelihood, a mean
over samples. The paper takes the expectation over the model's own labels where it can; here it is
that of the captions as they are (the empirical Fisher), as `calibration` measures it.

`floor` is added to every F, so that where no expert's data says anything their mean stands; it is
relative to the mean of all F of all experts, as gradients have no natural unit: this is ours
(code in use adds or clamps at an absolute 1e-6). `normalise` divides each expert's F by its
Euclidean length over all tensors first, so that experts of a large loss do not outvote the
others: it is not in the paper's equation, but common, and off by default.
"""

from __future__ import annotations

import math

import torch

from fed.methods.interface.calibration import Calibration
from fed.methods.interface.method import Outcome
from fed.methods.interface.options import Positive
from fed.methods.interface.registry import method
from fed.numerics.chunks import blocks, empty
from fed.numerics.weighted_mean import shares
from fed.state import State


@method("fisher", cross_layer=True)
def fisher(
    states: list[State],
    *,
    weights: list[float],
    base: State,
    calibration: list[Calibration],
    floor: Positive = 1e-6,
    normalise: bool = False,
) -> Outcome:
    """One merge. Facts: `fisher`, the mean of each expert's F, before anything is done to it."""
    p = shares(weights)
    found = [measured.fisher(state) for measured, state in zip(calibration, states, strict=True)]
    values = sum(t.numel() for t in base.values()) or 1
    means = [sum(float(t.double().sum()) for t in f.values()) / values for f in found]
    scales = [1 / _length(f) if normalise and _length(f) > 0 else 1.0 for f in found]
    typical = sum(s * m for s, m in zip(scales, means, strict=True)) / len(found)
    least = floor * typical or 1.0
    factors = torch.tensor(scales, dtype=torch.float64)[:, None]
    shared = torch.tensor(p, dtype=torch.float64)[:, None]
    result = empty(base)
    for block in blocks(states, base):
        own = torch.stack([block.read(f) for f in found]) * factors + least
        own *= shared
        block.write(result, (own * block.clients).sum(0) / own.sum(0))
    return Outcome(result, None, {"fisher": means})


def _length(state: State) -> float:
    return math.sqrt(sum(float(t.double().square().sum()) for t in state.values()))
