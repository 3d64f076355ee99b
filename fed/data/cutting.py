"""From keys to clients: which client each sample goes to, and which samples are held out."""

from __future__ import annotations

import re
from array import array
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
from tqdm import tqdm

from fed.clients.slices import seed_of
from fed.data import keys
from fed.data.dirichlet import dirichlet_owners
from fed.data.samples import LeftOut, Sample, SampleSource
from fed.data.styles import Style
from llava.errors import InputError

LEFT_OUT, HELD_OUT = -1, -2
RESERVED = ("global", "pool", "heldout")
"""Names that stand for something else in a run, or in the output's folder."""


@dataclass
class Column:
    """A key's value for every sample, as a number into `names`; -1 where a sample is left out."""

    codes: np.ndarray
    names: list[str]


@dataclass
class Cut:
    """The client of every sample, or its place among the held-out ones.

    Attributes:
        owner: (samples,) int32, the number of its client, or LEFT_OUT, or HELD_OUT.
        clients: their names.
        column: the key that they differ in.
        domains: by number of the key, the domain that a sample held out is counted to.
        tasks: the task of each client, where clients have tasks.
        dropped: why samples without a fault are in no client → how many; empty: they are rare.
    """

    owner: np.ndarray
    clients: list[str]
    column: Column
    domains: list[str]
    tasks: list[str] = field(default_factory=list)
    dropped: dict[str, int] = field(default_factory=dict)


def survey(source: SampleSource, wanted: Sequence[str], styles: Sequence[Style]) -> list[Column]:
    """The first pass: every sample is checked, and its keys are read.

    4 bytes a sample and key, and the keys' distinct values, are all that stays in memory.
    """
    readers = [keys.reader(key) for key in wanted]
    numbers: list[dict[str, int]] = [{} for _ in wanted]
    codes = [array("i") for _ in range(len(wanted) + 1)]
    seen_good = False
    for sample in tqdm(source.read(check=True), desc="reading", unit="samples", disable=None):
        row = [LEFT_OUT] * len(codes)
        try:
            if sample is not None and _has_styles(sample, styles, source.left_out):
                values = [read(sample) for read in readers]
                row = [n.setdefault(v, len(n)) for n, v in zip(numbers, values, strict=True)] + [0]
                seen_good = True
        except InputError as error:
            if not seen_good:  # a key that no sample has is the command's fault, not the sample's
                raise
            source.left_out.add(sample.name, str(error).removeprefix(f"{sample.name}: "))
        for column, code in zip(codes, row, strict=True):
            column.append(code)
    columns = [
        Column(np.array(column, dtype=np.int32), list(known))
        for column, known in zip(codes, numbers, strict=False)
    ]
    used = Column(np.array(codes[-1], dtype=np.int32), ["all"])
    if not (used.codes >= 0).any():
        raise InputError(f"no sample is left of {len(used.codes)}")
    return [*columns, used]


def _has_styles(sample: Sample, styles: Sequence[Style], left_out: LeftOut) -> bool:
    """Whether the sample has a caption for every style; `left_out` is told if not."""
    empty = [style.name for style in styles if style.caption(sample) is None]
    if empty:
        left_out.add(sample.name, f"no text for style {empty[0]}")
    return not empty


def deal(used: np.ndarray, names: Sequence[str], seed: int) -> Column:
    """A column of `names` in equal shares, dealt at random to the samples that are used."""
    there = np.flatnonzero(used)
    codes = np.full(len(used), LEFT_OUT, dtype=np.int32)
    codes[_stream(seed, "deal").permutation(there)] = np.arange(len(there)) % len(names)
    return Column(codes, list(names))


def product(columns: Sequence[Column]) -> Column:
    """The column of all columns' values together."""
    if len(columns) == 1:
        return columns[0]
    used = np.logical_and.reduce([column.codes >= 0 for column in columns])
    sizes = [len(column.names) for column in columns]
    flat = np.ravel_multi_index([column.codes[used] for column in columns], sizes)
    values, inverse = np.unique(flat, return_inverse=True)
    codes = np.full(len(used), LEFT_OUT, dtype=np.int32)
    codes[used] = inverse
    parts = np.transpose(np.unravel_index(values, sizes))
    names = [
        " x ".join(column.names[i] for column, i in zip(columns, row, strict=True)) for row in parts
    ]
    return Column(codes, names)


def hold_out(used: np.ndarray, amount: float, seed: int) -> np.ndarray:
    """(samples,) bool: which are held out, a share (below 1) or a number of those used."""
    there = np.flatnonzero(used)
    number = round(amount * len(there)) if amount < 1 else int(amount)
    if number >= len(there):
        raise InputError(f"--heldout {number}: there are {len(there)} samples")
    held = np.zeros(len(used), dtype=bool)
    held[_stream(seed, "heldout").permutation(there)[:number]] = True
    return held


def by_value(
    column: Column,
    held: np.ndarray,
    minimum: int = 1,
    most: int | None = None,
    rare: str = "pool",
) -> Cut:
    """A client for each value of a key, the largest first.

    Values with fewer than `minimum` samples, or beyond the `most` largest, are pooled in a client
    `other` or dropped, as `rare` says. A sample held out counts to the domain of its client.
    """
    free = (column.codes >= 0) & ~held
    sizes = np.bincount(column.codes[free], minlength=len(column.names))
    order = np.argsort(-sizes, kind="stable")
    kept = [int(value) for value in order[:most] if sizes[value] >= minimum]
    client_of = np.full(len(column.names) + 1, LEFT_OUT, dtype=np.int32)  # the last is for -1
    client_of[kept] = np.arange(len(kept))
    names = [column.names[value] for value in kept]
    if rare == "pool" and sizes.sum() > sizes[kept].sum():
        client_of[:-1][client_of[:-1] == LEFT_OUT] = len(kept)
        names.append("other")
    if not names:
        raise InputError(
            f"no client has {minimum} samples; the largest would have {int(sizes.max())}"
        )
    clients = client_names(names)
    owner = client_of[column.codes]
    owner[held & (owner >= 0)] = HELD_OUT
    domains = [clients[client] if client >= 0 else "" for client in client_of[:-1]]
    return Cut(owner, clients, column, domains)


def by_dirichlet(
    column: Column,
    held: np.ndarray,
    clients: int,
    alpha: float,
    size_alpha: float | None,
    minimum: int,
    seed: int,
) -> Cut:
    """Clients that mix a key's values (see `dirichlet`); the domain is the key's value."""
    free = (column.codes >= 0) & ~held
    owner = np.where(held, HELD_OUT, LEFT_OUT).astype(np.int32)
    owner[free] = dirichlet_owners(
        column.codes[free],
        clients,
        alpha=alpha,
        size_alpha=size_alpha,
        minimum=minimum,
        seed=seed,
    )
    width = len(str(clients - 1))
    names = [f"client-{i:0{width}d}" for i in range(clients)]
    return Cut(owner, names, column, column.names)


def client_names(values: Sequence[str]) -> list[str]:
    """Names that clients.yaml takes and that differ even where cases do not."""
    names: list[str] = []
    taken = set(RESERVED)
    for value in values:
        base = re.sub(r"[^A-Za-z0-9._-]+", "-", value).strip("-._")[:80] or "client"
        name, count = base, 1
        while name.lower() in taken:
            count += 1
            name = f"{base}-{count}"
        taken.add(name.lower())
        names.append(name)
    return names


def _stream(seed: int, name: str) -> np.random.RandomState:
    """Random numbers that stay the same with every version of numpy."""
    return np.random.RandomState(seed_of(seed, "make_clients", name))
