"""kappa, the share of what clients have learnt that they have in common.

kappa = |sum_k p_k x_k|^2 / sum_k p_k |x_k|^2 for vectors x_k with shares p_k that sum to one: 1
where all agree, sum_k p_k^2 (1/K for K equal ones) on average where they are unrelated, 0 where
they cancel.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

NOISE = 1e-6  # a length or an energy so much smaller than another is the rounding of float32


def consensus(rows: Tensor, energies: Tensor, rho: Tensor | float = 1.0) -> Tensor:
    """kappa of each direction, (r,), from sums over clients; 0 where none moves.

    Args:
        rows: sum_k rho_k c_k, (r, width), the clients' coefficients in each direction.
        energies: sum_k rho_k |c_k|^2, (r,).
        rho: sum_k rho_k, (r,), where the weights do not sum to one.
    """
    each = rho * energies
    return torch.where(each > 0, rows.square().sum(1) / each, 0).clamp(0, 1)


@dataclass(frozen=True)
class Rest:
    """The block outside a basis: its energy, its kappa, and the factor on its mean."""

    energy: float
    kappa: float
    gain: float


def rest_of(
    mean: Tensor,
    mean_rows: Tensor,
    energy: float,
    total: float,
    rescale: float,
    power: float = 0.5,
) -> Rest:
    """The block outside the basis, of which the clients hold `energy` of `total`.

    Its gain is kappa^-`power`, at most `rescale`.

    Args:
        mean: M, (side, width), and its coefficients U^T M, (r, width).
    """
    norm = torch.linalg.vector_norm
    agreed = max(float(norm(mean)) ** 2 - float(norm(mean_rows)) ** 2, 0.0)
    if energy <= NOISE * total:  # rounding
        return Rest(energy, 1.0, 1.0)
    kappa = min(agreed / energy, 1.0)
    gain = min(max(kappa, 1e-30) ** -power, rescale)
    return Rest(energy, kappa, gain)
