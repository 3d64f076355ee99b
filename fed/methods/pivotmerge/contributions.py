"""What each expert contributes to the alignment, measured on calibration data.

Of expert k the explained share r_k: what share of the captions its pictures explain
(`fed.clients.measures`), drawn towards the experts' mean as far as it is uncertain
(`fed.numerics.shrinkage`). Of its layer l the part d_kl of that share that is lost when the layer
is the pivot's again; of an expert whose share is none, the mean of the others' d_kl. An expert
weighs p_k r_k, its layer p_k r_k d_kl: one whose pictures explain nothing has no say, and a layer
that nothing depends on has little. Reading and names are ours [R].
"""

from __future__ import annotations

from collections.abc import Sequence

from fed.methods.interface.calibration import Calibration
from fed.numerics.layers import Layer
from fed.numerics.shrinkage import LEAST, drawn_shares
from fed.numerics.weighted_mean import shares
from fed.state import State


def explained_shares(
    states: Sequence[State], calibration: Sequence[Calibration]
) -> tuple[list[float], list[float]]:
    """r_k as measured, and as drawn towards the mean, in [`LEAST`, 1]."""
    told = [each.explained(state) for state, each in zip(states, calibration, strict=True)]
    sums = {str(k): [each.own, each.other, each.spread] for k, each in enumerate(told)}
    return [each.share or 0.0 for each in told], list(drawn_shares(sums, sums).values())


def layer_weights(
    layer: Layer,
    states: Sequence[State],
    base: State,
    calibration: Sequence[Calibration],
    measured: Sequence[float],
    weights: Sequence[float],
) -> list[float]:
    """p_k r_k d_kl of a layer, normalised.

    Args:
        measured: r_k of the whole experts, as measured.
        weights: p_k r_k.
    """
    pivot = {name: base[name] for name in (layer.weight, layer.bias) if name}
    lost: list[float | None] = []
    for state, each, share in zip(states, calibration, measured, strict=True):
        if share <= LEAST:
            lost.append(None)
            continue
        left = max(each.explained({**state, **pivot}).share or 0.0, 0.0)
        lost.append(min(max(1 - left / share, LEAST), 1.0))
    known = [d for d in lost if d is not None]
    typical = sum(known) / len(known) if known else 1.0
    return shares([w * (typical if d is None else d) for w, d in zip(weights, lost, strict=True)])
