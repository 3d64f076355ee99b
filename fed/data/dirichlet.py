"""Cut one data set into clients that differ: the Dirichlet cut.

A weight w[k, c] ~ Gamma(alpha) says how much client c is drawn to key k (a topic, a source, a
caption style). Without sizes, a key's samples go to the clients in the shares w[k, c] / Σ w[k, ·],
which are Dirichlet(alpha): the usual cut by label (Yurochkin et al. 2019, arXiv 1905.12022). With
sizes, the clients' shares of all samples are Dirichlet(size_alpha), and one client after the other
fills its size from what is left, drawn to key k by n_k · w[k, c], where n_k samples have key k
(after Hsu et al. 2019, arXiv 1909.06335). A small alpha gives clients of few keys; alpha → ∞ gives
every client the mix of the whole.
"""

from __future__ import annotations

import math
from collections.abc import Hashable, Sequence

import numpy as np

from fed.clients.slices import seed_of
from llava.errors import InputError


def dirichlet(
    keys: Sequence[Hashable],
    clients: int,
    *,
    alpha: float,
    size_alpha: float | None = None,
    minimum: int = 1,
    seed: int,
) -> list[list[int]]:
    """The samples of each client, as ascending indices into `keys`; every index is in one list.

    The arguments are those of `dirichlet_owners`.
    """
    owner = dirichlet_owners(
        keys, clients, alpha=alpha, size_alpha=size_alpha, minimum=minimum, seed=seed
    )
    return [np.flatnonzero(owner == c).tolist() for c in range(clients)]


def dirichlet_owners(
    keys: Sequence[Hashable],
    clients: int,
    *,
    alpha: float,
    size_alpha: float | None = None,
    minimum: int = 1,
    seed: int,
) -> np.ndarray:
    """The number of each sample's client, (samples,) int32: for data sets of millions.

    The same arguments give the same cut on every machine. Takes 20 bytes a sample and 24 bytes for
    each pair of key and client.

    Args:
        keys: of each sample, what clients shall differ in; for a product of keys, tuples.
        clients: how many.
        alpha: over 0; small: a client has few keys.
        size_alpha: over 0; small: sizes differ much. None: sizes follow from `alpha` alone.
        minimum: samples that every client has at least. Who has fewer is given samples one by one,
            each of the most frequent key of the client that is then the largest.

    Raises:
        InputError: an argument is out of range, or there are too few samples.
    """
    if clients < 1:
        raise InputError(f"{clients} clients: at least one is expected")
    if minimum < 0:
        raise InputError(f"a minimum of {minimum} samples a client: 0 or more is expected")
    for name, value in (("alpha", alpha), ("size_alpha", size_alpha)):
        if value is not None and not (value > 0 and math.isfinite(value)):
            raise InputError(f"{name} is {value}: a number over 0 is expected")
    if len(keys) < clients * minimum:
        raise InputError(
            f"{len(keys)} samples are too few for {clients} clients of at least {minimum}"
        )
    rng = _stream(seed, "keys")
    codes = _codes(keys)
    totals = np.bincount(codes)
    weights = _log_gammas(rng, alpha, (len(totals), clients))
    if size_alpha is None:
        rows = [_apportion(n, w) for n, w in zip(totals, weights, strict=True)]
        counts = np.array(rows, dtype=np.int64).reshape(weights.shape)
        _lift(counts, minimum)
    else:
        sizes = _apportion(len(codes), _log_gammas(_stream(seed, "sizes"), size_alpha, clients))
        _lift(sizes[None], minimum)
        counts = _fill(totals, sizes, weights)
    owner = np.empty(len(codes), dtype=np.int32)
    of_key = np.split(np.argsort(codes, kind="stable"), np.cumsum(totals)[:-1])
    for places, row in zip(of_key if len(codes) else (), counts, strict=True):
        rng.shuffle(places)
        owner[places] = np.repeat(np.arange(clients, dtype=np.int32), row)
    return owner


def _stream(seed: int, name: str) -> np.random.RandomState:
    """Random numbers: numpy promises that RandomState's never change; Generator's may."""
    return np.random.RandomState(seed_of(seed, "dirichlet", name))


def _codes(keys: Sequence[Hashable]) -> np.ndarray:
    """Keys as numbers from 0, in the order of their first appearance."""
    numbers: dict[Hashable, int] = {}
    found = (numbers.setdefault(key, len(numbers)) for key in keys)
    return np.fromiter(found, dtype=np.int32, count=len(keys))


def _log_gammas(
    rng: np.random.RandomState, alpha: float, shape: int | tuple[int, int]
) -> np.ndarray:
    """Logarithms of Gamma(alpha) numbers, which for a small alpha are too small to be floats."""
    # If G ~ Gamma(alpha + 1) and U ~ Uniform(0, 1), then G · U^(1 / alpha) ~ Gamma(alpha).
    gamma, uniform = rng.standard_gamma(alpha + 1, shape), 1 - rng.random_sample(shape)
    return np.log(gamma) + np.log(uniform) / alpha


def _apportion(total: int, log_weights: np.ndarray) -> np.ndarray:
    """`total` in whole parts as near as can be to the weights; the largest remainders round up."""
    shares = np.exp(log_weights - log_weights.max())
    exact = total * shares / shares.sum()
    parts = np.floor(exact).astype(np.int64)
    parts[np.argsort(parts - exact, kind="stable")[: total - parts.sum()]] += 1
    return parts


def _lift(counts: np.ndarray, minimum: int) -> None:
    """Change (keys, clients) in place so that every client's sum is at least `minimum`."""
    sums = counts.sum(0)
    while len(sums) and sums.min() < minimum:
        poor, rich = sums.argmin(), sums.argmax()
        key = counts[:, rich].argmax()
        counts[key, rich] -= 1
        counts[key, poor] += 1
        sums[rich] -= 1
        sums[poor] += 1


def _fill(totals: np.ndarray, sizes: np.ndarray, log_weights: np.ndarray) -> np.ndarray:
    """(keys, clients): what each client takes of what those before it left; sums are sizes."""
    left = totals.copy()
    counts = np.zeros(log_weights.shape, dtype=np.int64)
    for client, size in enumerate(sizes):
        while (need := size - counts[:, client].sum()) > 0:
            there = np.flatnonzero(left)
            wanted = _apportion(need, np.log(totals[there]) + log_weights[there, client])
            taken = np.minimum(wanted, left[there])
            counts[there, client] += taken
            left[there] -= taken
    return counts
