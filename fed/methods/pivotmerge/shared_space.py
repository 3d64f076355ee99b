"""Experts' matrices of a layer in their shared space, filtered, weighted and joined again.

The steps of PivotMerge, which `method.py` describes. Rows are directions of the
layer's side that is shared: matrices X_k are (side, width), turned if that is the input.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from fed.numerics.consensus import NOISE, Rest, consensus, rest_of
from fed.numerics.joint_basis import Basis, joint_basis, mean_matrix
from fed.numerics.layers import Matrices
from fed.numerics.weighted_mean import shares, total

EXACT = 1280  # up to this side all directions are found: 1,024 inputs and a bias
LEADING = 128  # of larger ones


@dataclass
class Shared:
    """One layer: its basis U, the experts' coefficients C_k = U^T X_k, (r, width), and shares."""

    mats: Matrices
    p: Sequence[float]
    basis: Basis
    parts: list[Tensor]
    kappa: Tensor  # (r,), see `fed.numerics.consensus`
    energy: Tensor  # sum_k p_k |c_ki|^2, (r,)

    @classmethod
    def of(cls, mats: Matrices, p: Sequence[float], rank: int | None) -> Shared:
        side = len(next(iter(mats)))
        how: Literal["exact", "auto"] = "exact" if side <= EXACT else "auto"
        basis = joint_basis(mats, p, rank=rank or (None if side <= EXACT else LEADING), how=how)
        parts = [basis.vectors.T @ x for x in mats]
        kappa, energy = _agreed(parts, p)
        return cls(mats, p, basis, parts, kappa, energy)

    @property
    def chance(self) -> float:
        """kappa of unrelated experts."""
        return sum(share * share for share in self.p)

    def conflicts(self, deviations: float | None) -> Tensor:
        """Directions in which experts oppose each other beyond chance, (r,) of bool.

        Rows of unrelated experts have kappa = sum_k p_k^2 |c_ki|^2 / E_i, E_i = sum_k p_k |c_ki|^2,
        give or take 2 (sum_{j<k} p_j^2 p_k^2 |c_ji|^2 |c_ki|^2 q)^(1/2) / E_i for a mean squared
        cosine q of theirs. q is measured: on rows of different experts along different directions,
        which have nothing to do with each other. None: there are none.
        """
        if deviations is None:
            return torch.zeros_like(self.kappa, dtype=torch.bool)
        squares = torch.stack([c.square().sum(1) for c in self.parts])
        ours = squares * squares.new_tensor(self.p).square()[:, None]
        pairs = (ours.sum(0).square() - ours.square().sum(0)) / 2
        energy = self.energy.clamp(min=1e-30)
        spread = 2 * (pairs * self._unrelated(squares)).sqrt() / energy
        return self.kappa < ours.sum(0) / energy - deviations * spread - NOISE

    def _unrelated(self, squares: Tensor) -> float:
        """The mean squared cosine of one expert's rows with the next rows of the others."""
        found, weight = 0.0, 0.0
        for j, k in itertools.permutations(range(len(self.parts)), 2):
            products = (self.parts[j] * self.parts[k].roll(1, 0)).sum(1).square()
            of_both = squares[j] * squares[k].roll(1, 0)
            found, weight = found + float(products.sum()), weight + float(of_both.sum())
        return found / weight if weight else 0.0

    def aligned(self) -> list[float]:
        """p_k times the share of its energy that expert k has in directions that are shared beyond
        chance, normalised; p_k where none has any."""
        high, found = self.kappa >= self.chance, []
        for share, x, c in zip(self.p, self.mats, self.parts, strict=True):
            whole = float(torch.linalg.vector_norm(x)) ** 2
            found.append(share * float(c[high].square().sum()) / whole if whole else 0.0)
        return shares(found) if any(found) else list(self.p)

    def joined(
        self,
        low: Tensor,
        alpha: Sequence[float],
        *,
        specific: float,
        rescale: float,
        power: float,
        subspace: tuple[float, float] | None,
    ) -> tuple[Tensor, dict[str, Any]]:
        """The merged matrix, (side, width), and the facts of the layer.

        Args:
            low: directions in conflict, (r,).
            alpha: scalar weights that sum to one.
            specific: by what is multiplied what the filter leaves.
            subspace: `noise` and `floor` of matrix weights, or None.
        """
        parts = filtered(self.parts, self.p, low, specific)
        if subspace is None:
            rows = total(a * c for a, c in zip(alpha, parts, strict=True))
        else:
            rows = by_subspace(parts, alpha, *subspace)
        kappa = consensus(rows, self.energy)
        gain = torch.where(low, 1, kappa.pow(-power).clamp(1, rescale))
        rows = rows * gain[:, None]
        if len(self.basis.vectors) == self.basis.vectors.shape[1]:
            return self.basis.vectors @ rows, self._facts(low, alpha, gain, None)
        mean = mean_matrix(self.mats, alpha)
        inside = self.basis.vectors.T @ mean
        left = max(self.basis.total - float(self.energy.sum()), 0.0)
        rest = rest_of(mean, inside, left, self.basis.total, rescale, power)
        merged = mean.mul_(rest.gain).addmm_(self.basis.vectors, rows - rest.gain * inside)
        return merged, self._facts(low, alpha, gain, rest)

    def _facts(
        self, low: Tensor, alpha: Sequence[float], gain: Tensor, rest: Rest | None
    ) -> dict[str, Any]:
        """Means over directions are weighted by the directions' energy."""
        energy = float(self.energy.sum())
        weight = self.energy / energy if energy else torch.full_like(gain, 1 / len(gain))
        return {
            "side": len(self.basis.vectors),
            "rank": len(gain),
            "kappa": float(weight @ self.kappa),
            "chance": self.chance,
            "conflict": float(weight @ low.to(weight)),
            "gain": float(weight @ gain.to(weight)),
            "alpha": list(alpha),
            "rest": rest and {"kappa": rest.kappa, "gain": rest.gain},
        }


def filtered(
    parts: Sequence[Tensor], p: Sequence[float], low: Tensor, specific: float
) -> Sequence[Tensor]:
    """Coefficients without what opposes their sum, times `specific`, in the directions `low`."""
    if not low.any():
        return parts
    mean = total(share * c for share, c in zip(p, parts, strict=True))
    unit = mean / mean.norm(dim=1, keepdim=True).clamp(min=1e-30)
    kept = []
    for c in parts:
        against = (c * unit).sum(1, keepdim=True).clamp(max=0)
        kept.append(torch.where(low[:, None], specific * (c - against * unit), c))
    return kept


def by_subspace(
    parts: Sequence[Tensor], alpha: Sequence[float], noise: float, floor: float
) -> Tensor:
    """(sum_k W_k)^-1 sum_k W_k C_k, (r, width), with W_k = a_k (P_k + floor), (r, r).

    P_k = G_k (G_k + noise * mean eigenvalue of G_k)^-1, G_k = C_k C_k^T, is a soft projector onto
    the directions in which expert k has moved; `floor` is in units of the mean eigenvalue of sum_k
    a_k P_k. The lengths of the experts do not count.
    """
    softened = []
    for c in parts:
        moment = c @ c.T
        level = noise * float(moment.diagonal().mean()) or 1.0
        loaded = moment.clone()
        loaded.diagonal().add_(level)
        softened.append(torch.linalg.solve(loaded, moment))
    whole = total(a * w for a, w in zip(alpha, softened, strict=True))
    level = floor * float(whole.diagonal().mean()) or 1.0
    rows = total(a * (w @ c + level * c) for a, w, c in zip(alpha, softened, parts, strict=True))
    whole.diagonal().add_(level)
    return torch.linalg.solve(whole, rows)


def _agreed(parts: Sequence[Tensor], p: Sequence[float]) -> tuple[Tensor, Tensor]:
    """kappa and energy of each direction, (r,)."""
    rows = total(share * c for share, c in zip(p, parts, strict=True))
    energies = total(share * c.square().sum(1) for share, c in zip(p, parts, strict=True))
    return consensus(rows, energies), energies
