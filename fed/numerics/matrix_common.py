"""Shared by methods on weight matrices: the weights as layers, the mean of all other tensors.

The literature's methods on matrices leave biases, norms and scales to the mean.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import replace

from fed.numerics.chunks import empty
from fed.numerics.layers import Layer, layers
from fed.numerics.weighted_mean import towards_mean
from fed.state import State


def weights_alone(base: State) -> list[Layer]:
    """The affine layers without their biases: `layers` then makes (out, in) of them."""
    return [replace(layer, bias=None) for layer in layers(base)[0]]


def mean_elsewhere(
    states: Sequence[State],
    p: Sequence[float],
    base: State,
    but: Collection[str],
    scale: float = 1.0,
) -> State:
    """A_0 + scale * (sum_k p_k A_k - A_0) of all tensors but those named, which are to be filled.

    Args:
        p: shares that sum to one.
    """
    rest = {name: tensor for name, tensor in base.items() if name not in but}
    return empty(base) | towards_mean(list(states), rest, list(p), scale)
