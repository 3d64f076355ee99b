"""Clients that weigh by what their pictures explain, where the server gets sums alone.

In an exchange before the method's own, clients send the shares that they have measured into a sum:
their mean, and how far they differ beyond errors of measurement, is all that it takes to draw each
share towards the mean (`fed.numerics.shrinkage`), which each client then does by itself. Its weight
is n r as in the open round, and the server knows neither factor.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import replace

import torch

from fed.methods.interface.sums import Exchanges, Own, Round, Sums, given_too, number_of
from fed.numerics.shrinkage import Measured, Spread, share_of
from fed.state import State

SHARE, SQUARE, ERROR, TOLD = "share", "share^2", "error", "told"
MEAN, DIFFER = "share/mean", "share/differ"  # of what is given


class ExplainedSums(Sums):
    """A method's sums, with weights n r in place of n."""

    def __init__(self, inner: Sums):
        super().__init__(inner.method, inner.options)
        self.inner = inner

    @property
    def most_exchanges(self) -> int:
        return 1 + self.inner.most_exchanges

    def terms(self, exchange: int, own: Own, given: State) -> State:
        measured = _measured(own)
        if exchange == 0:
            share, error = measured or (0.0, 0.0)
            told = {SHARE: share, SQUARE: share**2, ERROR: error, TOLD: float(bool(measured))}
            return {name: torch.tensor([n], dtype=torch.float64) for name, n in told.items()}
        spread = Spread(float(given[MEAN]), float(given[DIFFER]))
        rest = {name: tensor for name, tensor in given.items() if name not in (MEAN, DIFFER)}
        weighed = replace(own, weight=own.weight * spread.drawn(measured))
        return self.inner.terms(exchange - 1, weighed, rest)

    def common(self, exchange: int, names: Collection[str]) -> Collection[str]:
        if exchange:
            return self.inner.common(exchange - 1, names)
        later = [set(self.inner.common(e, names)) for e in range(self.inner.most_exchanges)]
        return set(names).intersection(*later)

    def bound(self, name: str, weight: float, norm: float) -> float:
        numbers = {SHARE: 1.0, SQUARE: 1.0, ERROR: 1.0, TOLD: 1.0}
        return numbers[name] if name in numbers else self.inner.bound(name, weight, norm)

    def serve(self, round: Round) -> Exchanges:
        sums = yield {}
        told = number_of(sums[TOLD])
        spread = Spread.of_sums(told, *(float(sums[name]) for name in (SHARE, SQUARE, ERROR)))
        numbers = {MEAN: spread.mean, DIFFER: spread.differ}
        more = {name: torch.tensor([n], dtype=torch.float64) for name, n in numbers.items()}
        inner = self.inner.serve(round)
        given = next(inner)
        while True:
            sums = yield given_too(given, more)
            try:
                given = inner.send(sums)
            except StopIteration as end:
                return end.value


def _measured(own: Own) -> Measured | None:
    """The client's share, in [-1, 1], and its error; None where it has measured nothing."""
    if own.explained is None:
        return None
    return share_of(own.explained)
