"""What a client measures of itself after its turn: what share of its captions its pictures explain.

On a few samples of the turn's slice the captions are measured with their own pictures and with
those of others (`fed.clients.measures`); the server weighs clients by what comes out
(`fed.server.reliability`). It costs two passes without gradients over these samples.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import Any

from fed.clients.measures import Explained
from llava.errors import InputError

LEAST, MOST = 4, 128  # samples
LARGEST = 1e15  # nats, or a count: their sums stay finite
SHARE = 0.03  # of a slice, and of a task's time: two passes cost about as much as a step


def drawn(indices: Sequence[int], seed: int) -> list[int]:
    """The samples of a slice on which a client measures itself, in the slice's order."""
    count = min(max(LEAST, round(SHARE * len(indices))), MOST, len(indices))
    picked = set(random.Random(seed).sample(range(len(indices)), count))
    return [index for place, index in enumerate(indices) if place in picked]


def read(told: Any, who: str = "") -> Explained | None:
    """What a client has told of itself; None if nothing.

    Raises:
        InputError: it is not what `Explained._asdict()` has, or not possible; `who` opens the
            message.
    """
    if told is None:
        return None
    what = f"{who}in what its pictures explain"
    if not isinstance(told, dict) or told.keys() != set(Explained._fields):
        fields = ", ".join(Explained._fields)
        raise InputError(f"{what}: {fields} are expected, found {told!r:.200}")
    if not all(type(n) in (int, float) and 0 <= n <= LARGEST for n in told.values()):
        raise InputError(f"{what}: numbers from 0 to {LARGEST:g} are expected, found {told!r:.200}")
    return Explained(**told)
