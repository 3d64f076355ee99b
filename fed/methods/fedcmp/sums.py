"""Fed-CMP from sums over clients alone: the same basis, gains and step as from their states.

The basis needs S = sum_k p_k X_k X_k^T: the whole of it where a layer has few rows, else S F for a
frame F of the range finder, once a pass, and then S within the frame that was found. The fusion
needs the mean of the X_k and the energy of each direction, which S has; only reliability by
agreement asks clients once more, for with basis and mean a client knows its own rho~_ki. With a
client's weight w, p = w / sum w, the terms of a layer are in exchange

    0                     w X, w |X|^2, and w X X^T or w X (X^T F)
    1, one a further pass w X (X^T F)
    then, of frames       w (F^T X)(F^T X)^T
    last, of agreement    rho~ c, rho~ |c|^2, rho~
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from fed.methods.fedcmp.fusion import ThirdSum, agreement, reliability
from fed.methods.fedcmp.step import Step, checked_tau
from fed.methods.interface.sums import (
    COUNT,
    STATE,
    WEIGHT,
    Exchanges,
    Own,
    Round,
    Sums,
    differences,
    number_of,
    parts_of,
    weighted,
)
from fed.numerics.chunks import empty
from fed.numerics.joint_basis import PASSES, Basis, Search
from fed.numerics.layers import Layer, layers, to_matrix
from fed.numerics.low_rank import random_frame
from fed.state import State

# Terms are called as what is given for them: a frame as `applied/LAYER` asks for S within reach of
# it, as `moment/LAYER` for S within it, a basis as `rows/LAYER` for the third sum.
MEAN, ENERGY, APPLIED, MOMENT = "mean/", "energy/", "applied/", "moment/"
ROWS, SQUARES, RHO, SQUARED = "rows/", "squares/", "rho/", "weight^2"


class FedCMPSums(Sums):
    """Fed-CMP's two sides."""

    def __init__(self, method: Any, options: Mapping[str, Any]):
        super().__init__(method, options)
        names = ("space", "reliability", "tau", "momentum", "beta")
        self.tau = checked_tau(*(self.options[name] for name in names))

    @property
    def most_exchanges(self) -> int:
        """Frames are turned in all passes but the first, then S is taken within them."""
        return 1 + PASSES + math.isfinite(self.tau)

    def terms(self, exchange: int, own: Own, given: State) -> State:
        origin = own.base if self.options["space"] == "updates" else None
        affine, others = layers(own.base)
        rest = {name: own.base[name] for name in others if exchange == 0}
        terms = weighted({STATE: differences(own.state, rest)}, own.weight)
        if exchange == 0:
            terms[SQUARED] = terms[WEIGHT].square()
        for layer in affine:
            x = to_matrix(own.state, layer, origin)
            for what, term in self._of_layer(exchange == 0, x, own.weight, layer.name, given):
                terms[what + layer.name] = term
        return terms

    def _of_layer(
        self, first: bool, x: Tensor, weight: float, layer: str, given: State
    ) -> Iterator[tuple[str, Tensor]]:
        if first:
            yield MEAN, weight * x
            yield ENERGY, weight * torch.linalg.vector_norm(x).double().square().view(1)
        if (frame := given.get(APPLIED + layer)) is not None:
            yield APPLIED, weight * (x @ (x.T @ frame.to(x)))
        elif first:
            yield MOMENT, weight * (x @ x.T)
        if (frame := given.get(MOMENT + layer)) is not None:
            inside = frame.to(x).T @ x
            yield MOMENT, weight * (inside @ inside.T)
        if (basis := given.get(ROWS + layer)) is not None:
            c, p = basis.to(x).T @ x, weight / float(given[WEIGHT])
            rho = reliability(agreement(c, p, given[MEAN + layer].to(x)), p, self.tau)
            yield ROWS, rho[:, None] * c
            yield SQUARES, rho * c.square().sum(1)
            yield RHO, rho

    def bound(self, name: str, weight: float, norm: float) -> float:
        """Frames and bases have orthonormal columns, rho~ is at most 1."""
        of_kind = {
            SQUARED: weight**2,
            ENERGY: weight * norm**2,
            APPLIED: weight * norm**2,
            MOMENT: weight * norm**2,
            ROWS: norm,
            SQUARES: norm**2,
            RHO: 1.0,
        }
        kinds = [of for kind, of in of_kind.items() if name.startswith(kind)]
        return kinds[0] if kinds else super().bound(name, weight, norm)

    def serve(self, round: Round) -> Exchanges:
        o, base = self.options, round.base
        affine, others = layers(base)
        found = {layer.name: _Layer.of(layer, base, round.clients, o) for layer in affine}
        framed = {name: of for name, of in found.items() if of.frame is not None}
        sums = yield _frames(APPLIED, framed)
        weight, result = float(sums[WEIGHT]), empty(base)
        chance = float(sums[SQUARED]) / weight**2
        (rest,) = parts_of(sums, STATE)
        for name in others:
            result[name].copy_(base[name].double() + rest[name])
        for name, of in found.items():
            of.read(name, sums, weight, number_of(sums[COUNT]))
        for _ in range(PASSES - 1 if framed else 0):
            sums = yield _frames(APPLIED, framed)
            for name, of in framed.items():
                of.turn(sums[APPLIED + name])
        if framed:
            sums = yield _frames(MOMENT, framed)
            for name, of in framed.items():
                # Who has left since the first exchange is not in this sum.
                of.moment = sums[MOMENT + name].to(of.like) / float(sums[WEIGHT])
        for of in found.values():
            of.search_basis(o["energy"])
        if math.isfinite(self.tau):
            given = {WEIGHT: torch.tensor(weight, dtype=torch.float64)}
            for name, of in found.items():
                given |= {ROWS + name: of.basis.vectors, MEAN + name: of.mean_rows}
            sums = yield given
            for name, of in found.items():
                of.third = of.third_of(name, sums)
        projected = o["momentum"] == "projected"
        step = Step(
            base, round.memory, o["space"], projected, o["beta"], o["align"], affine, others, result
        )
        fusing = {
            "rescale": o["rescale"],
            "flatten": o["flatten"],
            "keep_rest": o["rest"] == "keep",
        }
        for layer in affine:
            of = found[layer.name]
            fused = of.third.fused(of.mean, of.mean_rows, of.basis, **fusing)
            step.take(layer, of.basis, fused, chance)
        return step.outcome()


def _frames(what: str, framed: Mapping[str, _Layer]) -> State:
    return {what + name: of.frame for name, of in framed.items() if of.frame is not None}


@dataclass
class _Layer:
    """What the server knows of a layer, as its sums come in."""

    like: Tensor  # of the type that the layer's matrices have
    search: Search
    frame: Tensor | None
    mean: Tensor  # M, (out, in)
    moment: Tensor  # S, or S within the frame
    total: float = 0.0  # the trace of S
    basis: Basis = field(init=False)
    mean_rows: Tensor = field(init=False)  # U^T M
    third: ThirdSum = field(init=False)

    @classmethod
    def of(cls, layer: Layer, base: State, clients: int, options: Mapping[str, Any]) -> _Layer:
        like = to_matrix(base, layer)
        side, width = like.shape
        how, rank = options["basis"], options["rank"]
        search = Search.of(side, width, clients, rank=rank, how=how)
        frame = None
        if search.how == "randomised":
            # Orthonormal: the same range, and terms of S F are no longer than those of S.
            frame = torch.linalg.qr(random_frame(side, search.size, like, seed=0)).Q
        return cls(like, search, frame, like, like)

    def read(self, name: str, sums: State, weight: float, count: int) -> None:
        """The sums of exchange 0, in which `count` clients are."""
        full = min(len(self.like), self.like.shape[1] * count)
        self.search = replace(self.search, rank=min(self.search.rank, full), full=full)
        self.mean = sums[MEAN + name].to(self.like) / weight
        self.total = float(sums[ENERGY + name]) / weight
        if self.frame is None:
            self.moment = sums[MOMENT + name].to(self.like) / weight
        else:
            self.turn(sums[APPLIED + name])

    def turn(self, applied: Tensor) -> None:
        """The frame turned towards the leading directions: an orthonormal one of S F."""
        self.frame = torch.linalg.qr(applied.to(self.like)).Q

    def search_basis(self, energy: float) -> None:
        """The basis, and the third sum where every rho~_ki is p_k."""
        self.basis = self.search.found(self.moment, self.total, self.frame, energy)
        self.mean_rows = self.basis.vectors.T @ self.mean
        energies = self.basis.energies
        ones, inside = torch.ones_like(energies), float(energies.sum())
        self.third = ThirdSum(self.mean_rows, energies, ones, inside)

    def third_of(self, name: str, sums: State) -> ThirdSum:
        """The third sum as clients have sent it."""
        rows, squares, rho = (sums[what + name].to(self.like) for what in (ROWS, SQUARES, RHO))
        return ThirdSum(rows, squares, rho, self.third.inside)
