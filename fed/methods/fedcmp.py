"""Fed-CMP: federated pre-training of the cross-modal projector (arXiv 2603.26786).

What the paper's abstract says [P]; how each step is made is our reading [R], as its text and code
were not to be had. Per layer, with A = [W | b], shape (out, in + 1), and p_k = n_k / sum_j n_j:

Canonical Reliability-Aware Aggregation [P]: "constructs a canonical space to decompose client
projectors into a shared alignment basis and client-specific coefficients, then performs
reliability-weighted fusion".
  1. X_k = A_k - A^t (`space` updates) or A_k (weights)                                        [R]
  2. U: the leading eigenvectors of S = sum_k p_k X_k X_k^T, as many as `energy`, `rank` say   [R]
  3. C_k = U^T X_k, rows c_ki                                                                  [R]
  4. a_ki = cos(c_ki, sum_{j != k} p_j c_ji);  rho_ki = softmax over k of log p_k + a_ki / tau [R]
  5. c_i = g_i sum_k rho_ki c_ki, where g_i, between 1 and `rescale`, gives the row the mean length
     of the clients' rows: the mean of nearly orthogonal rows is short                         [R]

Orthogonality-Preserved Momentum [P]: "applies momentum to the shared alignment basis via orthogonal
projection, accumulating historical optimization directions while preserving geometric structure".
  6. B^{t-1} aligned to U (`align`), B^t = polar(beta B^{t-1} + (1 - beta) U), X = B^t C        [R]
  7. A^{t+1} = A^t + X (updates) or X (weights)

tau = inf, rescale = 1, energy = 1, beta = 0 is FedAvg. With beta = 0 there is no memory. Where the
basis is square and the alignment procrustes, B^t = U whatever beta is: momentum needs r < out.
Aligning U to B^{t-1} and turning C with it gives the same X; this way round, the memory of another
rank is no special case: directions without history stand as they are.

The server needs three sums over clients and nothing else: S, sum_k p_k C_k, and of rho~ c, rho~ and
rho~ |c|, where rho~_ki = p_k exp((a_ki - 1) / tau) is known to client k from the second sum. So the
same result can come out of secure aggregation. Norms, scales and other tensors that are no layer
are averaged by samples.
"""

from __future__ import annotations

import math
from typing import Any, Literal

import torch
from torch import Tensor

from fed.methods.registry import Outcome, method
from fed.space import (
    Basis,
    consensus,
    from_matrix,
    joint_basis,
    layers,
    polar,
    shares,
    to_matrix,
    weighted_sum,
)
from fed.space import align as align_to
from fed.state import State, StateError
from llava.errors import InputError

MIN_TAU = 0.01  # exp(-2 / tau) must stay a float64
NOISE = 1e-6  # a row so much shorter than another is the rounding of float32


@method("fedcmp")
def fedcmp(
    states: list[State],
    *,
    weights: list[float],
    base: State,
    memory: dict[str, Tensor],
    space: Literal["updates", "weights"] = "updates",
    energy: float = 1.0,
    rank: int | None = None,
    basis: Literal["auto", "exact", "randomised"] = "auto",
    tau: float = math.inf,
    rescale: float = 4.0,
    beta: float = 0.0,
    align: Literal["procrustes", "signs"] = "procrustes",
) -> Outcome:
    """One round of Fed-CMP.

    Memory holds B^t as `<layer>.basis`, (out, r), while beta > 0. Facts hold what `describe` and
    `momentum` say of each layer, and the names of the tensors that were averaged.
    """
    _check_range("energy", energy, 0 < energy <= 1, "in (0, 1]")
    _check_range("rank", rank, rank is None or rank >= 1, "at least 1, or none")
    _check_range("tau", tau, tau >= MIN_TAU, f"at least {MIN_TAU}")
    _check_range("rescale", rescale, 1 <= rescale < math.inf, "at least 1 and finite")
    _check_range("beta", beta, 0 <= beta < 1, "in [0, 1)")
    p = shares(weights)
    affine, others = layers(base)
    _check_memory(memory, {f"{layer.name}.basis": len(base[layer.weight]) for layer in affine})

    result = {name: weighted_sum([s[name] for s in states], p) for name in others}
    kept: dict[str, Tensor] = {}
    facts: dict[str, Any] = {"layers": {}, "averaged": others}
    for layer in affine:
        start = to_matrix(base, layer)
        origin = start if space == "updates" else torch.zeros_like(start)
        parts = [to_matrix(state, layer) - origin for state in states]
        shared = joint_basis(parts, p, energy=energy, rank=rank, how=basis)
        coefficients = [shared.vectors.T @ x for x in parts]
        fused, gain, agreed, rho = fuse(coefficients, p, tau, rescale)
        key = f"{layer.name}.basis"
        turned, history = momentum(shared, memory.get(key), beta, align)
        result |= from_matrix(origin + turned @ fused, layer, base)
        if beta > 0 and shared.total > 0:
            kept[key] = turned.float()
        elif beta > 0 and key in memory:  # nobody moved: U means nothing, the history stays
            kept[key] = memory[key]
        said = describe(shared, coefficients, p, gain, agreed, rho)
        facts["layers"][layer.name] = {**said, "momentum": history}
    return Outcome(result, kept, facts)


def agreement(c: Tensor, p: float, mean: Tensor) -> Tensor:
    """a_ki of one client, (r,): the cosine of its rows with what the others' add up to.

    `c` are its coefficients, (r, in), `p` its share, `mean` is sum_j p_j C_j over all clients, this
    one among them. Where one side moves and the other only by rounding there is no agreement: 0.
    """
    own = p * c.double()
    others = mean - own
    lengths = torch.stack([own.norm(dim=1), others.norm(dim=1)])
    cosine = (own * others).sum(1) / lengths.prod(0)
    return torch.where(lengths.amin(0) > NOISE * lengths.amax(0), cosine.clamp(-1, 1), 0)


def reliability(agreed: Tensor, p: float, tau: float) -> Tensor:
    """rho~_ki of one client, (r,): rho_ki before it is divided by the sum over clients."""
    return p * ((agreed - 1) / tau).exp()


def merge_rows(rows: Tensor, lengths: Tensor, rho: Tensor, rescale: float) -> tuple[Tensor, Tensor]:
    """Fused rows, (r, in), and gains g, (r,), from the sums of rho~ c, rho~ |c| and rho~."""
    short = rows.norm(dim=1)
    gain = torch.where(short > 0, lengths / short, 1).clamp(1, rescale)
    return rows * (gain / rho)[:, None], gain


def fuse(
    coefficients: list[Tensor], p: list[float], tau: float, rescale: float
) -> tuple[Tensor, Tensor, list[Tensor], list[Tensor]]:
    """Steps 4 and 5: fused coefficients, (r, in), gains, (r,), and a_k, rho_k, (r,) per client."""
    mean = weighted_sum(coefficients, p)
    agreed = [agreement(c, share, mean) for c, share in zip(coefficients, p, strict=True)]
    rho = [reliability(a, share, tau) for a, share in zip(agreed, p, strict=True)]
    rows, lengths = torch.zeros_like(mean), torch.zeros_like(rho[0])
    for c, r in zip(coefficients, rho, strict=True):
        rows += r[:, None] * c
        lengths += r * c.double().norm(dim=1)
    total = sum(rho)
    fused, gain = merge_rows(rows, lengths, total, rescale)
    return fused.to(coefficients[0].dtype), gain, agreed, [r / total for r in rho]


def momentum(
    shared: Basis, previous: Tensor | None, beta: float, how: Literal["procrustes", "signs"]
) -> tuple[Tensor, dict[str, float] | None]:
    """Step 6: B^t, (out, r), and what the history did; U and None where there is none.

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
        turned = polar(beta * align_to(previous, u, how) + (1 - beta) * u)
    moved = float((turned - u).norm()) / math.sqrt(u.shape[1])
    return turned, {"overlap": min(overlap, 1.0), "turned": moved}


def describe(
    shared: Basis,
    coefficients: list[Tensor],
    p: list[float],
    gain: Tensor,
    agreed: list[Tensor],
    rho: list[Tensor],
) -> dict[str, Any]:
    """The facts of a layer; means over directions are weighted by the directions' energy."""
    energies = shared.energies.double()
    kept = float(energies.sum())
    weight = energies / kept if kept > 0 else torch.full_like(energies, 1 / len(energies))
    kappa = consensus(coefficients, p)
    return {
        "side": len(shared.vectors),
        "rank": len(energies),
        "basis": shared.how,
        "energy_kept": min(kept / shared.total, 1.0) if shared.total > 0 else 1.0,
        "spectrum": (energies[:8] / (shared.total or 1.0)).tolist(),
        "kappa": {
            "mean": float(weight @ kappa),
            "min": float(kappa.min()),
            "median": float(kappa.median()),
            "max": float(kappa.max()),
        },
        "gain": float(weight @ gain),
        "agreement": [float(weight @ a) for a in agreed],
        "reliability": [float(weight @ r) for r in rho],
    }


def _check_range(option: str, value: float | None, fits: bool, expected: str) -> None:
    if not fits:
        raise InputError(f"fedcmp option {option}: expected {expected}, found {value}")


def _check_memory(memory: dict[str, Tensor], sides: dict[str, int]) -> None:
    for name, tensor in memory.items():
        if name not in sides:
            raise StateError(f"fedcmp memory: {name} is no layer of the base ({', '.join(sides)})")
        rows, columns = tensor.shape if tensor.ndim == 2 else (0, 0)
        if rows != sides[name] or not 1 <= columns <= rows:
            raise StateError(
                f"fedcmp memory: {name} has shape {tuple(tensor.shape)}, expected "
                f"({sides[name]}, r) with r from 1 to {sides[name]}"
            )
        if not torch.isfinite(tensor).all():
            raise StateError(f"fedcmp memory: {name} holds NaN or infinity")
