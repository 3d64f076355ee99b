"""Coordinate-wise trimmed mean (Yin et al. 2018, arXiv 1803.01498, Algorithm 1, option II).

    A^{t+1}[i] = mean of what is left of A_1[i] .. A_K[i] without the c least and the c greatest

c = floor(trim * K), so `trim` is to be at least the share of bad clients, and with K < 1 / trim
nothing is cut: the fact `cut` is c. One client gives that client, two give their plain mean. As
published, samples count for nothing.
"""

from __future__ import annotations

import math
from typing import Annotated

import numpy as np
import torch

from fed.methods.interface.method import Outcome
from fed.methods.interface.options import Range
from fed.methods.interface.registry import method
from fed.numerics.chunks import blocks, empty, squares
from fed.state import State


@method("trimmed_mean")
def trimmed_mean(
    states: list[State],
    *,
    weights: list[float],
    base: State,
    trim: Annotated[float, Range("[0, 0.5)", "a share in [0, 0.5)")] = 0.2,
) -> Outcome:
    """One round. Facts: `cut`, and `distance` of each client from the result, over all tensors."""
    k = len(states)
    cut = min(math.floor(trim * k + 1e-9), (k - 1) // 2)  # 0.29 * 100 is 28.999999999999996
    result = empty(base)
    apart = torch.zeros(k, dtype=torch.float64)
    for block in blocks(states, base):
        columns = np.sort(block.clients.T.contiguous().numpy(), axis=1)
        left = torch.from_numpy(columns[:, cut : k - cut].mean(axis=1))
        block.write(result, left)
        apart += squares(block.clients - left)
    return Outcome(result, None, {"cut": cut, "distance": apart.sqrt().tolist()})
