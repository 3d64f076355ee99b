"""FedExP (Jhunjhunwala et al. 2023, arXiv 2301.09604): a longer step the more clients differ.

    Delta_k = A_k - A^t,    Delta = sum_k p_k Delta_k
    eta = max(1, sum_k p_k |Delta_k|^2 / (2 (|Delta|^2 + eps)))
    A^{t+1} = A^t + eta * Delta

Lengths are over all tensors as one vector. With p_k = 1 / K this is the paper's formula, sum_k
|Delta_k|^2 / (2 K (|Delta|^2 + eps)). p_k by samples in both places is our reading of unequal
clients, and the authors' code does the same (which has K * eps for eps, and lets it decay over the
rounds; here it is constant). Unrelated updates of one length give eta = K / 2, like ones 1.
The paper evaluates the mean of the last two rounds' states; here each round's state is what it is.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from fed.methods.interface.method import Outcome
from fed.methods.interface.options import NonNegative
from fed.methods.interface.registry import method
from fed.methods.interface.sums import (
    STATE,
    WEIGHT,
    Exchanges,
    MeanOnly,
    Own,
    Round,
    differences,
    parts_of,
)
from fed.numerics.chunks import blocks, squares
from fed.numerics.weighted_mean import mean_shares
from fed.state import State

EACH = "each"  # the term w |Delta_k|^2


class FedExPSums(MeanOnly):
    """The mean, and sum_k p_k |Delta_k|^2."""

    def terms(self, exchange: int, own: Own, given: State) -> State:
        terms = super().terms(exchange, own, given)
        moved = differences(own.state, own.base).values()
        return terms | {EACH: terms[WEIGHT] * sum(t.square().sum() for t in moved)}

    def bound(self, name: str, weight: float, norm: float) -> float:
        return weight * norm**2 if name == EACH else super().bound(name, weight, norm)

    def serve(self, round: Round) -> Exchanges:
        sums = yield {}
        (delta,) = parts_of(sums, STATE)
        each = float(sums[EACH] / sums[WEIGHT])
        together = float(sum(t.square().sum() for t in delta.values()))
        mean = {name: t.double() + delta[name] for name, t in round.base.items()}
        return _stepped(mean, round.base, each, together, self.options["eps"])


@method("fedexp", cross_layer=True, sums=FedExPSums)
def fedexp(
    states: list[State],
    *,
    weights: list[float],
    base: State,
    eps: NonNegative = 1e-3,
    paper_compat: bool = False,
) -> Outcome:
    """One round of FedExP; where eta is 1, FedAvg.

    `eps` has the units of a squared update; the authors' experiments have 0.001, and 0.1 for
    EMNIST. `paper_compat` takes p_k = 1 / K. Facts: `eta`, the lengths of Delta and of the step.
    """
    p = mean_shares(weights, paper_compat)
    by = torch.tensor(p, dtype=torch.float64)
    # Float32 at least: the mean is read again once eta is known.
    mean = {n: torch.empty(t.shape, dtype=_wide(t), device=t.device) for n, t in base.items()}
    each = together = 0.0
    for block in blocks(states, base):
        average = block.mix(p)
        block.write(mean, average)
        each += float(by @ squares(block.clients - block.base))
        together += float(squares(average - block.base))
    return _stepped(mean, base, each, together, eps)


def _stepped(mean: State, base: State, each: float, together: float, eps: float) -> Outcome:
    """The step along the mean update, which `mean` is overwritten with.

    Args:
        each: sum_k p_k |Delta_k|^2; `together` is |Delta|^2.
    """
    longest = 2 * (together + eps)
    eta = max(1.0, each / longest) if longest > 0 else 1.0
    if eta > 1:
        for block in blocks([mean], base):
            block.write(mean, block.base + eta * (block.clients[0] - block.base))
    length = math.sqrt(together)
    return Outcome(mean, None, {"eta": eta, "update_norm": length, "step_norm": eta * length})


def _wide(tensor: Tensor) -> torch.dtype:
    return torch.promote_types(tensor.dtype, torch.float32)
