"""How the experts lie to each other and to the base, from the inner products of a layer alone.

With T_k = A_k - A_0 as vectors, the (K + 1, K + 1) matrix G of the inner products of A_0, T_1..T_K
says all of it, and the G of several layers add up.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from fed.numerics.chunks import blocks
from fed.numerics.joint_basis import joint_basis, mean_matrix
from fed.numerics.layers import Parts, layers
from fed.numerics.weighted_mean import shares
from fed.state import State

Gram = dict[str, Tensor]  # by layer, float64


def gram(states: Sequence[State], base: State) -> Gram:
    """G of each layer; a layer is what is called the same but for `.weight` and `.bias`."""
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
    """What a G says; numbers that are not defined, of a vector of length 0, are None.

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
    heard = [k for k, weight in enumerate(weights) if weight > 0]
    p = shares([weights[k] for k in heard])
    found = {}
    for layer in layers(base)[0]:
        mats = Parts([states[k] for k in heard], layer, base)
        basis = joint_basis(mats, p)
        parts = [basis.vectors.T @ m for m in mats]
        common = mean_matrix(parts, p).square().sum(1)
        energies = sum(share * c.square().sum(1) for share, c in zip(p, parts, strict=True))
        if float(energies.sum()) > 0:
            kappa = float(common.sum() / energies.sum())
            found[layer.name] = {"kappa": kappa, "count": len(energies)}
    return found


def ratio(a: float, b: float) -> float | None:
    """a / b, None where b is 0."""
    return a / b if b > 0 else None
