"""Iso-C (Marczak et al. 2025, arXiv 2502.04959): all directions of the sum get one length.

    M = sum_k T_k = U S V^T,    T_k = W_k - W_0                                              [paper]
    W = W_0 + scale * mean(S) U V^T                                                          [paper]

on each weight matrix; of biases, norms and scales it is W_0 + scale * (mean - W_0), as in code in
use. The paper tunes `scale` on held-out data; 1 is the plain form. With weights that differ,
M = K sum_k p_k T_k, which is ours.

mean(S) is over all min(out, in) directions, those of length 0 too. Such directions stay out of
U V^T here; an SVD's output has arbitrary ones there, and code that uses it adds noise of the mean
length. Where both sides are above 1024, U V^T comes from an iteration (`low_rank.isometry`):
14 s for 4096 x 4096 on two cores of an x86 server, where an SVD takes a minute or more.
"""

from __future__ import annotations

from fed.methods.interface.method import Outcome
from fed.methods.interface.options import Positive
from fed.methods.interface.registry import method
from fed.numerics.joint_basis import mean_matrix
from fed.numerics.layers import Parts, write_matrix
from fed.numerics.low_rank import isometry
from fed.numerics.matrix_common import mean_elsewhere, weights_alone
from fed.numerics.weighted_mean import shares
from fed.state import State


@method("iso_c")
def iso_c(
    states: list[State],
    *,
    weights: list[float],
    base: State,
    scale: Positive = 1.0,
) -> Outcome:
    """One merge. Facts: `length`, mean(S) of each layer, before `scale`."""
    p = shares(weights)
    affine = weights_alone(base)
    result = mean_elsewhere(states, p, base, but={layer.weight for layer in affine}, scale=scale)
    lengths = {}
    for layer in affine:
        total = mean_matrix(Parts(states, layer, base), p).mul_(len(states))
        even = isometry(total)
        # <U V^T, U S V^T> is the sum of S
        lengths[layer.name] = float((even * total).sum()) / max(1, min(total.shape))
        write_matrix(even.mul_(scale * lengths[layer.name]), layer, result, base)
    return Outcome(result, None, {"length": lengths})
