"""Averages of LoRA, each client's own: of its factors, or of the updates that they stand for.

Client k's is sum_j w_kj Theta_j. With `factors` Theta is A and B, each averaged by itself, as is
common; but LoRA adds B A to a weight, and B_1 A_1 + B_2 A_2 is not (B_1 + B_2)(A_1 + A_2). With
`product` it is sum_j w_kj B_j A_j, cut back to the rank r by its SVD, U S V^T: the nearest of that
rank. Then B = U sqrt(S), A = sqrt(S) V^T. The sum is never formed.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from fed.numerics.chunks import blocks, empty
from fed.numerics.lora_delta import A, B, Products, factored, truncated_sum
from fed.state import State


def averaged_lora(
    states: Sequence[State], base: State, weights: Tensor, product: bool
) -> list[State]:
    """One state per client k, sum_j `weights`[k, j] of client j, in `base`'s types.

    Args:
        weights: (K, K), no less than 0.
        product: of the updates B A; tensors that are not of such a pair are averaged as they are.
    """
    pairs = Products(base).stems if product else []
    factors = {stem + end for stem in pairs for end in (A, B)}
    results = [empty(base) for _ in states]
    for block in blocks(states, {n: t for n, t in base.items() if n not in factors}):
        for result, values in zip(results, weights @ block.clients, strict=True):
            block.write(result, values)
    for stem in pairs:
        pair = base[stem + A], base[stem + B]
        for result, row in zip(results, weights, strict=True):
            mixed = row.nonzero().flatten().tolist()
            left = torch.cat([float(row[j]) * states[j][stem + B].float() for j in mixed], 1)
            right = torch.cat([states[j][stem + A].float() for j in mixed])
            found = truncated_sum(left, right, len(pair[0]))
            result[stem + A], result[stem + B] = factored(*found, *pair)
    return results
