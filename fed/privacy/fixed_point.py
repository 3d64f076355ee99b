"""Fixed point: bounded numbers as integers modulo 2**bits, whose sums are exact.

    q = round(x * 2**fraction) mod 2**bits,    |x| <= bound

`fraction` is the largest with which the sum of `clients` such numbers cannot wrap. What is decoded
is within clients * 2**-(fraction + 1) of the sum of the numbers themselves: relative to
clients * bound, 2**-64 at most with 64 bits and 8 clients, 2**-32 with 32 bits. So 32 bits are
enough where the bound is tight, and 64 where it may be loose by a factor of 10**9: a client with
few samples among clients with many fills little of the range that its weight could.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from fractions import Fraction
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray

from llava.errors import InputError

Ring = NDArray[Any]  # of uint64 or uint32: integers modulo 2**bits
_DTYPES: dict[int, tuple[np.dtype[Any], np.dtype[Any]]] = {
    32: (np.dtype("<u4"), np.dtype("<i4")),
    64: (np.dtype("<u8"), np.dtype("<i8")),
}


@dataclass(frozen=True)
class FixedPoint:
    """The range and the precision of a number that `clients` clients add up.

    Attributes:
        bound: the largest magnitude of one client's number, between 1e-30 and 1e30; public.
        clients: the largest number of terms of a sum.
        bits: 32 or 64.
    """

    bound: float
    clients: int
    bits: int = 64

    def __post_init__(self) -> None:
        if self.bits not in _DTYPES:
            raise InputError(f"fixed point has {self.bits!r} bits, expected 32 or 64")
        if not 1e-30 <= self.bound <= 1e30:
            raise InputError(f"fixed point: the bound is {self.bound}, expected 1e-30 to 1e30")
        if type(self.clients) is not int or not 1 <= self.clients <= 2**16:
            raise InputError(f"fixed point for {self.clients!r} clients, expected 1 to 65536")

    @property
    def dtype(self) -> np.dtype[Any]:
        """Of the ring's elements: unsigned, little-endian."""
        return _DTYPES[self.bits][0]

    @cached_property
    def fraction(self) -> int:
        """The number of bits after the point; negative where the bound is very large."""
        most, fraction = 2 ** (self.bits - 1), self.bits - math.frexp(self.bound)[1]
        while self.clients * math.ceil(Fraction(self.bound) * Fraction(2) ** fraction) >= most:
            fraction -= 1
        return fraction

    @property
    def resolution(self) -> float:
        """The distance of two neighbouring numbers; a client's is rounded by half of it at most."""
        return 2.0**-self.fraction

    def encode(self, values: NDArray[np.float64], who: str, weight: float = 1.0) -> Ring:
        """Numbers, times a weight in [0, 1], as elements of the ring.

        Raises:
            InputError: one is NaN, infinite or beyond the bound; `who` opens the message. By how
                much is not said: the sentence may travel to those from whom the numbers are hidden.
        """
        largest = max(values.max(initial=0), -values.min(initial=0))  # NaN where one is
        if not math.isfinite(largest):
            raise InputError(f"{who} has NaN or infinite values")
        if largest > self.bound:
            raise InputError(
                f"{who} has values beyond {self.bound:g}, the bound that was agreed for secure sums"
            )
        unsigned, signed = _DTYPES[self.bits]
        return np.rint(values * (weight * 2.0**self.fraction)).astype(signed).view(unsigned)

    def decode(self, total: Ring) -> NDArray[np.float64]:
        """The numbers of which `total` is the sum in the ring."""
        return total.view(_DTYPES[self.bits][1]) * self.resolution
