"""FedAvgM (Hsu, Qi, Brown 2019, arXiv 1909.06335): FedAvg with momentum at the server.

    Delta = sum_k p_k A_k - A^t
    v <- momentum * v + Delta
    A^{t+1} = A^t + server_lr * v

v starts at 0, so the first round with server_lr = 1 is FedAvg's. `nesterov` looks one step ahead:
A^t + server_lr * (momentum * v + Delta). `paper_compat` is what research code often runs instead:
p_k = 1 / K, and (1 - momentum) * Delta in the place of Delta, so that v is an average of updates;
with the same server_lr its steps are 1 / (1 - momentum) times shorter in the long run.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from fed.methods.interface.checks import check_memory, memory_shapes
from fed.methods.interface.method import Outcome
from fed.methods.interface.options import Decay, Positive
from fed.methods.interface.registry import method
from fed.methods.interface.sums import MeanOnly
from fed.numerics.chunks import blocks, empty, squares
from fed.numerics.weighted_mean import mean_shares
from fed.state import State


@method("fedavgm", sums=MeanOnly)
def fedavgm(
    states: list[State],
    *,
    weights: list[float],
    base: State,
    memory: dict[str, Tensor],
    momentum: Decay = 0.9,
    server_lr: Positive = 1.0,
    nesterov: bool = False,
    paper_compat: bool = False,
) -> Outcome:
    """One round of FedAvgM.

    Memory holds v as `<tensor>.velocity`, float32. Facts hold the lengths of Delta and of the step.
    """
    shapes = memory_shapes(base, [".velocity"])
    check_memory("fedavgm", memory, shapes)
    p = mean_shares(weights, paper_compat)
    share = 1 - momentum if paper_compat else 1.0

    result, kept = empty(base), empty(base, torch.float32, ".velocity")
    update_length = step_length = 0.0
    for block in blocks(states, base):
        delta = block.mix(p) - block.base
        v = share * delta
        if memory:
            v += momentum * block.read(memory, ".velocity")
        step = server_lr * (momentum * v + share * delta if nesterov else v)
        block.write(result, block.base + step)
        block.write(kept, v, ".velocity")
        update_length += float(squares(delta))
        step_length += float(squares(step))
    check_memory("fedavgm", kept, shapes)  # v may have grown out of float32
    facts = {"update_norm": math.sqrt(update_length), "step_norm": math.sqrt(step_length)}
    return Outcome(result, kept, facts)
