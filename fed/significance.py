"""How sure a difference is: a mean with its spread, and a paired test over seeds."""

from __future__ import annotations

import itertools
import statistics
from collections.abc import Sequence

import numpy


def spread(values: Sequence[float], digits: int) -> str:
    """Mean ± standard deviation over the seeds."""
    deviation = statistics.stdev(values) if len(values) > 1 else 0.0
    return f"{statistics.mean(values):.{digits}f} ± {deviation:.{digits}f}"


def sign_flip_p(differences: Sequence[float]) -> float:
    """Two-sided p of a paired permutation test: how often random signs give as large a sum.

    All sign patterns for up to 16 pairs; beyond, 200,000 drawn with seed 0.
    """
    values = numpy.array(differences)
    if len(values) <= 16:
        signs = numpy.array(list(itertools.product((-1, 1), repeat=len(values))))
    else:
        signs = numpy.random.RandomState(0).choice((-1, 1), (200_000, len(values)))
        signs[0] = 1  # the pattern that was seen
    sums = numpy.abs(signs @ values)
    return float((sums >= abs(values.sum()) - 1e-12).mean())
