"""The end of a round of Fed-CMP: every layer's fused step, with momentum, into the new state."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from torch import Tensor

from fed.methods.fedcmp.facts import describe
from fed.methods.fedcmp.fusion import Fused
from fed.methods.fedcmp.momentum import carry, check_history, turn
from fed.methods.interface.method import Outcome
from fed.numerics.joint_basis import Basis
from fed.numerics.layers import Layer, write_matrix
from fed.state import State
from llava.errors import InputError


def checked_tau(
    space: str, reliability: str, tau: float | None, momentum: str, beta: float
) -> float:
    """tau, infinity where agreement has no say; `InputError` where options do not go together."""
    if tau is not None and reliability != "agreement":
        raise InputError(f"fedcmp option tau is for reliability=agreement, not {reliability}")
    if momentum == "projected" and beta > 0 and space == "weights":
        raise InputError(
            "fedcmp option momentum=projected adds up steps, of which space=weights knows none; "
            "momentum=polar has a meaning there"
        )
    return (tau or 1.0) if reliability == "agreement" else math.inf


@dataclass
class Step:
    """A round's result as its layers come in.

    Args:
        base: the state that all clients began with; `memory` that of the round before.
        space, projected, beta, align: options, see `method.py`.
        affine, others: the base's layers, and the names of what is none.
        result: filled layer by layer; the others are there.
    """

    base: State
    memory: Mapping[str, Tensor]
    space: str
    projected: bool
    beta: float
    align: Literal["procrustes", "signs"]
    affine: Sequence[Layer]
    others: Sequence[str]
    result: State
    kept: dict[str, Tensor] = field(default_factory=dict)
    facts: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        shapes = {}
        for layer in self.affine:
            side, width = self.base[layer.weight].flatten(1).shape
            columns = width + bool(layer.bias) if self.projected else side
            shapes[self._key(layer)] = side, columns
        check_history(self.memory, shapes)

    @property
    def origin(self) -> State | None:
        """What the layers' matrices are differences from."""
        return self.base if self.space == "updates" else None

    def take(self, layer: Layer, shared: Basis, fused: Fused, chance: float) -> None:
        """The layer's fused matrix, turned or with history, into the result."""
        key = self._key(layer)
        turned = shared.vectors
        if not self.projected:
            turned, history = turn(shared, self.memory.get(key), self.beta, self.align)
        moved = fused.matrix(turned, None if turned is shared.vectors else shared.vectors)
        if self.projected:
            moved, history = carry(moved, shared, self.memory.get(key), self.beta)
        self.facts[layer.name] = {**describe(shared, fused, chance), "momentum": history}
        write_matrix(moved, layer, self.result, self.origin)
        if self.beta > 0 and shared.total > 0:
            self.kept[key] = (moved if self.projected else turned).float()
        elif self.beta > 0 and key in self.memory:  # nobody moved: the history stays
            self.kept[key] = self.memory[key]

    def outcome(self) -> Outcome:
        return Outcome(self.result, self.kept, {"layers": self.facts, "averaged": self.others})

    def _key(self, layer: Layer) -> str:
        return f"{layer.name}.{'step' if self.projected else 'basis'}"
