"""A state's affine layers as matrices, and several clients' matrices of one layer."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from fed.state import State

# Up to this side float64 costs next to nothing; above it eigh takes tens of seconds in float32.
LARGE = 1024
_TABLES = ("embed_tokens.weight", "lm_head.weight")  # rows are words there
_ROWS = 128  # cast at once: they stay in the cache, and no second copy of a layer is made


@dataclass(frozen=True)
class Layer:
    """One affine map: its name, and the names of its two tensors in the state."""

    name: str
    weight: str
    bias: str | None


def layers(state: State) -> tuple[list[Layer], list[str]]:
    """The affine layers of a state, and the names that belong to none (norms, scales, word tables).

    A layer is a `*.weight` of two or more dimensions, (out, in, ...), and its `*.bias`, (out,).
    """
    found = []
    for name, tensor in state.items():
        if tensor.ndim < 2 or not name.endswith(".weight") or name.endswith(_TABLES):
            continue
        stem = name.removesuffix(".weight")
        bias = state.get(f"{stem}.bias")
        fits = bias is not None and bias.shape == tensor.shape[:1]
        found.append(Layer(stem, name, f"{stem}.bias" if fits else None))
    taken = {name for layer in found for name in (layer.weight, layer.bias)}
    return found, [name for name in state if name not in taken]


def to_matrix(
    state: State, layer: Layer, less: State | None = None, out: Tensor | None = None
) -> Tensor:
    """The layer as [W | b], (out, in + 1), less that of another state.

    Float64 up to an `out` of 1024, float32 above. Written into `out` if it is given.
    """
    weight = state[layer.weight].flatten(1)
    side, width = weight.shape
    if out is None:
        dtype = torch.float64 if side <= LARGE else torch.float32
        out = torch.empty(side, width + bool(layer.bias), dtype=dtype, device=weight.device)
    other = None if less is None else less[layer.weight].flatten(1)
    for start in range(0, side, _ROWS):
        rows = slice(start, start + _ROWS)
        if other is None:
            out[rows, :width] = weight[rows]
        else:
            parts = weight[rows].to(out.dtype), other[rows].to(out.dtype)
            torch.sub(*parts, out=out[rows, :width])
    if layer.bias:
        out[:, width] = state[layer.bias]
        if less is not None:
            out[:, width] -= less[layer.bias].to(out.dtype)
    return out


def write_matrix(matrix: Tensor, layer: Layer, state: State, plus: State | None = None) -> None:
    """Inverse of `to_matrix`: fill a state's tensors with [W | b], plus those of another state."""
    width = matrix.shape[1] - bool(layer.bias)
    names = {layer.weight: matrix[:, :width]}
    if layer.bias:
        names[layer.bias] = matrix[:, width]
    for name, values in names.items():
        into = state[name].view(values.shape)
        other = None if plus is None else plus[name].reshape(values.shape)
        for start in range(0, len(values), _ROWS):
            rows = slice(start, start + _ROWS)
            added = values[rows] if other is None else values[rows] + other[rows].to(values.dtype)
            into[rows] = added


class Matrices(Protocol):
    """Matrices that can be gone through more than once, as a list or `Parts`."""

    def __len__(self) -> int: ...

    def __iter__(self) -> Iterator[Tensor]: ...


class Parts:
    """The matrices X_1..X_K of one layer, (out, in + 1) each, less those of an origin.

    They are made one at a time, whenever they are gone through, in one piece of memory: each is
    overwritten by the next. With `turned` they are their transposes, (in + 1, out).
    """

    def __init__(
        self,
        states: Sequence[State],
        layer: Layer,
        origin: State | None = None,
        turned: bool = False,
    ):
        self.states, self.layer, self.origin, self.turned = states, layer, origin, turned
        self._matrix: Tensor | None = None

    def __len__(self) -> int:
        return len(self.states)

    def __iter__(self) -> Iterator[Tensor]:
        for state in self.states:
            self._matrix = to_matrix(state, self.layer, self.origin, self._matrix)
            yield self._matrix.T if self.turned else self._matrix
