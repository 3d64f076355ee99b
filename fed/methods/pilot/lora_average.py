"""Averages of LoRA, each client's own: of its factors, or of the updates that they stand for.

Client k's is sum_j w_kj Theta_j. With `factors` Theta is A and B, each averaged by itself, as is
common; but LoRA adds B A to a weight, and B_1 A_1 + B_2 A_2 is not (B_1 + B_2)(A_1 + A_2). With
`product` it is sum_j w_kj B_j A_j, cut back to the rank r by its SVD, U S V^T: the nearest of that
rank. Then B = U sqrt(S), A = sqrt(S) V^T. The sum is never formed. Directions that it has not keep
the mean's A beside a B of 0, as LoRA begins: where both were 0, neither would have a gradient.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from fed.methods.interface.each import Each
from fed.numerics.chunks import blocks, empty
from fed.numerics.lora_delta import A, B, Products, factored, truncated_sum
from fed.state import State


def averaged_lora(states: Sequence[State], base: State, weights: Tensor, product: bool) -> Each:
    """One state per client k, sum_j `weights`[k, j] of client j, in `base`'s types.

    Args:
        weights: (K, K), no less than 0.
        product: of the updates B A; tensors that are not of such a pair are averaged as they are.
    """
    if bool((weights == weights[0]).all()):  # one mean for all, for which all states are read
        mean = _averaged(states, base, weights[0], product)
        return Each(len(states), lambda k: mean)
    return Each(len(states), lambda k: _averaged(states, base, weights[k], product))


def _averaged(states: Sequence[State], base: State, weights: Tensor, product: bool) -> State:
    """sum_j `weights`[j] of client j; those of weight 0 are not read."""
    mixed = weights.nonzero().flatten().tolist()
    states, shares = [states[j] for j in mixed], weights[mixed]
    pairs = Products(base).stems if product else []
    factors = {stem + end for stem in pairs for end in (A, B)}
    result = empty(base)
    for block in blocks(states, {n: t for n, t in base.items() if n not in factors}):
        block.write(result, shares @ block.clients)
    for stem in pairs:
        pair = base[stem + A], base[stem + B]
        left = torch.cat(
            [float(w) * state[stem + B].float() for w, state in zip(shares, states, strict=True)], 1
        )
        right = torch.cat([state[stem + A].float() for state in states])
        found = truncated_sum(left, right, len(pair[0]))
        a, b = factored(*found, *pair)
        mean = torch.tensordot(shares.float(), right.view(len(states), *pair[0].shape), 1)
        result[stem + A] = torch.where(found[1][:, None] > 0, a, mean.to(a.dtype))
        result[stem + B] = b
    return result
