"""PivotMerge: post-alignment merging of cross-modal projectors (arXiv 2604.22823).

What the paper's abstract says [P]; how each step is made is our reading [R], as its text and code
were not to be had. Per layer, with A = [W | b], shape (out, in + 1), shares p_k, X_k = A_k - A_0
for the pivot A_0, the common start where it is known, else the experts' mean:

Alignment-guided Layer-wise Merging [P]: "assigns layer-specific merging weights based on differing
alignment contributions".
  1. With calibration data (`contribution`) p_k is, in all that follows,                       [R]
       expert       p_k r_k, r_k the share of the captions that expert k's pictures explain
       layer        p_k r_k d_kl, d_kl the part of r_k that is lost without expert k's part of the
                    layer (`contributions` has the measures)
       none         as it was, and as it is without data

Shared-space Decomposition and Filtering [P]: "disentangles shared alignment patterns from
domain-specific variations and suppresses conflicting directions".
  2. U: the leading eigenvectors of sum_k p_k X_k^T X_k, directions of what a layer reads (`side`
     input), or of sum_k p_k X_k X_k^T, of what it writes (output)                             [R]
  3. C_k, the coefficients: rows c_ki, one a direction                                         [R]
  4. kappa_i = |sum_k p_k c_ki|^2 / sum_k p_k |c_ki|^2. A direction is in conflict where kappa_i is
     more than `conflict` deviations below what unrelated experts would have (`conflicts`): the
     part of c_ki that opposes the sum is taken out, what is left is multiplied by `specific`  [R]
  5. C = (sum_k W_k)^-1 sum_k W_k C_k, with W_k by `mode`                                      [R]
       uniform      p_k
       energy       p_k times the share of X_k's energy in shared directions (kappa_i at or above
                    what unrelated experts would have, sum_k p_k^2)
       subspace     p_k (P_k + floor), a matrix, P_k = G_k (G_k + noise)^-1, G_k = C_k C_k^T: an
                    expert counts along the directions in which it has moved, its own ones and
                    not the basis's; noise is in units of the mean eigenvalue of G_k
  6. rows without conflict are multiplied by (|C_i|^2 / sum_k p_k |c_ki|^2)^-`power`, from 1 to
     `rescale`: the mean of rows that have little in common is short                           [R]
What lies outside U is averaged, with one gain of its own; A = A_0 + U C.

uniform without filter, gain and data is the weighted mean. Up to 1280 rows every direction is
found; above, the leading 128. Norms, scales and the like are averaged. The steps are in
`shared_space`.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from fed.methods.interface.calibration import Calibration
from fed.methods.interface.method import Outcome
from fed.methods.interface.options import Count, NonNegative, Positive, Range, Unit
from fed.methods.interface.registry import method
from fed.methods.pivotmerge.contributions import explained_shares, layer_weights
from fed.methods.pivotmerge.shared_space import Shared
from fed.numerics.chunks import blocks, empty
from fed.numerics.layers import Parts, layers, write_matrix
from fed.numerics.weighted_mean import shares
from fed.state import State


@method("pivotmerge")
def pivotmerge(
    states: list[State],
    *,
    weights: list[float],
    base: State,
    calibration: list[Calibration] | None = None,
    mode: Literal["uniform", "energy", "subspace"] = "subspace",
    contribution: Literal["expert", "layer", "none"] = "expert",
    side: Literal["input", "output"] = "input",
    noise: Positive = 0.25,
    floor: Positive = 0.1,
    conflict: NonNegative | None = None,
    specific: NonNegative = 1.0,
    rescale: Annotated[float, Range("[1, inf)", "at least 1 and finite")] = 4.0,
    power: Unit = 0.0,
    rank: Count | None = None,
) -> Outcome:
    """One merge. Without a `conflict` nothing is filtered.

    Facts: `layers`, those of `Shared.joined`; `averaged`, names of other tensors; with calibration
    data `explained`, each expert's share as measured.
    """
    facts: dict[str, Any] = {}
    if calibration is None:
        contribution = "none"
    if calibration is not None and contribution != "none":
        facts["explained"], drawn = explained_shares(states, calibration)
        weights = [n * r for n, r in zip(weights, drawn, strict=True)]
    p = shares(weights)
    affine, others = layers(base)
    result = empty(base)
    for block in blocks(states, {name: base[name] for name in others}):
        block.write(result, block.mix(p))
    facts |= {"layers": {}, "averaged": others}
    for layer in affine:
        own = p
        if calibration is not None and contribution == "layer":
            own = layer_weights(layer, states, base, calibration, facts["explained"], p)
        shared = Shared.of(Parts(states, layer, base, turned=side == "input"), own, rank)
        merged, facts["layers"][layer.name] = shared.joined(
            shared.conflicts(conflict),
            shared.aligned() if mode == "energy" else own,
            specific=specific,
            rescale=rescale,
            power=power,
            subspace=(noise, floor) if mode == "subspace" else None,
        )
        write_matrix(merged.T if side == "input" else merged, layer, result, base)
    return Outcome(result, None, facts)
