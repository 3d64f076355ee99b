"""Shares that were measured on few samples, drawn towards their mean.

The estimate of James and Stein, with each share's own error: a share goes to the mean of all as far
as errors of measurement explain that they differ. Where nothing can be told apart, all are alike.
"""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Mapping, Sequence

LEAST = 0.001  # of a share: nobody is left out

Sums = Mapping[str, Sequence[float]]


def drawn_shares(sums: Sums, names: Iterable[str]) -> dict[str, float]:
    """The explained share 1 - H / (H + I) of each, in [`LEAST`, 1].

    One of whom nothing is known has the mean of all that are known; all have 1 where nothing is
    known of anybody.

    Args:
        sums: name -> [H, H + I, spread], as `fed.clients.measures.Explained` has them.
    """
    if not sums:
        return dict.fromkeys(names, 1.0)
    shares, errors = {}, {}
    for name, (own, other, spread) in sums.items():
        shares[name] = 1 - own / other if other > 0 else 0.0
        errors[name] = spread / other**2 if other > 0 else 0.0
    mean = statistics.mean(shares.values())
    differ = -statistics.mean(errors.values())
    if len(sums) > 1:
        differ += statistics.variance(shares.values())
    drawn = dict.fromkeys(names, mean)
    for name in drawn.keys() & shares.keys() if differ > 0 else ():
        drawn[name] += differ / (differ + errors[name]) * (shares[name] - mean)
    return {name: min(max(share, LEAST), 1.0) for name, share in drawn.items()}
