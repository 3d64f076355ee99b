"""FedProx (Li et al. 2020, arXiv 1812.06127): clients are held near the state that they were sent.

Client k minimises F_k(w) + mu/2 |w - w^t|^2, so that every gradient of its steps becomes

    g + mu * (w - w^t)

and the server averages as FedAvg does. mu = 0 is FedAvg, to the bit. The paper tunes mu among
0.001, 0.01, 0.1 and 1; our default is no finding of its. The term is added after the trainer's
clipping (the paper clips nothing), so --max_grad_norm does not bound the pull. An optimizer that
scales gradients, as Adam, scales the pull with them: it is the gradient of the paper's objective.
"""

from __future__ import annotations

from fed.methods.fedavg import fedavg
from fed.methods.interface.client_rule import ClientRule
from fed.methods.interface.method import Outcome
from fed.methods.interface.options import NonNegative, Positive
from fed.methods.interface.registry import method
from fed.methods.interface.sums import MeanOnly
from fed.state import State


class Proximal(ClientRule):
    """The pull towards the weights that the task began with."""

    def __init__(self, start: State, sent: State, kept: State, *, mu: float, **options):
        super().__init__(start, sent, kept)
        self.start, self.mu = start, mu

    def step(self, gradients: State, weights: State) -> State:
        if self.mu == 0:
            return {}
        return {name: self.mu * (weights[name] - start) for name, start in self.start.items()}


@method("fedprox", client_rule=Proximal, sums=MeanOnly)
def fedprox(
    states: list[State],
    *,
    weights: list[float],
    base: State,
    mu: NonNegative = 0.01,
    server_lr: Positive = 1.0,
    paper_compat: bool = False,
) -> Outcome:
    """FedAvg, with its options; `mu` is for the clients."""
    return fedavg.function(
        states, weights=weights, base=base, server_lr=server_lr, paper_compat=paper_compat
    )
