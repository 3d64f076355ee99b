"""TSV-M, task singular vectors (Gargiulo et al. 2025, arXiv 2412.00081): orthogonal and summed.

    T_k = W_k - W_0, cut to its r leading singular triplets U_k S_k V_k^T, r = rank * min(out, in)
    U = [U_1 .. U_K], V = [V_1 .. V_K], S = diag(S_1, .., S_K)
    W = W_0 + scale * orth(U) S orth(V)^T,    orth(X) the nearest matrix with orthonormal columns

all as in the paper, on each weight matrix; of biases, norms and scales it is W_0 + scale *
(mean - W_0), as in code in use. `rank` is 1 / K unless given, so that all stacks fit; the paper's
scale is 1.

With weights that differ, T_k is multiplied by K p_k first, which is ours, as is this: where the
stack has fewer directions than columns (experts that share a direction exactly), orth(X) keeps
those that there are. An SVD completes them by arbitrary ones: K equal experts would give the
expert's leading part and as much noise again, and give the leading part alone here. At least one
triplet of each expert is taken, also where K is larger than the side.

Where both sides are above 1024, triplets come from a range finder and orth from an iteration
(`low_rank`, which says how exact they are). A `rank` of 1/16 instead of 1/4 is much faster.
"""

from __future__ import annotations

import torch

from fed.methods.interface.method import Outcome
from fed.methods.interface.options import Positive, Share
from fed.methods.interface.registry import method
from fed.numerics.layers import Parts, write_matrix
from fed.numerics.low_rank import isometry, leading
from fed.numerics.matrix_common import mean_elsewhere, weights_alone
from fed.numerics.weighted_mean import shares
from fed.state import State


@method("tsv_m")
def tsv_m(
    states: list[State],
    *,
    weights: list[float],
    base: State,
    scale: Positive = 1.0,
    rank: Share | None = None,
) -> Outcome:
    """One merge. Facts by layer: `rank`, triplets of each expert; `kept`, their share of energy."""
    p = shares(weights)
    share = 1 / len(states) if rank is None else rank
    affine = weights_alone(base)
    result = mean_elsewhere(states, p, base, but={layer.weight for layer in affine}, scale=scale)
    facts = {}
    for layer in affine:
        side = min(base[layer.weight].flatten(1).shape)
        r = max(1, int(share * side + 1e-9))
        found, energy = [], 0.0
        for mine, matrix in zip(p, Parts(states, layer, base), strict=True):
            u, s, v = leading(matrix, r)
            found.append((u, s * mine * len(states), v))
            energy += float(torch.linalg.vector_norm(matrix)) ** 2
        kept = sum(
            float((s / (mine * len(states))).square().sum())
            for mine, (_, s, _) in zip(p, found, strict=True)
        )
        left, lengths, right = (torch.cat(part, dim=-1) for part in zip(*found, strict=True))
        del found
        merged = (isometry(left) * lengths.mul_(scale)) @ isometry(right).T
        write_matrix(merged, layer, result, base)
        facts[layer.name] = {"rank": r, "kept": min(kept / energy, 1.0) if energy else 1.0}
    return Outcome(result, None, {"layers": facts})
