"""The reliability of clients: what share of its captions a client's pictures explain.

r = I / (I + H): H nats of a client's captions with their own pictures, H + I with those of others,
both over the samples that the client has measured so far, earlier tasks at `DECAY` a task. It is
0 where captions do not belong to their pictures, as a part of every crawl's do not, and lies well
above where they do, whatever the model has learnt. A client of n samples weighs n r in place of n
(`--fed_weighting explained`, and `reliability` of Fed-CMP). Reading and name are ours [R].

On few samples r is uncertain, and early in a run it is near 0 for everybody: quotients of such
numbers are noise. So r is drawn towards the clients' mean (`fed.numerics.shrinkage`): where nothing
can be told apart, samples alone decide.

A client measures itself. This tells honest clients with bad data from those with good data, and is
no defence against one that lies: for that there are the robust means.
"""

from __future__ import annotations

import statistics
from collections.abc import Iterator, Mapping, Sequence

from fed.clients.measures import Explained
from fed.numerics.shrinkage import Sums

DECAY = 0.8
DOUBTFUL = 1 / 3  # of the median of the others: pictures that explain so little are warned of
ENOUGH = 0.2  # of that median: before, nobody's pictures explain anything yet


def gathered_sums(earlier: Sums, told: Mapping[str, Explained | None]) -> dict[str, list[float]]:
    """[H, H + I, spread] by client: what was known, and what this round's clients have told."""
    sums = {name: list(of) for name, of in earlier.items()}
    for name, new in told.items():
        if new is not None and new.samples:
            own, other, spread = sums.get(name, (0.0, 0.0, 0.0))
            sums[name] = [
                DECAY * own + new.own,
                DECAY * other + new.other,
                DECAY**2 * spread + new.spread,
            ]
    return sums


def weighed(samples: Sequence[float], reliable: Sequence[float]) -> list[float]:
    """n_k r_k, as shares of the same number of samples."""
    products = [n * r for n, r in zip(samples, reliable, strict=True)]
    return [sum(samples) * product / sum(products) for product in products]


def doubtful(shares: Mapping[str, float]) -> Iterator[tuple[str, float, float]]:
    """Clients whose pictures explain far less than the others': name, share, the others' median."""
    for name, share in shares.items():
        others = [other for n, other in shares.items() if n != name]
        typical = statistics.median(others) if len(others) > 1 else 0.0
        if typical >= ENOUGH and share < DOUBTFUL * typical:
            yield name, share, typical
