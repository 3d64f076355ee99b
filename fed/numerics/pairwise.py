"""Inner products of all pairs of clients: Gram matrices, summed block by block in float64.

gram(move for _, move in moves(states, base))       over all tensors as one vector
grams(moves(states, base))                          of each tensor by itself
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence

import torch
from torch import Tensor

from fed.numerics.chunks import blocks
from fed.state import State


def moves(states: Sequence[State], base: State) -> Iterator[tuple[str, Tensor]]:
    """A_k - A_0, block by block: the tensor's name and (K, n), overwritten by the next."""
    for block in blocks(states, base):
        yield block.name, block.clients.sub_(block.base)


def grams(rows: Iterable[tuple[str, Tensor]]) -> dict[str, Tensor]:
    """By name, the inner products of K vectors, (K, K), from blocks of their values, (K, n)."""
    products: dict[str, Tensor] = {}
    for name, values in rows:
        product = values @ values.T
        products[name] = products[name].add_(product) if name in products else product
    return products


def gram(rows: Iterable[Tensor], count: int) -> Tensor:
    """The inner products of `count` vectors, (count, count), float64; 0 where there is no block."""
    products = torch.zeros(count, count, dtype=torch.float64)
    for values in rows:
        products += values @ values.T
    return products
