"""The fusion of clients' matrices of a layer in their shared space: three sums over clients.

The first sum, S, has given the basis U (`joint_basis`). The second is the mean M =
sum_k p_k X_k, with its coefficients U^T M. The third is of rho~_ki c_ki, rho~_ki |c_ki|^2 and
rho~_ki, where c_ki are the rows of C_k = U^T X_k and rho~_ki is known to client k from the second
sum. Nothing else of a client is needed, so the same comes out of secure sums (`sums.py`).

What lies outside U is one block more, with one length for all clients: its mean is kept.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from fed.numerics.consensus import NOISE, Rest, consensus, rest_of
from fed.numerics.joint_basis import Basis, mean_matrix
from fed.numerics.layers import Matrices
from fed.numerics.weighted_mean import total


@dataclass(frozen=True)
class Fused:
    """Fused coefficients, and how they came about.

    Attributes:
        rows: C, (r, in).
        mean: M, (out, in), and its coefficients U^T M, (r, in).
        kappa: consensus of each direction, (r,); see `consensus`.
        gain: by what each row of the weighted mean was multiplied, (r,).
        agreement, reliability: a_k and rho_k, (r,) of each client.
        rest: None where the basis leaves nothing out.
    """

    rows: Tensor
    mean: Tensor
    mean_rows: Tensor
    kappa: Tensor
    gain: Tensor
    agreement: list[Tensor]
    reliability: list[Tensor]
    rest: Rest | None

    def matrix(self, vectors: Tensor, basis: Tensor | None = None) -> Tensor:
        """The fused matrix, (out, in): rows along `vectors`, and the rest. Overwrites `mean`.

        `basis` is the one that the rows were taken in, where it is not `vectors`.
        """
        if self.rest is None:
            return vectors @ self.rows
        out = self.mean.mul_(self.rest.gain)  # g M + V C - g U U^T M
        if basis is None:
            return out.addmm_(vectors, self.rows - self.rest.gain * self.mean_rows)
        return out.addmm_(vectors, self.rows).addmm_(basis, self.mean_rows, alpha=-self.rest.gain)


def fuse(
    mats: Matrices,
    p: Sequence[float],
    basis: Basis,
    *,
    tau: float,
    rescale: float,
    flatten: float,
    keep_rest: bool,
) -> Fused:
    """The second and the third sum, and what the server makes of them.

    Args:
        mats: X_k of shape (out, in), with the clients' shares `p`.
        tau, rescale, flatten: see `method.py`.
        keep_rest: whether the mean of what lies outside the basis stays.
    """
    u = basis.vectors
    mean = mean_matrix(mats, p)
    mean_rows = u.T @ mean
    agreed, rho, inside = [], [], 0.0
    rows, squares = torch.zeros_like(mean_rows), torch.zeros_like(mean_rows[:, 0])
    for x, share in zip(mats, p, strict=True):
        c = u.T @ x
        agreed.append(agreement(c, share, mean_rows))
        rho.append(reliability(agreed[-1], share, tau))
        rows.add_(rho[-1][:, None] * c)
        of_rows = c.square().sum(1)
        squares += rho[-1] * of_rows
        inside += share * float(of_rows.sum())
    sums = total(rho)
    third = ThirdSum(rows, squares, sums, inside)
    fused = third.fused(
        mean, mean_rows, basis, rescale=rescale, flatten=flatten, keep_rest=keep_rest
    )
    return replace(fused, agreement=agreed, reliability=[each / sums for each in rho])


@dataclass(frozen=True)
class ThirdSum:
    """The third sum, and what the basis holds of the clients' energy.

    Attributes:
        rows: sum_k rho~_ki c_ki, (r, in).
        squares, rho: sum_k rho~_ki |c_ki|^2 and sum_k rho~_ki, (r,).
        inside: sum_k p_k |C_k|^2.
    """

    rows: Tensor
    squares: Tensor
    rho: Tensor
    inside: float

    def fused(
        self,
        mean: Tensor,
        mean_rows: Tensor,
        basis: Basis,
        *,
        rescale: float,
        flatten: float,
        keep_rest: bool,
    ) -> Fused:
        """What the server makes of the sums, without agreement and reliability of single clients.

        `mean` is M, `mean_rows` U^T M.
        """
        kappa = consensus(self.rows, self.squares, self.rho)
        fused, gain = merge_rows(self.rows, self.squares, self.rho, rescale)
        rest = None
        if len(gain) < basis.full:
            left = max(basis.total - self.inside, 0.0)
            rest = rest_of(mean, mean_rows, left, basis.total, rescale)
            if not keep_rest:
                rest = Rest(rest.energy, rest.kappa, 0.0)
        if flatten:
            outside = 0.0 if rest is None else rest.gain * math.sqrt(rest.kappa * rest.energy)
            lengths = fused.norm(dim=1)
            bent, bent_rest = evened(lengths, kappa, outside, rest, basis.full, flatten)
            fused, gain = fused * bent[:, None], gain * bent
            if rest is not None:
                rest = Rest(rest.energy, rest.kappa, rest.gain * bent_rest)
        return Fused(fused, mean, mean_rows, kappa, gain, [], [], rest)


def agreement(c: Tensor, p: float, mean: Tensor) -> Tensor:
    """a_ki of one client, (r,): the cosine of its rows with what the others' add up to.

    `c` are its coefficients, (r, in), `p` its share, `mean` is sum_j p_j C_j over all clients, this
    one among them. Where one side moves and the other only by rounding there is no agreement: 0.
    """
    own = p * c
    others = mean - own
    lengths = torch.stack([own.norm(dim=1), others.norm(dim=1)])
    cosine = (own * others).sum(1) / lengths.prod(0)
    return torch.where(lengths.amin(0) > NOISE * lengths.amax(0), cosine.clamp(-1, 1), 0)


def reliability(agreed: Tensor, p: float, tau: float) -> Tensor:
    """rho~_ki of one client, (r,): rho_ki before it is divided by the sum over clients."""
    return p * ((agreed - 1) / tau).exp()


def merge_rows(rows: Tensor, squares: Tensor, rho: Tensor, rescale: float) -> tuple[Tensor, Tensor]:
    """Fused rows, (r, in), and gains, (r,), from the third sum; gain_i = kappa_i^(-1/2)."""
    gain = consensus(rows, squares, rho).rsqrt().clamp(1, rescale)
    return rows * (gain / rho)[:, None], gain


def evened(
    lengths: Tensor, kappa: Tensor, left: float, rest: Rest | None, full: int, flatten: float
) -> tuple[Tensor, float]:
    """Factors that draw the directions' lengths towards their root mean square.

    (level / length_i) ^ (flatten * (1 - kappa_i)): a direction in which all agree stays as it is.

    Args:
        lengths: of the fused rows, (r,); `left` is that of the rest, over full - r directions.
    """
    r = len(lengths)
    level = math.sqrt((float(lengths.square().sum()) + left**2) / full)
    there = lengths > NOISE * level
    factors = (level / lengths.where(there, 1)) ** (flatten * (1 - kappa))
    of_rest = 1.0
    if rest is not None and left > 0:
        typical = left / math.sqrt(full - r)
        of_rest = (level / typical) ** (flatten * (1 - rest.kappa))
    return factors.where(there, 1), of_rest
