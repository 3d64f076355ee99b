"""A state's affine layers as matrices, and several clients' matrices of one layer."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from fed.state import State

# Up to this side float64 costs next to nothing; above it eigh takes tens of seconds in float32.
LARGE = 1024
_TABLES = ("embed_tokens.weight", "lm_head.weight")  # rows are words there
_ROWS = 256  # cast at once, so that no second copy of a layer is made


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


def to_matrix(state: State, layer: Layer, less: State | None = None) -> Tensor:
    """The layer as [W | b], (out, in + 1), less that of another state.

    Float64 up to an `out` of 1024, float32 above.
    """
    weight = state[layer.weight].flatten(1)
    out, width = weight.shape
    dtype = torch.float64 if out <= LARGE else torch.float32
    matrix = torch.empty(out, width + bool(layer.bias), dtype=dtype, device=weight.device)
    matrix[:, :width].copy_(weight)
    if layer.bias:
        matrix[:, width].copy_(state[layer.bias])
    if less is not None:
        other = less[layer.weight].flatten(1)
        for rows in range(0, out, _ROWS):
            matrix[rows : rows + _ROWS, :width] -= other[rows : rows + _ROWS]
        if layer.bias:
            matrix[:, width] -= less[layer.bias]
    return matrix


def from_matrix(matrix: Tensor, layer: Layer, like: State) -> State:
    """Inverse of `to_matrix`: tensors with the shapes of `like`, in the matrix's dtype."""
    shape = like[layer.weight].shape
    if not layer.bias:
        return {layer.weight: matrix.reshape(shape)}
    return {layer.weight: matrix[:, :-1].reshape(shape), layer.bias: matrix[:, -1]}


@dataclass(frozen=True)
class Parts:
    """The matrices X_1..X_K of one layer, (out, in + 1) each, less those of an origin.

    They are made one at a time, whenever they are gone through: no two need be in memory.
    """

    states: Sequence[State]
    layer: Layer
    origin: State | None = None

    def __len__(self) -> int:
        return len(self.states)

    def __iter__(self) -> Iterator[Tensor]:
        return (to_matrix(state, self.layer, self.origin) for state in self.states)
