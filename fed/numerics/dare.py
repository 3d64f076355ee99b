"""DARE's random drop (Yu et al. 2024, arXiv 2311.03099), which two methods share.

    T~_k = m_k * T_k / density,    m_k = 1 with probability `density`, else 0;    T_k = A_k - A_0

each value by its own draw, so that T~_k is T_k in expectation. 1 / density is the paper's; mergekit
0.1.5 divides by the share of |T_k|'s sum that happened to be kept, which is near to `density`.

The draws for a tensor of an expert follow from the seed and the fingerprint of that tensor, its
name, type and values. So neither the order of the experts nor who else is there matters, and two
experts with equal tensors drop the same values.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence

import numpy as np
import torch
from torch import Tensor

from fed.numerics.chunks import Block, blocks
from fed.state import State, fingerprint


def dropped(
    states: Sequence[State], base: State, density: float, seed: int
) -> Iterator[tuple[Block, Tensor]]:
    """All blocks, with T~_1..T~_K in place of the clients: (K, n), float64."""
    for block in blocks(states, base):
        if block.start == 0:
            draws = [_draws(seed, block.name, state[block.name]) for state in states]
        moves = block.clients.sub_(block.base)
        for row, draw in zip(moves, draws, strict=True):
            row.mul_(torch.from_numpy(draw.random(len(row), dtype=np.float32) < density))
        yield block, moves.div_(density)


def _draws(seed: int, name: str, tensor: Tensor) -> np.random.Generator:
    text = f"{seed} {fingerprint({name: tensor})}"
    return np.random.default_rng(int(hashlib.sha256(text.encode()).hexdigest(), 16))
