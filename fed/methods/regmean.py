"""RegMean (Jin et al. 2023, arXiv 2212.09849): outputs as near to the experts' as can be.

    minimise over W:  sum_k p_k E |W x - W_k x|^2,  x the inputs of the layer in expert k    [paper]
    W = (sum_k p_k W_k G~_k) (sum_k p_k G~_k)^-1,   G_k = E x x^T                            [paper]
    G~ = reduce G + (1 - reduce) diag(G): everything off the diagonal times `reduce`         [paper]

The paper takes reduce = 0.9 for most models. There p_k = 1; here it is the expert's share, and G_k
is a mean over inputs, so that an expert counts by its weight and not by the length of its data.

The paper merges the weight alone and averages biases (`bias` average). `bias` joint is ours: it
solves for [W | b] together, with a constant 1 as the last input. Solved as a correction to the mean
of the experts: where no input reaches, and (to rounding) where all agree, the mean stands. Norms,
scales and other tensors that are no layer are averaged. Layers are merged in one step each, every
one with the inputs that it has within its own expert.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from fed.methods.interface.calibration import Calibration
from fed.methods.interface.method import Outcome
from fed.methods.interface.options import Unit
from fed.methods.interface.registry import method
from fed.numerics.joint_basis import mean_matrix
from fed.numerics.layers import Parts, layers, to_matrix, write_matrix
from fed.numerics.least_squares import add_pull, correction
from fed.numerics.matrix_common import mean_elsewhere
from fed.numerics.weighted_mean import shares
from fed.state import State


@method("regmean", cross_layer=True)
def regmean(
    states: list[State],
    *,
    weights: list[float],
    base: State,
    calibration: list[Calibration],
    reduce: Unit = 0.9,
    bias: Literal["average", "joint"] = "average",
) -> Outcome:
    """One merge. Facts: `moved`, the length of each layer's correction to the mean.

    Each expert's data passes through it once. `reduce` = 0 weighs each input by itself.
    """
    p = shares(weights)
    affine, others = layers(base)
    result = mean_elsewhere(states, p, base, but=base.keys() - others)
    means = {layer.name: mean_matrix(Parts(states, layer), p) for layer in affine}
    pulls: dict[str, Tensor] = {}  # sum_k p_k (W_k - mean) G~_k
    totals: dict[str, Tensor] = {}  # sum_k p_k G~_k
    for state, share, measured in zip(states, p, calibration, strict=True):
        grams = dict(measured.gram(state))
        for layer in affine:
            gram = grams.pop(layer.name)
            inputs = len(gram) - (bias == "average" and bool(layer.bias))
            gram = reduced(gram[:inputs, :inputs], reduce)
            matrix, mean = to_matrix(state, layer)[:, :inputs], means[layer.name][:, :inputs]
            if layer.name not in pulls:
                pulls[layer.name] = torch.zeros(matrix.shape, dtype=gram.dtype)
                totals[layer.name] = torch.zeros_like(gram)
            add_pull(pulls[layer.name], matrix, mean, gram, share)
            totals[layer.name].add_(gram, alpha=share)
    facts = {}
    for layer in affine:
        move = correction(pulls.pop(layer.name), totals.pop(layer.name))
        merged = means.pop(layer.name)
        merged[:, : move.shape[1]] += move
        write_matrix(merged, layer, result)
        facts[layer.name] = float(move.norm())
    return Outcome(result, None, {"moved": facts})


def reduced(gram: Tensor, factor: float) -> Tensor:
    """A copy whose entries off the diagonal are multiplied by `factor`."""
    small = gram * factor
    small.diagonal().copy_(gram.diagonal())
    return small
