"""SCAFFOLD (Karimireddy et al. 2020, arXiv 1910.06378): clients correct for their own drift.

The server has a control variate c, client k its own c_k, both 0 at first. In its task a client
that was sent x and c makes K steps, with every gradient g_i of its loss (after the trainer's
clipping) becoming

    g_i - c_k + c

and ends with y_k and a new c_k. From the clients S that took part, of N that there are,

    x   += server_lr * mean_S(y_k - x)
    c   += |S| / N * mean_S(c_k^new - c_k)

The paper's mean_S is the plain mean; `weighting` samples takes both by samples instead, which is
for the objective that FedAvg has. Clients that are not in S keep their c_k. Twice as much travels
as with FedAvg, both ways, and the run keeps a c_k of every client.

Our reading: c_k^new = sum_i g_i / K, the mean of the client's gradients over its steps. For plain
SGD of rate lr that is the paper's option II, c_k - c + (x - y_k) / (K lr), of which the
experiments of the paper are made; and unlike it this is a mean of gradients for Adam and for
schedules too, where (x - y_k) / (K lr) is none.
"""

from __future__ import annotations

import math
from typing import Literal

import torch
from torch import Tensor

from fed.methods.interface.checks import check_memory, memory_shapes
from fed.methods.interface.client_rule import FOR_CLIENTS, ClientRule, Ending
from fed.methods.interface.method import Outcome
from fed.methods.interface.options import Positive
from fed.methods.interface.registry import method
from fed.methods.interface.sums import MeanOnly
from fed.numerics.chunks import blocks, empty, squares
from fed.numerics.weighted_mean import mean_shares
from fed.state import State

_STEPS = "steps"


class ControlVariates(ClientRule):
    """A client's side. `sent` is c, what is kept is c_k, what is sent back c_k^new - c_k."""

    keeps = sends = True

    def __init__(self, start: State, sent: State, kept: State, **options):
        super().__init__(start, sent, kept)
        zeros = {name: torch.zeros_like(t, dtype=torch.float32) for name, t in start.items()}
        self.own = kept or zeros
        common = sent or zeros
        self.added = {name: common[name] - self.own[name] for name in start}
        self.running = {name: zero.clone() for name, zero in zeros.items()}
        self.running[_STEPS] = torch.zeros((), dtype=torch.int64)

    def step(self, gradients: State, weights: State) -> State:
        for name, gradient in gradients.items():
            self.running[name] += gradient
        self.running[_STEPS] += 1
        return self.added

    def end(self) -> Ending:
        steps = int(self.running[_STEPS])
        if steps == 0:  # nothing was learnt of the client's gradients
            return Ending(self.own, {name: torch.zeros_like(t) for name, t in self.own.items()})
        new = {name: self.running[name] / steps for name in self.own}
        return Ending(new, {name: new[name] - self.own[name] for name in new})


@method("scaffold", client_rule=ControlVariates, sums=MeanOnly)
def scaffold(
    states: list[State],
    *,
    weights: list[float],
    base: State,
    memory: dict[str, Tensor],
    extras: list[State],
    total: int,
    server_lr: Positive = 1.0,
    weighting: Literal["uniform", "samples"] = "uniform",
) -> Outcome:
    """The server's side. Memory holds c as `<tensor>.for_clients`, float32.

    Facts: `c`, the Euclidean length of c after the round; `share`, |S| / N.
    """
    check_memory("scaffold", memory, memory_shapes(base, [FOR_CLIENTS]))
    p = mean_shares(weights, weighting == "uniform")
    share, length = len(states) / total, 0.0
    result, control = empty(base), empty(base, torch.float32, FOR_CLIENTS)
    for block, change in zip(blocks(states, base), blocks(extras, base), strict=True):
        mean = block.mix(p)
        if server_lr != 1:  # with 1 the result is the mean itself, free of the base's rounding
            mean = block.base + server_lr * (mean - block.base)
        block.write(result, mean)
        c = share * change.mix(p)
        if memory:
            c += block.read(memory, FOR_CLIENTS)
        block.write(control, c, FOR_CLIENTS)
        length += float(squares(c))
    return Outcome(result, control, {"c": math.sqrt(length), "share": share})
