"""Momentum: earlier rounds' steps within this round's basis, or earlier bases that turn it."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Literal

import torch
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


def carry(
    step: Tensor, shared: Basis, previous: Tensor | None, beta: float
) -> tuple[Tensor, dict[str, float] | None]:
    """H_t = beta U U^T H_{t-1} + X_t, (out, in), and what the history did. Overwrites X_t, `step`.

    X_t and None where there is no history, or nobody moved. `overlap` is the share of H_{t-1} that
    lies in the span of U, `length` that of what is added, relative to X_t's.
    """
    if beta == 0 or previous is None or shared.total == 0:
        return step, None
    previous = previous.to(step)
    rows = shared.vectors.T @ previous
    norms = [float(torch.linalg.vector_norm(t)) for t in (rows, previous, step)]
    inside, whole, own = norms
    step.addmm_(shared.vectors, rows, alpha=beta)
    return step, {
        "overlap": min((inside / whole) ** 2, 1.0) if whole else 0.0,
        "length": beta * inside / own if own else 0.0,
    }


def check_history(memory: Mapping[str, Tensor], shapes: Mapping[str, tuple[int, int]]) -> None:
    """Refuse a memory of Fed-CMP that is not of these layers.

    Args:
        shapes: of a layer's `.step`, (out, in), and of its largest `.basis`, (out, out), by name.

    Raises:
        StateError: naming the tensor.
    """
    for name, tensor in memory.items():
        if name not in shapes:
            raise StateError(f"fedcmp memory: {name} is no layer of the base ({', '.join(shapes)})")
        rows, columns = tensor.shape if tensor.ndim == 2 else (0, 0)
        side, most = shapes[name]
        if rows != side or not (1 if name.endswith(".basis") else most) <= columns <= most:
            wanted = f"r) with r from 1 to {most}" if name.endswith(".basis") else f"{most})"
            raise StateError(
                f"fedcmp memory: {name} has shape {tuple(tensor.shape)}, expected ({side}, {wanted}"
            )
        if not is_finite(tensor):
            raise StateError(f"fedcmp memory: {name} holds NaN or infinity")
