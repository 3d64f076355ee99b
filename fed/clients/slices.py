"""The slice of a shard that each round sees, and the seeds that decide it."""

from __future__ import annotations

import hashlib
import random


def seed_of(*parts: object) -> int:
    """A 31-bit seed that depends on all parts, the same on every machine and Python."""
    digest = hashlib.sha256("\x1f".join(map(str, parts)).encode()).digest()
    return int.from_bytes(digest[:4], "little") >> 1


def slices(samples: int, rounds: int, seed: int) -> list[list[int]]:
    """Cut a shard of `samples` into one slice a round: every sample in exactly one (one pass).

    The order is drawn with `seed`; sizes differ by at most one, and are 0 in some rounds when
    there are fewer samples than rounds.
    """
    order = list(range(samples))
    random.Random(seed).shuffle(order)
    bounds = [r * samples // rounds for r in range(rounds + 1)]
    return [order[a:b] for a, b in zip(bounds, bounds[1:], strict=False)]
