"""Momentum on a basis: directions of earlier rounds turn those of this one towards themselves."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Literal

from torch import Tensor

from fed.numerics.joint_basis import Basis, align, polar
from fed.state import StateError, is_finite


def turn(
    shared: Basis, previous: Tensor | None, beta: float, how: Literal["procrustes", "signs"]
) -> tuple[Tensor, dict[str, float] | None]:
    """B^t = polar(beta B^{t-1} + (1 - beta) U), (out, r), and what the history did.

    B^{t-1}, (out, r0), is aligned to U first. U and None where there is no history.

    `overlap` is the share of the smaller of the spans of U and B^{t-1} that lies in the other;
    `turned` is |B^t - U|_F / sqrt(r): 0 when U was kept, sqrt(2) when turned at right angles.
    """
    u = shared.vectors
    if beta == 0 or previous is None or shared.total == 0:
        return u, None
    previous = previous.to(u)
    overlap = float((previous.T @ u).square().sum()) / min(previous.shape[1], u.shape[1])
    turned = u
    # Against or within the whole space, a procrustes alignment leaves nothing to turn.
    if how == "signs" or max(previous.shape[1], u.shape[1]) < len(u):
        turned = polar(beta * align(previous, u, how) + (1 - beta) * u)
    moved = float((turned - u).norm()) / math.sqrt(u.shape[1])
    return turned, {"overlap": min(overlap, 1.0), "turned": moved}


def check_history(memory: Mapping[str, Tensor], sides: Mapping[str, int]) -> None:
    """Refuse a memory of Fed-CMP that is not of bases of these layers, by name with their rows.

    Raises:
        StateError: naming the tensor.
    """
    for name, tensor in memory.items():
        if name not in sides:
            raise StateError(f"fedcmp memory: {name} is no layer of the base ({', '.join(sides)})")
        rows, columns = tensor.shape if tensor.ndim == 2 else (0, 0)
        if rows != sides[name] or not 1 <= columns <= rows:
            raise StateError(
                f"fedcmp memory: {name} has shape {tuple(tensor.shape)}, expected "
                f"({sides[name]}, r) with r from 1 to {sides[name]}"
            )
        if not is_finite(tensor):
            raise StateError(f"fedcmp memory: {name} holds NaN or infinity")
