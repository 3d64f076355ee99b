"""FedAdam, FedYogi, FedAdagrad (Reddi et al. 2021, arXiv 2003.00295, Algorithm 2).

    Delta = sum_k p_k A_k - A^t                  p_k by samples; 1 / K in the algorithm as printed
    m <- beta1 * m + (1 - beta1) * Delta                                       m starts at 0
    v <- v + Delta^2                                          FedAdagrad       v starts at tau^2
         v - (1 - beta2) * Delta^2 * sign(v - Delta^2)        FedYogi
         beta2 * v + (1 - beta2) * Delta^2                    FedAdam
    A^{t+1} = A^t + server_lr * m / (sqrt(v) + tau)

The algorithm corrects no bias. `bias_correction` multiplies server_lr in round t = 1, 2, ... by
sqrt(1 - beta2^t) / (1 - beta1^t), as Adam does in its shorter form (Kingma and Ba 2015, section 2);
tau stays as it is. `paper_compat` is the form of much research code: p_k = 1 / K, and v starts at
0. The paper tunes server_lr and tau by task and recommends tau = 0.001.
"""

from __future__ import annotations

import math
from collections.abc import Callable

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


@method("fedadam", sums=MeanOnly)
def fedadam(
    states: list[State], *, weights: list[float], base: State, memory: dict[str, Tensor],
    server_lr: Positive = 0.01, beta1: Decay = 0.9, beta2: Decay = 0.99, tau: Positive = 1e-3,
    bias_correction: bool = False, paper_compat: bool = False,
) -> Outcome:  # fmt: skip
    """One round of FedAdam; memory and facts as `step` says."""

    def second(v: Tensor, squared: Tensor) -> Tensor:
        return beta2 * v + (1 - beta2) * squared

    correct = beta2 if bias_correction else None
    return step(
        "fedadam",
        second,
        states,
        weights,
        base,
        memory,
        server_lr,
        beta1,
        tau,
        correct,
        paper_compat,
    )  # fmt: skip


@method("fedyogi", sums=MeanOnly)
def fedyogi(
    states: list[State], *, weights: list[float], base: State, memory: dict[str, Tensor],
    server_lr: Positive = 0.01, beta1: Decay = 0.9, beta2: Decay = 0.99, tau: Positive = 1e-3,
    bias_correction: bool = False, paper_compat: bool = False,
) -> Outcome:  # fmt: skip
    """One round of FedYogi; memory and facts as `step` says."""

    def second(v: Tensor, squared: Tensor) -> Tensor:
        return v - (1 - beta2) * squared * (v - squared).sign()

    correct = beta2 if bias_correction else None
    return step(
        "fedyogi",
        second,
        states,
        weights,
        base,
        memory,
        server_lr,
        beta1,
        tau,
        correct,
        paper_compat,
    )  # fmt: skip


@method("fedadagrad", sums=MeanOnly)
def fedadagrad(
    states: list[State], *, weights: list[float], base: State, memory: dict[str, Tensor],
    server_lr: Positive = 0.01, beta1: Decay = 0.0, tau: Positive = 1e-3,
    paper_compat: bool = False,
) -> Outcome:  # fmt: skip
    """One round of FedAdagrad, whose v is a sum: no beta2, and no bias to correct."""
    return step(
        "fedadagrad",
        torch.add,
        states,
        weights,
        base,
        memory,
        server_lr,
        beta1,
        tau,
        None,
        paper_compat,
    )  # fmt: skip


def step(
    name: str, second: Callable[[Tensor, Tensor], Tensor], states: list[State],
    weights: list[float], base: State, memory: dict[str, Tensor], server_lr: float, beta1: float,
    tau: float, correct: float | None, paper_compat: bool,
) -> Outcome:  # fmt: skip
    """One round of all three; `second` gives the new v from v and Delta^2.

    Memory holds `<tensor>.m` and `<tensor>.v` and the rounds done as `step`, a scalar; float32.
    Facts hold the lengths of Delta and of the step. `correct` is beta2 where bias is corrected.
    """
    shapes = memory_shapes(base, [".m", ".v"]) | {"step": ()}
    check_memory(name, memory, shapes)
    t = 1 + int(memory["step"]) if memory else 1
    if correct is not None:
        server_lr *= math.sqrt(1 - correct**t) / (1 - beta1**t)
    p = mean_shares(weights, paper_compat)

    result, kept = empty(base), {"step": torch.tensor(float(t))}
    kept |= empty(base, torch.float32, ".m") | empty(base, torch.float32, ".v")
    update_length = step_length = 0.0
    for block in blocks(states, base):
        delta = block.mix(p) - block.base
        m, v = torch.zeros_like(delta), torch.full_like(delta, 0 if paper_compat else tau**2)
        if memory:
            m, v = block.read(memory, ".m"), block.read(memory, ".v")
        m, v = beta1 * m + (1 - beta1) * delta, second(v, delta.square())
        move = server_lr * m / (v.sqrt() + tau)
        block.write(result, block.base + move)
        block.write(kept, m, ".m")
        block.write(kept, v, ".v")
        update_length += float(squares(delta))
        step_length += float(squares(move))
    check_memory(name, kept, shapes)  # v may have grown out of float32
    facts = {"update_norm": math.sqrt(update_length), "step_norm": math.sqrt(step_length)}
    return Outcome(result, kept, facts)
