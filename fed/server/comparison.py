"""The updates of a round side by side: lengths, cosines, drift and copies, in one pass.

Values are read block by block as float32; sums over blocks are float64. Up to `PAIRWISE` clients
every pair has its inner product. Above, a pair is compared by sketches of `SKETCH` numbers (count
sketch, Charikar, Chen, Farach-Colton 2002: every value goes to one of them with a random sign),
whose cosines are right to about 1 / sqrt(SKETCH); lengths, drift and the cosines with the mean
are exact there too.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from fed.numerics.chunks import blocks
from fed.numerics.weighted_mean import shares
from fed.state import State

PAIRWISE = 256  # clients
SKETCH = 1024  # numbers
BLOCK = 2**22  # values of all clients that are looked at together
SAME = 1e-6  # between equal updates, lengths and cosines differ by float32's rounding


@dataclass
class Comparison:
    """Of K clients, in their order.

    Attributes:
        norms: lengths of the updates.
        cosines: of all pairs, (K, K), None where an update is zero; None for more than `PAIRWISE`
            clients.
        to_mean: cosines with the mean update by samples; None where one of both is zero.
        drift: the clients' distance from their mean update over their updates' length, root mean
            squares: 0 when all move alike, sqrt(1 - 1/K) when K equal ones move at right angles, 1
            when they cancel; None when nobody moved. Near 0 it is right to about 1e-3: it is the
            root of a difference of float32 sums.
        copies: pairs of clients with the same update, not of zero.
    """

    norms: list[float]
    cosines: list[list[float | None]] | None
    to_mean: list[float | None]
    drift: float | None
    copies: list[tuple[int, int]]

    def facts(self) -> dict[str, Any]:
        """For a record; cosines with the mean where there are none of pairs."""
        facts = {
            "norms": self.norms,
            "cosines": self.cosines,
            "drift": self.drift,
            "copies": self.copies,
        }
        return facts if self.cosines is not None else {**facts, "to_mean": self.to_mean}


def compare(starts: Sequence[State], ends: Sequence[State], weights: Sequence[float]) -> Comparison:
    """Compare updates, end - start, all tensors as one vector.

    Args:
        starts: what each client was sent; the same object where that is the same.
        weights: numbers of samples.
    """
    count = len(ends)
    p = torch.tensor(shares(weights) if any(weights) else [0.0] * count)
    pairwise = count <= PAIRWISE
    products = torch.zeros(count, count if pairwise else SKETCH, dtype=torch.float64)
    squares, with_mean = torch.zeros(2, count, dtype=torch.float64)
    mean_square = torch.zeros((), dtype=torch.float64)
    draw = torch.Generator().manual_seed(0)
    for rows, scale in _updates(starts, ends):
        mean = p @ rows
        squares += scale**2 * torch.linalg.vecdot(rows, rows).double()
        mean_square += scale**2 * mean.square().sum().double()
        with_mean += scale**2 * (rows @ mean).double()
        if pairwise:
            products += scale**2 * (rows @ rows.T).double()
        else:
            products += scale * _sketch(rows, draw).double()
    if not pairwise:
        products = products @ products.T
    lengths = products.diagonal().sqrt()
    cosines = products / torch.outer(lengths, lengths)  # NaN where an update is zero
    norms = squares.sqrt()
    energy = float(p.double() @ squares)
    apart = 1 - float(mean_square) / energy if energy > 0 else 0.0
    return Comparison(
        norms.tolist(),
        [_listed(row) for row in cosines] if pairwise else None,
        _listed(with_mean / (norms * mean_square.sqrt())),
        max(apart, 0.0) ** 0.5 if energy > 0 else None,
        _copies(cosines, norms),
    )


def _updates(starts: Sequence[State], ends: Sequence[State]) -> Iterator[tuple[Tensor, float]]:
    """Blocks of all updates over a scale, (K, n), overwritten by the next, and the scale.

    Very small and very large ones are divided by the largest: float32 does not hold their squares.
    """
    if not ends:
        return
    # Sorted, for a state that is read again from a file may have another order.
    like = {name: ends[0][name] for name in sorted(ends[0])}
    different = list({id(start): start for start in starts}.values())
    places = torch.tensor([[id(d) for d in different].index(id(start)) for start in starts])
    width = max(1, min(2**16, BLOCK // len(ends)))
    for start, end in zip(
        blocks(different, like, torch.float32, width),
        blocks(ends, like, torch.float32, width),
        strict=True,
    ):
        rows = end.clients
        rows -= start.clients if len(different) == 1 else start.clients[places]
        scale = float(torch.stack(torch.aminmax(rows)).abs().max())
        if 1e-12 < scale < 1e12:
            yield rows, 1.0
        elif scale > 0:
            yield rows.div_(scale), scale


def _sketch(rows: Tensor, draw: torch.Generator) -> Tensor:
    """(K, SKETCH) of (K, n): every value, with a sign of its own, in one of the sums."""
    signs = torch.randint(2, (rows.shape[1],), generator=draw).mul_(2).sub_(1)
    signed = nn.functional.pad(rows * signs, (0, -rows.shape[1] % SKETCH))
    return signed.view(len(rows), -1, SKETCH).sum(1)


def _listed(cosines: Tensor) -> list[float | None]:
    """To six places; None for NaN."""
    return [None if math.isnan(c) else round(c, 6) for c in cosines.tolist()]


def _copies(cosines: Tensor, norms: Tensor) -> list[tuple[int, int]]:
    near = (norms[:, None] - norms).abs() <= SAME * norms
    alike = ((cosines > 1 - SAME) & near).triu(1)
    return [(int(i), int(j)) for i, j in alike.nonzero()]
