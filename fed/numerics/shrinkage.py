"""Shares that were measured on few samples, drawn towards their mean.

The estimate of James and Stein, with each share's own error: a share goes to the mean of all as far
as errors of measurement explain that they differ. Where nothing can be told apart, all are alike.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import NamedTuple

LEAST = 0.001  # of a share: nobody is left out

Sums = Mapping[str, Sequence[float]]


class Measured(NamedTuple):
    """A share, and the variance of its error."""

    share: float
    error: float


class Spread(NamedTuple):
    """The mean of shares, and their variance beyond that of errors; below 0 where errors explain
    more than all of it."""

    mean: float
    differ: float

    @classmethod
    def of_sums(cls, count: int, shares: float, squares: float, errors: float) -> Spread:
        """Of `count` shares: from their sum, that of their squares, and that of their errors.

        Nothing is known of none: all are 1.
        """
        if not count:
            return cls(1.0, 0.0)
        mean = shares / count
        variance = (squares - count * mean**2) / (count - 1) if count > 1 else 0.0
        return cls(mean, variance - errors / count)

    def drawn(self, measured: Measured | None) -> float:
        """A share drawn towards the mean, in [`LEAST`, 1]; the mean of what is not known."""
        share = self.mean
        if measured is not None and self.differ > 0:
            share += self.differ / (self.differ + measured.error) * (measured.share - self.mean)
        return min(max(share, LEAST), 1.0)


def share_of(sums: Sequence[float]) -> Measured:
    """The explained share 1 - H / (H + I) of [H, H + I, spread], as
    `fed.clients.measures.Explained` has them; in [-1, 1], its error at most 1."""
    own, other, spread = sums
    if other <= 0:
        return Measured(0.0, 0.0)
    # In bounds, or a client that tells nonsense would outweigh all others in their mean.
    return Measured(max(1 - own / other, -1.0), min(spread / other / other, 1.0))


def drawn_shares(sums: Sums, names: Iterable[str]) -> dict[str, float]:
    """The explained share of each, in [`LEAST`, 1].

    One of whom nothing is known has the mean of all that are known; all have 1 where nothing is
    known of anybody.

    Args:
        sums: name -> [H, H + I, spread].
    """
    known = {name: share_of(of) for name, of in sums.items()}
    spread = Spread.of_sums(
        len(known),
        sum(share for share, _ in known.values()),
        sum(share**2 for share, _ in known.values()),
        sum(error for _, error in known.values()),
    )
    return {name: spread.drawn(known.get(name)) for name in names}
