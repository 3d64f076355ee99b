"""The shared space of several clients' matrices. Fed-CMP lives on it, and merging can.

A layer of the projector is one matrix A = [W | b], shape (out, in + 1). The matrices X_1..X_K of a
layer, with shares p_k that sum to one, are written in one orthonormal basis U of the output space,
the leading eigenvectors of S = sum_k p_k X_k X_k^T, with one coefficient matrix C_k = U^T X_k each.
Pure functions, on tensors only.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from fed.state import State

# Up to this side float64 costs next to nothing; above it eigh takes tens of seconds in float32.
LARGE = 1024
OVERSAMPLE = 16  # further directions that the range finder draws and throws away
PASSES = 3  # applications of S in the range finder; each sharpens the leading directions
CHUNK = 2**16  # values that are summed over the clients at once
_TABLES = (
    "embed_tokens.weight",
    "lm_head.weight",
)  # rows are words there


@dataclass(frozen=True)
class Layer:
    """One affine map: its name, and the names of its two tensors in the state."""

    name: str
    weight: str
    bias: str | None


@dataclass(frozen=True)
class Basis:
    """An orthonormal basis of what the clients share, the direction with most energy first."""

    vectors: Tensor  # U, (out, r)
    energies: Tensor  # eigenvalues of S, (r,)
    total: float  # trace of S: the energy of all directions, kept or not
    how: str  # "exact" or "randomised"


def layers(state: State) -> tuple[list[Layer], list[str]]:
    """The affine layers of a state, and the names that belong to none (norms, scales, word tables).

    A layer is a `*.weight` of two or more dimensions, (out, in, ...), and its `*.bias`, (out,).
    """
    found = []
    for name, tensor in state.items():
        if tensor.ndim < 2 or not name.endswith(".weight") or name.endswith(_TABLES):
            continue
        stem = name.removesuffix(".weight")
        bias = state.get(f"{stem}.bias")
        fits = bias is not None and bias.shape == tensor.shape[:1]
        found.append(Layer(stem, name, f"{stem}.bias" if fits else None))
    taken = {name for layer in found for name in (layer.weight, layer.bias)}
    return found, [name for name in state if name not in taken]


def to_matrix(state: State, layer: Layer) -> Tensor:
    """The layer as [W | b], (out, in + 1); float64 up to an `out` of 1024, float32 above."""
    parts = [state[layer.weight].flatten(1)]
    if layer.bias:
        parts.append(state[layer.bias][:, None])
    dtype = torch.float64 if len(parts[0]) <= LARGE else torch.float32
    return torch.cat([part.to(dtype) for part in parts], dim=1)


def from_matrix(matrix: Tensor, layer: Layer, like: State) -> State:
    """Inverse of `to_matrix`: tensors with the shapes of `like`, in the matrix's dtype."""
    shape = like[layer.weight].shape
    if not layer.bias:
        return {layer.weight: matrix.reshape(shape)}
    return {layer.weight: matrix[:, :-1].reshape(shape), layer.bias: matrix[:, -1]}


def shares(weights: Sequence[float]) -> list[float]:
    """Weights divided by their sum."""
    total = sum(weights)
    return [weight / total for weight in weights]


def weighted_sum(tensors: Sequence[Tensor], weights: Sequence[float]) -> Tensor:
    """sum_k w_k T_k in float64, whatever the type of the tensors, which may be memory-mapped."""
    total = torch.zeros_like(tensors[0], dtype=torch.float64, memory_format=torch.contiguous_format)
    flat, parts = total.view(-1), [tensor.reshape(-1) for tensor in tensors]
    for start in range(0, len(flat), CHUNK):  # a chunk stays in the cache until all were added
        for part, weight in zip(parts, weights, strict=True):
            flat[start : start + CHUNK].add_(part[start : start + CHUNK], alpha=weight)
    return total


def joint_basis(
    mats: Sequence[Tensor],
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
    2011) where few directions of many are wanted. `energy` = 1 and no `rank` keep every direction,
    so that U U^T X_k = X_k to rounding.

    Args:
        energy: in (0, 1]; the fewest directions that hold this share of the trace of S.
        rank: at most so many directions; None for no bound.
        how: `auto` takes the range finder where the side is above 1024 and `rank` a quarter of it
            or less. `randomised` needs no rank, but saves nothing without one.
    """
    side, columns = len(mats[0]), sum(m.shape[1] for m in mats)
    full = min(side, columns)
    rank = min(rank or full, full)
    if how == "auto":
        how = "randomised" if full > LARGE and rank <= full // 4 else "exact"
    if how == "randomised":
        frame = _range(mats, shares, min(rank + OVERSAMPLE, full), seed)
    elif columns < side:
        frame = torch.linalg.qr(torch.cat(list(mats), dim=1)).Q
    else:
        frame = None

    inside = mats if frame is None else [frame.T @ m for m in mats]
    energies, vectors = torch.linalg.eigh(gram(inside, shares))
    energies, vectors = energies.flip(0).clamp(min=0), vectors.flip(1)
    vectors = vectors if frame is None else frame @ vectors
    total = sum(
        p * float(m.square().sum(dtype=torch.float64)) for m, p in zip(mats, shares, strict=True)
    )
    if energy < 1:
        rank = min(rank, 1 + int((energies.cumsum(0) < energy * total).sum()))
    return Basis(vectors[:, :rank].contiguous(), energies[:rank], total, how)


def gram(mats: Sequence[Tensor], shares: Sequence[float]) -> Tensor:
    """S = sum_k p_k X_k X_k^T, (out, out): a sum over clients."""
    return sum(p * (m @ m.T) for m, p in zip(mats, shares, strict=True))


def _range(mats: Sequence[Tensor], shares: Sequence[float], size: int, seed: int) -> Tensor:
    """An orthonormal (out, size) frame of the leading directions; a pass is a sum over clients."""
    draw = torch.Generator().manual_seed(seed)
    frame = torch.randn(len(mats[0]), size, generator=draw, dtype=mats[0].dtype).to(mats[0].device)
    for _ in range(PASSES):
        image = sum(p * (m @ (m.T @ frame)) for m, p in zip(mats, shares, strict=True))
        frame = torch.linalg.qr(image).Q
    return frame


def consensus(coefficients: Sequence[Tensor], shares: Sequence[float]) -> Tensor:
    """kappa_i = |sum_k p_k c_ki|^2 / sum_k p_k |c_ki|^2 per direction, (r,), from (r, in) each.

    1 when all clients agree, near 1/K when they are unrelated, 0 when they cancel or none moves.
    """
    mean = weighted_sum(coefficients, shares).square().sum(1)
    each = weighted_sum([c.double().square().sum(1) for c in coefficients], shares)
    return torch.where(each > 0, mean / each, 0).clamp(0, 1)


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
