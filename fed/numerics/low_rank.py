"""Singular vectors of one matrix: the leading ones, and all of them with one length.

Where the smaller side is at most 1024 all is exact, in float64. Above that an SVD takes a minute
(4096 x 4096) and is not taken: leading vectors come from a range finder, the isometry from QDWH.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from fed.numerics.layers import LARGE

CUT = 1e-6  # a direction so much shorter than the longest is the rounding of float32
OVERSAMPLE = 4  # one further direction for so many that the range finder is to find
PASSES = 5  # applications of X X^T in the range finder; each sharpens the leading directions
_LEAST = 1e-5  # of the longest: the shortest direction that QDWH is to bring to length 1
_EXACT = 100.0  # a QDWH step whose weight c is above this loses digits in float32
_ROWS = 512  # taken to float64 at once


class Triplets(NamedTuple):
    """X is nearly left @ diag(lengths) @ right.T; longest first."""

    left: Tensor  # (out, r), orthonormal columns
    lengths: Tensor  # (r,)
    right: Tensor  # (in, r)


def leading(matrix: Tensor, rank: int, seed: int = 0) -> Triplets:
    """The `rank` leading singular triplets of a matrix (out, in), in its own type.

    Fewer of a matrix that has fewer above the rounding.

    Above 1024 from a randomised range (Halko, Martinsson, Tropp 2011). The worst case is a matrix
    whose singular values hardly decay, where directions at the edge are as good as their
    neighbours: of Gaussian noise, what is left out is 0.5 % more than need be.
    """
    if min(matrix.shape) <= LARGE:
        u, s, vt = torch.linalg.svd(matrix.double(), full_matrices=False)
        found = Triplets(u, s, vt.T)
    else:
        size = min(rank + max(32, rank // OVERSAMPLE), *matrix.shape)
        frame = torch.linalg.qr(matrix @ random_frame(matrix.shape[1], size, matrix, seed)).Q
        frame = leading_range(lambda found: matrix @ (matrix.T @ found), frame, PASSES - 1)
        inside = frame.T @ matrix
        squares, turn = torch.linalg.eigh(inside.double() @ inside.double().T)
        s = squares.flip(0).clamp(min=0).sqrt()
        turn = turn.flip(1).to(matrix.dtype)
        right = inside.T @ turn
        found = Triplets(frame @ turn, s, right / s.clamp(min=1e-30).to(right.dtype))
    kept = slice(0, min(rank, int((found.lengths > CUT * found.lengths[:1]).sum())))
    parts = (found.left[:, kept], found.lengths[kept], found.right[:, kept])
    return Triplets(*(part.to(matrix.dtype) for part in parts))


def random_frame(side: int, size: int, like: Tensor, seed: int) -> Tensor:
    """Gaussian numbers, (side, size), of the type and on the device of `like`."""
    draw = torch.Generator().manual_seed(seed)
    return torch.randn(side, size, generator=draw, dtype=like.dtype).to(like.device)


def leading_range(apply: Callable[[Tensor], Tensor], frame: Tensor, passes: int) -> Tensor:
    """An orthonormal frame, (side, size), of the leading eigenvectors of a symmetric S.

    Subspace iteration (Halko, Martinsson, Tropp 2011). torch.svd_lowrank takes one matrix, where S
    may be a sum over clients, and draws from torch's common random numbers.

    Args:
        apply: F -> S F.
        frame: to begin with.
    """
    for _ in range(passes):
        frame = torch.linalg.qr(apply(frame)).Q
    return frame


def isometry(matrix: Tensor) -> Tensor:
    """U V^T of a matrix U S V^T: the same singular vectors, all of length 1.

    A direction that the matrix has not (shorter than 1e-6 of its longest) stays out where the
    smaller side is at most 1024; an SVD would put a random one there. Above, those that are longer
    than 1e-5 of the longest are right to 1e-4, and shorter ones are lengthened by a factor of a
    million: the rounding of float32 does not vanish, but stays short.
    """
    if min(matrix.shape) > LARGE:
        return _qdwh(matrix) if len(matrix) >= matrix.shape[1] else _qdwh(matrix.T).T
    u, s, vt = torch.linalg.svd(matrix.double(), full_matrices=False)
    kept = s > CUT * s[:1]
    return (u[:, kept] @ vt[kept]).to(matrix.dtype)


def _qdwh(matrix: Tensor) -> Tensor:
    """Dynamically weighted Halley steps (Nakatsukasa, Bai, Gygi 2010), by Cholesky; tall matrices.

        X <- (b / c) X + (a - b / c) X (I + c X^T X)^-1

    The weights follow from a lower bound of the singular values, here 1e-5 after scaling.
    """
    longest = _longest(matrix)
    if longest == 0:
        return torch.zeros_like(matrix)
    x, least = matrix / longest, _LEAST
    while least < 1 - 1e-6:
        d = (4 * (1 - least**2) / least**4) ** (1 / 3)
        a = math.sqrt(1 + d) + 0.5 * math.sqrt(
            8 - 4 * d + 8 * (2 - least**2) / (least**2 * math.sqrt(1 + d))
        )
        b = (a - 1) ** 2 / 4
        c = a + b - 1
        x = _step(x, a, b, c, torch.float64 if c > _EXACT else x.dtype)
        least = min(1.0, least * (a + b * least**2) / (1 + c * least**2))
    return x


def _step(x: Tensor, a: float, b: float, c: float, dtype: torch.dtype) -> Tensor:
    moment = torch.zeros(x.shape[1], x.shape[1], dtype=dtype, device=x.device)
    for start in range(0, len(x), _ROWS):
        rows = x[start : start + _ROWS].to(dtype)
        moment.addmm_(rows.T, rows, alpha=c)
    moment.diagonal().add_(1)
    info = torch.empty((), dtype=torch.int32, device=x.device)
    factor, _ = torch.linalg.cholesky_ex(moment, out=(moment, info))  # positive: it has I in it
    out = torch.empty_like(x)
    for start in range(0, len(x), _ROWS):
        rows = x[start : start + _ROWS].to(dtype)
        solved = torch.cholesky_solve(rows.T, factor).T
        out[start : start + _ROWS] = (b / c) * rows + (a - b / c) * solved
    return out


def _longest(matrix: Tensor, steps: int = 30) -> float:
    """A little more than the largest singular value, by power iteration; 0 of zeros."""
    draw = torch.Generator().manual_seed(0)
    v = torch.randn(matrix.shape[1], generator=draw, dtype=matrix.dtype).to(matrix.device)
    for _ in range(steps):
        v = matrix.T @ (matrix @ v)
        v /= v.norm().clamp(min=1e-30)
    return 1.05 * float((matrix @ v).norm())
