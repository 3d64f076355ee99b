"""The facts of a fused layer, for records and plots."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fed.methods.fedcmp.fusion import Fused
from fed.numerics.joint_basis import Basis


def describe(shared: Basis, fused: Fused, chance: float) -> dict[str, Any]:
    """The facts of a layer; means over directions are weighted by the directions' energy.

    `chance` is kappa of clients that are unrelated, sum_k p_k^2.
    """
    energies = shared.energies.double()
    kept = float(energies.sum())
    weight = energies / kept if kept > 0 else torch.full_like(energies, 1 / len(energies))
    total, rest = shared.total or 1.0, fused.rest

    def mean(values: Tensor) -> float:
        return float(weight @ values.double())

    def summary(values: Tensor) -> dict[str, float]:
        least, most = (float(v) for v in values.aminmax())
        middle = float(values.median())
        return {"mean": mean(values), "min": least, "median": middle, "max": most}

    return {
        "side": len(shared.vectors),
        "rank": len(energies),
        "basis": shared.how,
        "energy_kept": min(kept / total, 1.0) if shared.total > 0 else 1.0,
        "spectrum": (energies[:8] / total).tolist(),
        "kappa": summary(fused.kappa),
        "chance": chance,
        "gain": summary(fused.gain),
        "rest": rest and {"share": rest.energy / total, "kappa": rest.kappa, "gain": rest.gain},
        "agreement": [mean(a) for a in fused.agreement],
        "reliability": [mean(r) for r in fused.reliability],
    }
