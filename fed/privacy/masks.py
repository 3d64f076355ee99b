"""Masks: a key stretched to as many random elements of the ring as a vector has coordinates.

The generator PRG of Bonawitz et al. 2017 is AES-256 in counter mode, over zeros, from a counter of
zero: a key makes one mask and is never used for another. ChaCha20 is the other candidate: on a CPU
with AES instructions it makes 4.1 GB/s where AES-256 makes 5.0 (scripts/benchmark/secure_sum.py).
Masks are made and added a chunk at a time, all of them side by side: none is ever whole in memory.
"""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np

from fed.privacy.fixed_point import Ring
from fed.privacy.keys import keystream
from fed.privacy.layout import CHUNK


class Masks:
    """Several masks, of which each call of `add_to` uses the elements that follow."""

    def __init__(self, keys: Iterable[tuple[bytes, int]], dtype: np.dtype):
        """`keys`: keys of 32 bytes, each with +1 or -1, the sign of its mask."""
        self._streams = [(keystream(key), sign) for key, sign in keys]
        self._zeros = memoryview(bytes(CHUNK * dtype.itemsize))
        self._mask = np.empty(CHUNK, dtype)

    def add_to(self, values: Ring) -> None:
        """Add the next elements of all masks to a chunk, at most `CHUNK` values, in place."""
        zeros, mask = self._zeros[: values.nbytes], self._mask[: len(values)]
        for stream, sign in self._streams:
            stream.update_into(zeros, mask.data.cast("B"))
            operation = np.add if sign > 0 else np.subtract
            operation(values, mask, out=values)
