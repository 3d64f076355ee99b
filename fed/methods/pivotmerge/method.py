"""PivotMerge: post-alignment merging of cross-modal projectors (arXiv 2604.22823).

What the paper's abstract says [P]; how each step is made is our reading [R], as its text and code
were not to be had. Per layer, with A = [W | b], shape (out, in + 1), shares p_k, X_k = A_k - A_0
for the pivot A_0, the common start where it is known, else the experts' mean:

Shared-space Decomposition and Filtering [P]: "disentangles shared alignment patterns from
domain-specific variations and suppresses conflicting directions".
  1. U: the leading eigenvectors of sum_k p_k X_k^T X_k, directions of what a layer reads (`side`
     input), or of sum_k p_k X_k X_k^T, of what it writes (output)                             [R]
  2. C_k, the coefficients: rows c_ki, one a direction                                         [R]
  3. kappa_i = |sum_k p_k c_ki|^2 / sum_k p_k |c_ki|^2. Below `kappa_min` a direction is of single
     domains: the part of c_ki that opposes the sum is taken out, what is left is multiplied by
     `specific`. At or above, it is shared: step 5                                             [R]

Alignment-guided Layer-wise Merging [P]: "assigns layer-specific merging weights based on differing
alignment contributions".
  4. C = (sum_k W_k)^-1 sum_k W_k C_k, with W_k by `mode`                                      [R]
       uniform      p_k
       energy       p_k times the share of X_k's energy in shared directions (kappa_i at or above
                    what unrelated experts would have, sum_k p_k^2)
       subspace     p_k (P_k + floor), a matrix, P_k = G_k (G_k + noise)^-1, G_k = C_k C_k^T: an
                    expert counts along the directions in which it has moved, its own ones and
                    not the basis's; noise is in units of the mean eigenvalue of G_k
       calibration  p_k exp(what the caption loss gains when k's part of the layer is left out,
                    over the largest such gain of the layer)
  5. shared rows are multiplied by (|C_i|^2 / sum_k p_k |c_ki|^2)^-`power`, from 1 to `rescale`:
     the mean of rows that have little in common is short                                      [R]
What lies outside U is averaged, with one gain of its own; A = A_0 + U C.

uniform with kappa_min = 0 and power = 0 is the weighted mean. Up to 1280 rows every direction is
found; above, the leading 128. Norms, scales and the like are averaged. The steps are in
`shared_space`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Literal

from fed.methods.interface.calibration import Calibration
from fed.methods.interface.method import Outcome
from fed.methods.interface.options import Count, NonNegative, Positive, Range, Unit
from fed.methods.interface.registry import method
from fed.methods.pivotmerge.shared_space import Shared, by_leaving_out
from fed.numerics.chunks import blocks, empty
from fed.numerics.layers import Layer, Parts, layers, write_matrix
from fed.numerics.weighted_mean import shares
from fed.state import State
from llava.errors import InputError


@method("pivotmerge", calibrated_by=("mode", "calibration"))
def pivotmerge(
    states: list[State],
    *,
    weights: list[float],
    base: State,
    calibration: list[Calibration] | None = None,
    mode: Literal["uniform", "energy", "subspace", "calibration"] = "subspace",
    side: Literal["input", "output"] = "input",
    noise: Positive = 0.25,
    floor: Positive = 0.1,
    kappa_min: Unit = 0.0,
    specific: NonNegative = 1.0,
    rescale: Annotated[float, Range("[1, inf)", "at least 1 and finite")] = 4.0,
    power: Unit = 0.0,
    rank: Count | None = None,
) -> Outcome:
    """One merge. Facts: `layers`, those of `Shared.joined`; `averaged`, names of other tensors."""
    if mode == "calibration" and calibration is None:
        raise InputError("pivotmerge option mode: calibration needs --calibration_data")
    p = shares(weights)
    affine, others = layers(base)
    result = empty(base)
    for block in blocks(states, {name: base[name] for name in others}):
        block.write(result, block.mix(p))
    subspace = (noise, floor) if mode == "subspace" else None

    def merge(layer: Layer, alpha: Sequence[float] | None = None) -> dict:
        shared = Shared.of(Parts(states, layer, base, turned=side == "input"), p, rank)
        alpha = alpha or (shared.aligned() if mode == "energy" else p)
        merged, facts = shared.joined(
            shared.filtered(kappa_min, specific),
            alpha,
            kappa_min=kappa_min,
            rescale=rescale,
            power=power,
            subspace=subspace,
        )
        write_matrix(merged.T if side == "input" else merged, layer, result, base)
        return facts

    facts = {layer.name: merge(layer) for layer in affine}
    if mode == "calibration" and calibration is not None:
        alphas = by_leaving_out(affine, merge, p, calibration, result)
        facts |= {layer.name: merge(layer, alphas[layer]) for layer in affine}
    return Outcome(result, None, {"layers": facts, "averaged": others})
