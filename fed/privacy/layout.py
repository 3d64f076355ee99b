"""Layout: where each tensor's values stand in the vector that is summed, and with which bound.

A client's vector is (w x, w): its tensors' values in order, times its weight, and the weight itself
as one more coordinate. Here w = weight / unit, and `unit` the least power of two that is not below
`heaviest`, a public number: w is in [0, 1], so that a tensor's bound is one of its values and not
of its samples, and numbers of samples add up exactly. A sum without weights has heaviest = 1, and
its last coordinate counts the clients.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch

from fed import state as states
from fed.privacy.fixed_point import FixedPoint, Ring
from fed.state import State
from llava.errors import InputError

CHUNK = 2**16  # values; those of a chunk, its masks and its sum fit into a core's own cache


@dataclass(frozen=True)
class Slot:
    """A tensor of the vector. `bound` is the largest magnitude of its values; public."""

    name: str
    shape: tuple[int, ...]
    bound: float

    def __post_init__(self) -> None:
        if not isinstance(self.name, str):
            raise InputError(f"secure sum: a tensor is called {self.name!r:.100}")
        if not self.shape or not all(type(side) is int and side > 0 for side in self.shape):
            raise InputError(f"secure sum: tensor {self.name!r:.100} has shape {self.shape!r:.100}")
        FixedPoint(self.bound, 1)

    @property
    def size(self) -> int:
        return math.prod(self.shape)


@dataclass(frozen=True)
class Layout:
    """The vector: `slots` in order, then the weight.

    Attributes:
        clients: the largest number of clients in a sum.
        heaviest: the largest weight that a client may have; public.
        bits: of the ring, 64 or 32.
    """

    slots: tuple[Slot, ...]
    clients: int
    heaviest: float = 1.0
    bits: int = 64

    def __post_init__(self) -> None:
        names = [slot.name for slot in self.slots]
        if len(set(names)) < len(names):
            raise InputError("secure sum: two tensors have the same name")
        if not 1e-30 <= self.heaviest <= 1e30:
            raise InputError(f"secure sum: heaviest is {self.heaviest}, expected 1e-30 to 1e30")
        FixedPoint(1.0, self.clients, self.bits)

    @classmethod
    def of(
        cls,
        like: State,
        bounds: float | Mapping[str, float],
        clients: int,
        heaviest: float = 1.0,
        bits: int = 64,
    ) -> Layout:
        """The layout for states with the names and shapes of `like`.

        Args:
            bounds: one for all tensors, or by name.
        """
        each = bounds if isinstance(bounds, Mapping) else dict.fromkeys(like, bounds)
        slots = (Slot(n, tuple(t.shape), float(each[n])) for n, t in like.items())
        return cls(tuple(slots), clients, float(heaviest), bits)

    @cached_property
    def size(self) -> int:
        """The number of coordinates."""
        return sum(slot.size for slot in self.slots) + 1

    @property
    def dtype(self) -> np.dtype:
        return self._weight_point.dtype

    @property
    def nbytes(self) -> int:
        return self.size * self.dtype.itemsize

    def encode(self, tensors: State, weight: float, who: str) -> Iterator[tuple[slice, Ring]]:
        """The vector of a client, a chunk at a time, with where it stands.

        Raises:
            InputError: names or shapes are others, a value is beyond its bound, NaN or infinite,
                or the weight is not in [0, heaviest]. `who` opens the message.
        """
        if not 0 <= weight <= self.heaviest:
            raise InputError(f"{who}: the weight is not in 0 to {self.heaviest:g}, as was agreed")
        like = {slot.name: torch.empty(slot.shape, device="meta") for slot in self.slots}
        states.check(tensors, like=like, who=who)
        share = weight / self._unit
        for slot, point, here, there in self._chunks():
            flat = tensors[slot.name].detach().reshape(-1)[here]
            values = flat.to("cpu", torch.float64).numpy()
            yield there, point.encode(values, f"{who}: tensor {slot.name}", share)
        last = self._weight_point.encode(np.array([share]), f"{who}: the weight")
        yield slice(self.size - 1, self.size), last

    def decode(self, total: Ring) -> tuple[State, float]:
        """sum_k weight_k x_k as float32 tensors, and sum_k weight_k, of a sum of vectors."""
        sums = {slot.name: torch.empty(slot.shape) for slot in self.slots}
        for slot, point, here, there in self._chunks():
            values = point.decode(total[there]) * self._unit
            sums[slot.name].view(-1)[here] = torch.from_numpy(values).float()
        return sums, float(self._weight_point.decode(total[-1:])[0]) * self._unit

    def _chunks(self) -> Iterator[tuple[Slot, FixedPoint, slice, slice]]:
        """A tensor, its fixed point, and where a chunk stands in the tensor and in the vector."""
        first = 0
        for slot in self.slots:
            point = FixedPoint(slot.bound, self.clients, self.bits)
            for begin in range(0, slot.size, CHUNK):
                end = min(begin + CHUNK, slot.size)
                yield slot, point, slice(begin, end), slice(first + begin, first + end)
            first += slot.size

    @property
    def _unit(self) -> float:
        fraction, exponent = math.frexp(self.heaviest)
        return 2.0 ** (exponent if fraction > 0.5 else exponent - 1)

    @cached_property
    def _weight_point(self) -> FixedPoint:
        return FixedPoint(1.0, self.clients, self.bits)
