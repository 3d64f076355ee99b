"""The weighted mean of states, and the weights that make it."""

from __future__ import annotations

import functools
from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

from fed.numerics.chunks import blocks, empty
from fed.state import State


def shares(weights: Sequence[float]) -> list[float]:
    """Weights divided by their sum."""
    total = sum(weights)
    return [weight / total for weight in weights]


def total(terms: Iterable[Tensor]) -> Tensor:
    """Their sum, of one term at least."""
    return functools.reduce(torch.add, terms)


def towards_mean(states: list[State], base: State, p: list[float], step: float = 1.0) -> State:
    """A^t + step * (sum_k p_k A_k - A^t), in `base`'s types."""
    result = empty(base)
    for block in blocks(states, base):
        mean = block.mix(p)
        if step != 1:  # with 1 the result is the mean itself, free of the base's rounding
            mean = block.base + step * (mean - block.base)
        block.write(result, mean)
    return result


def mean_shares(weights: list[float], uniform: bool) -> list[float]:
    """p_k: by samples, or 1 / K."""
    return shares([1.0] * len(weights) if uniform else weights)
