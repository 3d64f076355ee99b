"""KnOTS (Stoica et al. 2025, arXiv 2410.19735): merged in a basis that all experts share.

    [T_1 .. T_K] = U S [V_1 .. V_K]^T,    T_k = A_k - A_0                                    [paper]
    A = A_0 + scale * U merge(S V_1^T, .., S V_K^T)                                          [paper]

As in the authors' code, S stands with V before the merge, and a layer is [W | b]. `merge` is TIES
(`fed.methods.ties`, with `density` and the weights), the paper's choice. With `linear` the basis is
of no matter and this is the weighted mean; it is there to compare with. A density of 0.2 is that of
the authors' settings; their scale is tuned (0.6 in some).

Ours: TIES trims within a layer, theirs within the whole model. Experts count in U by their weights.
Coefficients below a millionth of a layer's largest are rounding and are 0, or they would count in
TIES' mean. S V_k^T is taken as U^T T_k, so that only the eigenvectors of sum_k T_k T_k^T are
needed, and never the SVD of the stack. `rank` takes that many leading directions, by a range finder
in large layers, and leaves the mean of all that lies outside of them: not in the paper. Of norms,
scales and other tensors that are no layer it is A_0 + scale * (mean - A_0).
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from fed.methods.interface.method import Outcome
from fed.methods.interface.options import Count, Positive, Share
from fed.methods.interface.registry import method
from fed.methods.ties import ties
from fed.numerics.joint_basis import joint_basis, mean_matrix
from fed.numerics.layers import Parts, layers, write_matrix
from fed.numerics.low_rank import CUT
from fed.numerics.matrix_common import mean_elsewhere
from fed.numerics.weighted_mean import shares
from fed.state import State


@method("knots")
def knots(
    states: list[State],
    *,
    weights: list[float],
    base: State,
    merge: Literal["ties", "linear"] = "ties",
    density: Share = 0.2,
    scale: Positive = 1.0,
    rank: Count | None = None,
) -> Outcome:
    """One merge. Facts by layer: `rank` of the basis, `kept`, the share of energy within it."""
    p = shares(weights)
    affine, others = layers(base)
    result = mean_elsewhere(states, p, base, but=base.keys() - others, scale=scale)
    facts = {}
    for layer in affine:
        mats = Parts(states, layer, base)
        shared = joint_basis(mats, p, rank=rank, how="auto" if rank else "exact")
        u = shared.vectors
        rows = [u.T @ matrix for matrix in mats]
        outside = None
        if u.shape[1] < shared.full:
            outside = mean_matrix(mats, p)
            outside -= u @ (u.T @ outside)
        merged = u @ (mean_matrix(rows, p) if merge == "linear" else _ties(rows, weights, density))
        if outside is not None:
            merged += outside
        write_matrix(merged.mul_(scale), layer, result, base)
        kept = float(shared.energies.sum()) / shared.total if shared.total > 0 else 1.0
        facts[layer.name] = {"rank": u.shape[1], "kept": min(kept, 1.0)}
    return Outcome(result, None, {"layers": facts})


def _ties(rows: list[Tensor], weights: list[float], density: float) -> Tensor:
    """TIES of the experts' coefficients, (r, in). Overwrites `rows`."""
    least = CUT * max(float(c.abs().max()) for c in rows)
    for c in rows:
        c[c.abs() < least] = 0
    zero = {"rows": torch.zeros_like(rows[0])}
    merged = ties([{"rows": c} for c in rows], weights=weights, base=zero, density=density)
    assert isinstance(merged.state, dict)  # TIES gives all clients one state
    return merged.state["rows"]
