"""Shared checks: that a state was filled, and that a memory is of this model."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from torch import Tensor

from fed.state import State, StateError, is_finite
from llava.suggest import did_you_mean


def check_not_zero(state: State, base: State, who: str) -> None:
    """Refuse a state that is zero throughout where `base` is not: something was never filled.

    Raises:
        StateError: `who` opens the message.
    """
    if state and not _any(state) and _any(base):
        raise StateError(f"{who}: all {len(state)} tensors are zero, those of the base are not")


def _any(state: State) -> bool:
    # The first values nearly always tell, and save a pass over all of them.
    return any(bool(t.reshape(-1)[:64].any()) or bool(t.any()) for t in state.values())


def memory_shapes(base: State, suffixes: Sequence[str]) -> dict[str, tuple[int, ...]]:
    """Names and shapes of a memory that has one tensor per tensor of `base` and suffix."""
    return {name + s: tuple(tensor.shape) for name, tensor in base.items() for s in suffixes}


def check_memory(
    method: str, memory: Mapping[str, Tensor], shapes: Mapping[str, tuple[int, ...]]
) -> None:
    """Refuse a memory that has not exactly these names and shapes, or is not of finite floats.

    An empty memory is that of the first round, and is let through.

    Raises:
        StateError: naming the tensor.
    """
    if not memory:
        return
    for name in shapes:
        if name not in memory:
            raise StateError(
                f"{method} memory: tensor {name} is missing{did_you_mean(name, memory)}"
            )
    for name, tensor in memory.items():
        if name not in shapes:
            raise StateError(
                f"{method} memory: tensor {name} is not expected{did_you_mean(name, shapes)}"
            )
        if tuple(tensor.shape) != shapes[name]:
            found, expected = tuple(tensor.shape), shapes[name]
            raise StateError(f"{method} memory: {name} has shape {found}, expected {expected}")
        if not tensor.is_floating_point():
            raise StateError(f"{method} memory: {name} is {tensor.dtype}, expected a float type")
        if not is_finite(tensor):
            raise StateError(f"{method} memory: {name} holds NaN or infinity")
