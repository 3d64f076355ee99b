"""Pilot's three auxiliary losses (arXiv 2501.13985; the forms are those of its released code)."""

from __future__ import annotations

import torch

OVER = ("pairs", "mean", "sum")


def difference_loss(a: torch.Tensor, b: torch.Tensor, over: str = "pairs") -> torch.Tensor:
    """L_d = ||A^T B||_F^2: how far two adapters say the same of a batch of pictures.

    A and B have a picture a row: its tokens as one vector of D values, divided by its length (plus
    1e-6; the length takes no gradient). The D × D product is never formed: its squared norm is

        ||A^T B||_F^2 = sum over pairs of pictures (i, j) of (A A^T)_ij (B B^T)_ij

    Args:
        a, b: (batch, tokens, width), of the same pictures.
        over: `sum` is the formula as it stands; `mean` divides it by D², as the released code does
            (with 576 × 4096 values a picture next to nothing is left); `pairs`, ours, divides by
            batch², so that the loss is between 0 and 1 whatever the sizes are.

    Returns:
        A scalar, float32.
    """
    a, b = (_unit(x.flatten(1).float()) for x in (a, b))
    total = ((a @ a.T) * (b @ b.T)).sum()
    if over == "sum":
        return total
    return total / (a.shape[1] if over == "mean" else a.shape[0]) ** 2


def _unit(rows: torch.Tensor) -> torch.Tensor:
    return rows / (rows.detach().norm(dim=1, keepdim=True) + 1e-6)


def balance_loss(gates: torch.Tensor) -> torch.Tensor:
    """L_b = T² · mean over experts of (mean gate · share of tokens whose first choice it is).

    Args:
        gates: (…, T), after softmax.

    Returns:
        A scalar: 1 where all experts are used alike, up to T where one gets everything.
    """
    gates = gates.flatten(0, -2)
    experts = gates.shape[-1]
    first = torch.zeros_like(gates).scatter_(1, gates.argmax(1, keepdim=True), 1.0)
    return experts**2 * (gates.mean(0) * first.mean(0)).mean()


def router_z_loss(logits: torch.Tensor) -> torch.Tensor:
    """L_z = mean over tokens of logsumexp(logits)²; logits (…, T)."""
    return logits.logsumexp(-1).square().mean()
