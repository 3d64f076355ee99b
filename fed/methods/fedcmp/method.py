"""Fed-CMP: federated pre-training of the cross-modal projector (arXiv 2603.26786).

What the paper's abstract says [P]; how each step is made is our reading [R], as its text and code
were not to be had. Per layer, with A = [W | b], shape (out, in + 1), and p_k = n_k / sum_j n_j:

Canonical Reliability-Aware Aggregation [P]: "constructs a canonical space to decompose client
projectors into a shared alignment basis and client-specific coefficients, then performs
reliability-weighted fusion".
  1. X_k = A_k - A^t (`space` updates) or A_k (weights)                                        [R]
  2. U: the leading eigenvectors of S = sum_k p_k X_k X_k^T, as many as `energy`, `rank` say   [R]
  3. C_k = U^T X_k, rows c_ki                                                                  [R]
  4. How reliable a client is (`reliability`):
     explained: p_k = n_k r_k / sum_j n_j r_j throughout, r_k the share of its captions that its
       pictures explain, and rho_ki = p_k. The server multiplies (`fed.server.reliability`), and
       `weights` come as n_k r_k. A client measures itself: no defence against one that lies     [R]
     agreement: rho_ki = softmax over k of log p_k + a_ki / tau with
       a_ki = cos(c_ki, sum_{j != k} p_j c_ji)                                                  [R]
     none: rho_ki = p_k
  5. c_i = g_i sum_k rho_ki c_ki,  g_i = kappa_i^(-1/2), at most `rescale`, where kappa_i =
     |sum_k rho_ki c_ki|^2 / sum_k rho_ki |c_ki|^2: the mean of rows that have little in common
     is short; g_i gives it the clients' (root mean square) length back                        [R]
  6. c_i <- c_i (l / |c_i|)^(`flatten` (1 - kappa_i)), l the root mean square of all |c_i|: where
     clients do not agree, the lengths of directions are evened out                            [R]
What lies outside U is kept as one block with one gain (`rest` keep), or left out (drop)       [R]

Orthogonality-Preserved Momentum [P]: "applies momentum to the shared alignment basis via orthogonal
projection, accumulating historical optimization directions while preserving geometric structure".
  7. `momentum`, with `beta` above 0:
     projected: H_t = beta U U^T H_{t-1} + X_t takes X_t's place: of the steps so far, what lies in
       this round's shared basis goes on                                                        [R]
     polar: B^{t-1} aligned to U (`align`), B^t = polar(beta B^{t-1} + (1 - beta) U), X = B^t C [R]
  8. A^{t+1} = A^t + X (updates) or X (weights)

Reliability none, rescale = 1, flatten = 0, beta = 0 is FedAvg, if the basis is whole or the rest is
kept; so is agreement with tau = inf. With beta = 0 there is no memory. Where the basis is square
and the alignment procrustes, B^t = U whatever beta is: polar needs r < out. Aligning U to B^{t-1}
and turning C with it gives the same X; this way round, the memory of another rank is no special
case: directions without history stand as they are.

Up to 1024 rows every direction is found, in float64; above, the leading 64 by a range finder, in
float32, and the others are the rest. Norms, scales and other tensors that are no layer are averaged
by samples. fusion.py has the sums over clients that the server needs, sums.py a round from them.
"""

from __future__ import annotations

from typing import Annotated, Literal

from torch import Tensor

from fed.methods.fedcmp.fusion import fuse
from fed.methods.fedcmp.step import Step, checked_tau
from fed.methods.fedcmp.sums import FedCMPSums
from fed.methods.interface.method import Outcome
from fed.methods.interface.options import Count, Range, Unit
from fed.methods.interface.registry import method
from fed.numerics.chunks import blocks, empty
from fed.numerics.joint_basis import joint_basis
from fed.numerics.layers import Parts, layers
from fed.numerics.weighted_mean import shares
from fed.state import State

MIN_TAU = 0.05  # the square of exp(-2 / tau) must stay a float32


@method("fedcmp", explained_by=("reliability", "explained"), sums=FedCMPSums)
def fedcmp(
    states: list[State],
    *,
    weights: list[float],
    base: State,
    memory: dict[str, Tensor],
    space: Literal["updates", "weights"] = "updates",
    energy: Annotated[float, Range("(0, 1]")] = 1.0,
    rank: Count | None = None,
    basis: Literal["auto", "exact", "randomised"] = "auto",
    rest: Literal["keep", "drop"] = "keep",
    reliability: Literal["explained", "agreement", "none"] = "explained",
    tau: Annotated[float, Range(f"[{MIN_TAU}, inf]", f"at least {MIN_TAU}")] | None = None,
    rescale: Annotated[float, Range("[1, inf)", "at least 1 and finite")] = 4.0,
    flatten: Unit = 0.3,
    momentum: Literal["projected", "polar"] = "projected",
    beta: Annotated[float, Range("[0, 1)")] = 0.0,
    align: Literal["procrustes", "signs"] = "procrustes",
) -> Outcome:
    """One round of Fed-CMP.

    A `rank` above a layer's rows is all of them. `tau` is 1 where `agreement` has none. Memory
    holds, while beta > 0, H_t as `<layer>.step`, (out, in + 1), or B^t as `<layer>.basis`, (out,
    r). Facts hold what `describe`, `carry` or `turn` say of each layer, and the names of the
    tensors that were averaged.

    Raises:
        InputError: a `tau` where reliability is not agreement; projected momentum of weights.
    """
    tau = checked_tau(space, reliability, tau, momentum, beta)
    p = shares(weights)
    affine, others = layers(base)
    result = empty(base)
    for block in blocks(states, {name: base[name] for name in others}):
        block.write(result, block.mix(p))
    projected = momentum == "projected"
    step = Step(base, memory, space, projected, beta, align, affine, others, result)
    for layer in affine:
        mats = Parts(states, layer, step.origin)
        shared = joint_basis(mats, p, energy=energy, rank=rank, how=basis)
        fused = fuse(
            mats, p, shared, tau=tau, rescale=rescale, flatten=flatten, keep_rest=rest == "keep"
        )
        step.take(layer, shared, fused, chance=sum(share * share for share in p))
    return step.outcome()
