"""Task-vector statistics: how experts relate to each other and to the base, layer by layer.

With T_k = A_k - A_0 as vectors, the (K + 1, K + 1) matrix G of the inner products of A_0, T_1..T_K
has all of it, and the G of several layers add up.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from fed.merging.sources import Source
from fed.numerics.chunks import blocks
from fed.numerics.joint_basis import joint_basis, mean_matrix
from fed.numerics.layers import Parts, layers
from fed.numerics.weighted_mean import shares
from fed.state import State

# A base is not the experts' common start where all task vectors have one direction, the detour from
# it by the start; or where little of it is left in the experts. <A_k, A_0> / |A_0|^2 is about 1 for
# what was trained from A_0, as training adds to what was there, and 0 for what knows nothing of it.
SAME_WAY = 0.9  # least cosine between task vectors
LEFT = 0.5  # least of these shares

Gram = dict[str, Tensor]  # by layer, float64


def gram(states: Sequence[State], base: State) -> Gram:
    """G of each layer; a layer's tensors have one name but for `.weight` and `.bias`."""
    found: Gram = {}
    rows = torch.empty(0)
    for block in blocks(states, base):
        size = (len(states) + 1, len(block.base))
        rows = rows if rows.shape == size else torch.empty(size, dtype=torch.float64)
        rows[0] = block.base
        torch.sub(block.clients, block.base, out=rows[1:])
        product = rows @ rows.T
        name = stem(block.name)
        found[name] = found[name] + product if name in found else product
    return found


def stem(name: str) -> str:
    """A tensor's name without `.weight` or `.bias`."""
    return name.removesuffix(".weight").removesuffix(".bias")


def total(grams: Gram) -> Tensor:
    """G of all layers as one vector."""
    return torch.stack(list(grams.values())).sum(0)


def describe(g: Tensor, weights: Sequence[float]) -> dict[str, Any]:
    """The statistics of a G; numbers that are not defined, of a vector of length 0, are None.

    `base`: |A_0|. `norms`: |T_k|. `relative`: |T_k| / |A_0|. `cosines`: between T_j and T_k, (K, K)
    nested. `left`: <A_k, A_0> / |A_0|^2, how much of the base is left in A_k. `kappa`:
    |sum_k p_k T_k|^2 / sum_k p_k |T_k|^2, the share of what the experts learnt that they have in
    common: 1 where all agree, `chance` where they are unrelated and of one length, 0 where they
    cancel.
    """
    base, norms = math.sqrt(g[0, 0]), g.diagonal()[1:].clamp(min=0).sqrt()
    p = torch.tensor(shares(list(weights)), dtype=torch.float64)
    steps = g[1:, 1:]
    energy = float(p @ norms.square())
    return {
        "base": base,
        "norms": norms.tolist(),
        "relative": [ratio(float(n), base) for n in norms],
        "cosines": [
            [ratio(float(steps[j, k]), float(norms[j] * norms[k])) for k in range(len(steps))]
            for j in range(len(steps))
        ],
        "left": [ratio(float(g[0, 0] + along), float(g[0, 0])) for along in g[0, 1:]],
        "kappa": ratio(float(p @ steps @ p), energy),
        "chance": float(p @ p),
    }


def directions(states: Sequence[State], base: State, weights: Sequence[float]) -> dict[str, Any]:
    """By layer, kappa in the joint basis of the task vectors: the mean by the directions' energy.

    Of large layers only the leading directions are looked at, see `joint_basis`.
    """
    used = [k for k, weight in enumerate(weights) if weight > 0]
    p = shares([weights[k] for k in used])
    found = {}
    for layer in layers(base)[0]:
        mats = Parts([states[k] for k in used], layer, base)
        basis = joint_basis(mats, p)
        parts = [basis.vectors.T @ m for m in mats]
        common = mean_matrix(parts, p).square().sum(1)
        squares = torch.stack([c.square().sum(1) for c in parts])
        energies = torch.tensor(p, dtype=squares.dtype) @ squares
        if float(energies.sum()) > 0:
            kappa = float(common.sum() / energies.sum())
            found[layer.name] = {"kappa": kappa, "count": len(energies)}
    return found


def ratio(a: float, b: float) -> float | None:
    """a / b, None where b is 0."""
    return a / b if b > 0 else None


def check_start(facts: dict[str, Any], base: Source) -> list[str]:
    """Warn where the directions of the task vectors say that the base is not the common start.

    Args:
        facts: of all layers together, see `describe`.
    """
    cosines = [c for j, row in enumerate(facts["cosines"]) for c in row[:j] if c is not None]
    left = [share for share in facts["left"] if share is not None]
    if not cosines or not left or (min(cosines) <= SAME_WAY and min(left) >= LEFT):
        return []
    return [
        f"{base.label} does not look like the experts' common start: the task vectors from it have "
        f"cosines of {min(cosines):.2f} to {max(cosines):.2f} (above {SAME_WAY} all go one way), "
        f"and of it {min(left):.2f} to {max(left):.2f} is left in the experts (1 is all)."
    ]
