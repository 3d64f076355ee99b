"""Equal shares of each task for its clients, apart from each other and from what is held out."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

import numpy as np

from fed.clients.slices import seed_of
from fed.data.cutting import HELD_OUT, LEFT_OUT, Column, Cut, hold_out
from llava.errors import InputError


def by_task(
    task: Column,
    picture: Column,
    counts: Counter[str],
    tasks: Sequence[str],
    clients: int,
    samples: int | None,
    heldout: float,
    seed: int,
) -> Cut:
    """So many `clients` of each task, all of the same size: `samples`, or as many as there are.

    Of each task `heldout` (a share or a number) is held out first. What shows a picture that is
    held out goes to no client, and of one task's clients no two have the same picture.

    Raises:
        InputError: a task has too few samples for its clients.
    """
    free, held = task.codes >= 0, np.zeros(len(task.codes), dtype=bool)
    own = {name: task.codes == _code(task, name) for name in tasks}
    for name in filter(lambda name: own[name].any(), tasks):
        try:
            held |= hold_out(own[name], heldout, seed_of(seed, name))
        except InputError as error:
            raise InputError(f"task {name}: {error}") from None
    shown = free & ~held & np.isin(picture.codes, picture.codes[held])
    free &= ~held & ~shown
    shares = {name: _deal(own[name] & free, picture.codes, clients, seed, name) for name in tasks}
    size = samples or max(1, min(len(share) for found in shares.values() for share in found))
    owner = np.where(held, HELD_OUT, LEFT_OUT).astype(np.int32)
    names: list[str] = []
    for name, found in shares.items():
        if (smallest := min(map(len, found))) < size:
            raise InputError(
                f"task {name}: {clients} clients with {size} samples each need {clients * size}; "
                f"it has {own[name].sum()}, without those held out and those of their pictures "
                f"{(own[name] & free).sum()}, and a client's share is {smallest}"
            )
        for number, share in enumerate(found, start=1):
            owner[share[:size]] = len(names)
            names.append(f"{name}-{number:0{len(str(clients))}d}")
    of_task = [name for name in tasks for _ in range(clients)]
    spare = int(free.sum()) - size * len(names)
    dropped = {"for a picture that is held out": int(shown.sum()), "beyond equal shares": spare}
    others = {f"as of another task, {n}": c for n, c in counts.most_common() if n not in tasks}
    return Cut(owner, names, task, task.names, of_task, dropped | others)


def _code(column: Column, name: str) -> int:
    """The number of a name; one that no sample has if the name is not there."""
    return column.names.index(name) if name in column.names else len(column.names)


def _deal(
    used: np.ndarray, pictures: np.ndarray, clients: int, seed: int, task: str
) -> list[list[int]]:
    """Numbers of samples for each client, at random; all of one picture go to one client."""
    draw = np.random.RandomState(seed_of(seed, "make_clients", "task", task))
    groups: dict[int, list[int]] = {}
    for number in draw.permutation(np.flatnonzero(used)):
        groups.setdefault(int(pictures[number]), []).append(int(number))
    shares: list[list[int]] = [[] for _ in range(clients)]
    for group in groups.values():
        min(shares, key=len).extend(group)
    return shares
