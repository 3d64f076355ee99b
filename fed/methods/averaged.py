"""The weighted mean of the experts, with which a method begins that merges some tensors only."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from fed.layers import layers
from fed.methods.blocks import blocks, empty
from fed.state import State


def averaged(
    states: Sequence[State], p: Sequence[float], base: State, names: Iterable[str] | None = None
) -> State:
    """A state to write into, in `base`'s types, whose tensors `names` hold sum_k p_k A_k.

    None means all that are no layer's weight or bias. The other tensors are yet to be filled.
    """
    wanted = layers(base)[1] if names is None else list(names)
    result = empty(base)
    for block in blocks(states, {name: base[name] for name in wanted}):
        block.write(result, block.mix(p))
    return result
