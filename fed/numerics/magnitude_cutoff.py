"""The magnitudes of task vectors T_k = A_k - A_0, and the values at which a tensor's are cut.

Rounded to float32, in one place: what is kept must be the same when a cut is found and when it is
made. Values of one magnitude are kept or dropped together, so a cut depends on no order of them.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from fed.numerics.chunks import blocks
from fed.state import State


def magnitudes(moves: Tensor) -> Tensor:
    """|T|, float32."""
    return moves.abs().float()


def count(density: float, n: int) -> int:
    """The number of values that a density keeps of n: floor(density * n), but one at least."""
    return max(1, math.floor(density * n + 1e-9))  # 0.29 * 100 is 28.999999999999996


def order_statistics(
    states: Sequence[State], base: State, ranks: Callable[[int], list[int]]
) -> dict[str, Tensor]:
    """Magnitudes of every task vector by their rank within its tensor, 0 the least.

    Args:
        ranks: from a tensor's number of values to those that are asked for.

    Returns:
        By tensor (K, ranks), float32. One tensor of one client is held at a time.
    """
    found = {}
    for name, tensor in base.items():
        if tensor.numel() == 0:
            continue
        wanted, flat = ranks(tensor.numel()), torch.empty(tensor.numel())
        rows = []
        for state in states:
            for block in blocks([state], {name: tensor}):
                moves = block.clients[0] - block.base
                flat[block.start : block.start + len(moves)] = magnitudes(moves)
            flat.numpy().partition(wanted)
            rows.append(flat[wanted])
        found[name] = torch.stack(rows)
    return found
