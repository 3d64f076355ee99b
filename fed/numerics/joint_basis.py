"""The shared space of several clients' matrices, as Fed-CMP, KnOTS and PivotMerge use it.

The matrices X_1..X_K of a layer, with shares p_k that sum to one, are written in one orthonormal
basis U of the output space, the leading eigenvectors of S = sum_k p_k X_k X_k^T, with one
coefficient matrix C_k = U^T X_k each. Pure functions, on tensors only. The matrices may be a
`layers.Parts`, which makes them one at a time and overwrites each with the next.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from fed.numerics.layers import LARGE, Matrices
from fed.numerics.low_rank import leading_range, random_frame

LEADING = 64  # directions that are looked for in a large layer when no rank is asked for
OVERSAMPLE = 16  # further directions that the range finder draws and throws away
PASSES = 2  # applications of S in the range finder; each sharpens the leading directions


@dataclass(frozen=True)
class Basis:
    """An orthonormal basis of what the clients share, the direction with most energy first."""

    vectors: Tensor  # U, (out, r)
    energies: Tensor  # eigenvalues of S, (r,)
    total: float  # trace of S: the energy of all directions, kept or not
    full: int  # the most directions that there can be
    how: str  # "exact" or "randomised"


def mean_matrix(mats: Matrices, shares: Sequence[float]) -> Tensor:
    """sum_k p_k X_k, (out, in), in the matrices' own type: a sum over clients."""
    pairs = zip(mats, shares, strict=True)
    first, p = next(pairs)
    total = first * p
    for m, p in pairs:
        total.add_(m, alpha=p)
    return total


def joint_basis(
    mats: Matrices,
    shares: Sequence[float],
    *,
    energy: float = 1.0,
    rank: int | None = None,
    how: Literal["auto", "exact", "randomised"] = "auto",
    seed: int = 0,
) -> Basis:
    """The leading eigenvectors of S = sum_k p_k X_k X_k^T, for X_k of shape (out, in).

    They are the left singular vectors of the row of stacked clients [sqrt(p_k) X_k], whose SVD is
    never taken: S itself is decomposed where it is the smaller Gram, S within the span of the stack
    where that has fewer columns than rows, S within a randomised range (Halko, Martinsson, Tropp
    2011) where few directions of many are wanted. With `energy` = 1, no `rank` and `exact`, every
    direction is kept, so that U U^T X_k = X_k to rounding.

    Args:
        energy: in (0, 1]; the fewest directions that hold this share of the trace of S, or as many
            as are looked for.
        rank: at most so many directions; None for no bound.
        how: `auto` takes the range finder where the side is above 1024 and `rank` a quarter of it
            or less, or none, which then is 64. `randomised` without a rank saves nothing.
    """
    first = next(iter(mats))
    search = Search.of(first.shape[0], first.shape[1], len(mats), rank=rank, how=how)
    frame = None
    if search.how == "randomised":
        frame = random_frame(len(first), search.size, first, seed)
        frame = leading_range(lambda found: applied(mats, shares, found), frame, PASSES)
    elif first.shape[1] * len(mats) < len(first):
        frame = torch.linalg.qr(torch.cat([m.clone() for m in mats], dim=1)).Q
    moment, total = gram(mats, shares, frame)
    return search.found(moment, total, frame, energy)


@dataclass(frozen=True)
class Search:
    """How the directions of a layer are looked for: `rank` of `full`, "exact" or "randomised"."""

    rank: int
    full: int
    how: str

    @classmethod
    def of(cls, side: int, width: int, count: int, *, rank: int | None, how: str) -> Search:
        """For `count` matrices (side, width); `rank` and `how` as `joint_basis` has them."""
        full = min(side, width * count)
        if how == "auto":
            large = full > LARGE and (rank is None or rank <= full // 4)
            how = "randomised" if large else "exact"
            rank = rank or (LEADING if large else None)
        return cls(min(rank or full, full), full, how)

    @property
    def size(self) -> int:
        """The columns of the range finder's frame."""
        return min(self.rank + OVERSAMPLE, self.full)

    def found(self, moment: Tensor, total: float, frame: Tensor | None, energy: float) -> Basis:
        """The basis, from S, or from S within a frame, and the trace of S."""
        energies, vectors = torch.linalg.eigh(moment)
        energies, vectors = energies.flip(0).clamp(min=0), vectors.flip(1)
        vectors = vectors if frame is None else frame @ vectors
        rank = self.rank
        if energy < 1:
            rank = min(rank, 1 + int((energies.cumsum(0) < energy * total).sum()))
        return Basis(vectors[:, :rank].contiguous(), energies[:rank], total, self.full, self.how)


def gram(
    mats: Matrices, shares: Sequence[float], frame: Tensor | None = None
) -> tuple[Tensor, float]:
    """S = sum_k p_k X_k X_k^T, within a frame if one is given, and the trace of the whole S.

    Both are sums over clients.
    """
    moment, total = torch.empty(0), 0.0
    for k, (m, p) in enumerate(zip(mats, shares, strict=True)):
        total += p * float(torch.linalg.vector_norm(m)) ** 2
        inside = m if frame is None else frame.T @ m
        if k == 0:
            moment = (inside @ inside.T).mul_(p)
        else:
            moment.addmm_(inside, inside.T, alpha=p)
    return moment, total


def applied(mats: Matrices, shares: Sequence[float], frame: Tensor) -> Tensor:
    """S F, (out, size), of a frame F: a sum over clients."""
    image = torch.zeros_like(frame)
    for m, p in zip(mats, shares, strict=True):
        image.addmm_(m, m.T @ frame, alpha=p)
    return image


def polar(matrix: Tensor) -> Tensor:
    """The nearest matrix with orthonormal columns (rows, if it is wider than tall)."""
    left, _, right = torch.linalg.svd(matrix, full_matrices=False)
    return left @ right


def align(previous: Tensor, basis: Tensor, how: Literal["procrustes", "signs"]) -> Tensor:
    """An earlier basis, (out, r0), expressed direction by direction in terms of this one, (out, r).

    `procrustes` turns it within its span to be nearest to `basis`; `signs` only reorders and flips
    its columns. The ranks may differ: of too many columns the best fit is taken; of too few,
    directions of `basis` that they do not reach have no history (with `signs`, a column of zeros).
    """
    cosines = previous.T @ basis
    if how == "procrustes":
        return previous @ polar(cosines)
    return previous @ _matching(cosines)


def _matching(cosines: Tensor) -> Tensor:
    """A signed partial permutation, (r0, r): pairs by largest |cosine| first, each index once."""
    pairs = torch.zeros_like(cosines)
    left = cosines.abs()
    for _ in range(min(cosines.shape)):
        if left.max() < 0:
            break
        # All pairs that are each other's best: the ones that going by size would take, at once.
        best_row, best_column = left.argmax(0), left.argmax(1)
        columns = torch.arange(len(best_row), device=left.device)
        columns = columns[(best_column[best_row] == columns) & (left.max(0).values >= 0)]
        rows = best_row[columns]
        pairs[rows, columns] = torch.where(cosines[rows, columns] < 0, -1.0, 1.0).to(pairs.dtype)
        left[rows, :], left[:, columns] = -1, -1
    return pairs
