"""The slice of a shard that each round sees, and the seeds that decide it."""

from __future__ import annotations

import hashlib
import random
from collections.abc import Sequence

from fed.clients.clients_yaml import ClientSpec


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


def cut(
    specs: Sequence[ClientSpec], samples: Sequence[int], rounds: int, *, one_pass: bool, seed: int
) -> list[list[list[int]]]:
    """For each client the indices of its samples that each round sees.

    Args:
        samples: how many each client has.
        one_pass: each sample at most once; else a round sees the whole shard.
    """
    absent: list[list[list[int]]] = [[[]] * min(spec.from_round - 1, rounds) for spec in specs]
    if not one_pass:
        return [
            [*away, *[list(range(count))] * (rounds - len(away))]
            for away, count in zip(absent, samples, strict=True)
        ]
    return [
        [*away, *slices(count, rounds - len(away), seed_of(seed, "slices", spec.name))]
        for spec, away, count in zip(specs, absent, samples, strict=True)
    ]
