"""Norm clipping (Sun et al. 2019, arXiv 1911.07963): no client moves the mean further than a bound.

    Delta_k = A_k - A^t,    s_k = min(1, bound / |Delta_k|)
    A^{t+1} = A^t + sum_k p_k s_k Delta_k,    p_k = n_k / sum_j n_j

Lengths are over all tensors as one vector. With no `bound` it is `multiple` times the plain median
of the clients' lengths of this round (the median of an even number is the mean of the two in the
middle), which needs no tuning to the model: our choice, near to the adaptive clipping of Andrew et
al. 2021 (arXiv 1905.03871) that follows such a quantile over the rounds. With a `multiple` of 1 one
client gives that client, and of two the longer one is shortened to their mean length. Where more
than half did not move, nobody does. Nothing clipped is FedAvg. The paper's noise is left out.
"""

from __future__ import annotations

import math
import statistics

import torch

from fed.methods.interface.method import Outcome
from fed.methods.interface.options import Positive
from fed.methods.interface.registry import method
from fed.methods.interface.sums import (
    STATE,
    Exchanges,
    Own,
    Round,
    Sums,
    differences,
    parts_of,
    weighted,
)
from fed.numerics.chunks import blocks, empty, squares
from fed.numerics.weighted_mean import shares
from fed.state import State


class NormClipSums(Sums):
    """Clients shorten their own updates; only a fixed bound is known to them."""

    def terms(self, exchange: int, own: Own, given: State) -> State:
        moved = differences(own.state, own.base)
        length = math.sqrt(float(sum(t.square().sum() for t in moved.values())))
        scale = min(1.0, self.options["bound"] / length) if length else 1.0
        return weighted({STATE: {name: scale * t for name, t in moved.items()}}, own.weight)

    def serve(self, round: Round) -> Exchanges:
        sums = yield {}
        (moved,) = parts_of(sums, STATE)
        mean = {name: t.double() + moved[name] for name, t in round.base.items()}
        return Outcome(mean, None, {"bound": self.options["bound"]})

    def refusal(self) -> str | None:
        if self.options["bound"] is None:
            return "it compares the lengths of clients' updates where no `bound` is given"
        return None


@method("norm_clip", cross_layer=True, sums=NormClipSums)
def norm_clip(
    states: list[State],
    *,
    weights: list[float],
    base: State,
    bound: Positive | None = None,
    multiple: Positive = 1.0,
) -> Outcome:
    """One round. `bound` has the units of the weights; with it `multiple` says nothing.

    Facts: `bound`; by client `norm`, |Delta_k|, and `scale`, s_k.
    """
    lengths = torch.zeros(len(states), dtype=torch.float64)
    for block in blocks(states, base):
        lengths += squares(block.clients - block.base)
    norms = lengths.sqrt().tolist()
    if bound is None:
        bound = multiple * statistics.median(norms)
    scales = [1.0 if norm <= bound else bound / norm for norm in norms]

    p = shares(weights)
    moved = [share * scale for share, scale in zip(p, scales, strict=True)]
    stays = sum(share * (1 - scale) for share, scale in zip(p, scales, strict=True))
    result = empty(base)
    for block in blocks(states, base):
        # The same as A^t + sum_k p_k s_k Delta_k, and the exact mean where nothing is clipped.
        block.write(result, stays * block.base + block.mix(moved))
    return Outcome(result, None, {"bound": bound, "norm": norms, "scale": scales})
