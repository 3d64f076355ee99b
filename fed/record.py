"""What is told of a round: its record in rounds.jsonl, its curves, its lines on the screen."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator, Mapping, Sequence

import torch

from fed.round_state import Update
from fed.state import State
from fed.turns import Turn

_CHUNK = 2**18  # values of an update that are cast to float64 at once


class Stopwatch:
    """Seconds of a round, by what they went into; a round begins where the one before ended."""

    def __init__(self) -> None:
        self._mark = time.perf_counter()
        self._parts: dict[str, float] = {}

    @contextlib.contextmanager
    def part(self, name: str) -> Iterator[None]:
        began = time.perf_counter()
        yield
        self.add(name, time.perf_counter() - began)

    def add(self, name: str, seconds: float) -> None:
        self._parts[name] = seconds

    def lap(self) -> dict[str, float]:
        """The parts since the last lap, and `other`: what was none of them."""
        now = time.perf_counter()
        parts = {**self._parts, "other": now - self._mark - sum(self._parts.values())}
        self._mark, self._parts = now, {}
        return parts


def round_record(
    turns: Sequence[Turn],
    updates: Mapping[str, Update],
    failed: Mapping[str, str],
    **facts: object,
) -> dict:
    """A line of rounds.jsonl; what `facts` has is the same for all clients."""
    done = [(turn, updates[turn.name]) for turn in turns if turn.name in updates]
    return {
        "round": turns[0].round,
        "clients": {t.name: {"samples": u.num_samples, **u.metrics} for t, u in done},
        "failed": {turn.name: failed[turn.name] for turn in turns if turn.name in failed},
        "cosines": update_cosines([t.state for t, _ in done], [u.state for _, u in done]),
        **facts,
    }


def update_cosines(starts: Sequence[State], ends: Sequence[State]) -> list[list[float | None]]:
    """Cosines between the clients' updates (end − start, all tensors as one vector).

    None where an update is zero.
    """
    products = torch.zeros(len(ends), len(ends), dtype=torch.float64)
    for name in sorted(ends[0]) if ends else ():
        pairs = [
            (start[name].flatten(), end[name].flatten())
            for start, end in zip(starts, ends, strict=True)
        ]
        for first in range(0, len(pairs[0][0]), _CHUNK):
            part = slice(first, first + _CHUNK)
            rows = torch.stack([(end[part] - start[part]).double() for start, end in pairs])
            products += rows @ rows.T
    norms = products.diagonal().sqrt()
    cosines = products / torch.outer(norms, norms)
    zero = norms == 0
    return [
        [None if zero[i] or zero[j] else float(cosines[i, j]) for j in range(len(ends))]
        for i in range(len(ends))
    ]


def curves(record: dict) -> dict[str, float]:
    """The numbers of a record that make curves."""
    values = {f"clients/{n}/loss": c["loss"] for n, c in record["clients"].items()}
    for model, sets in record["heldout"].items():
        for name, m in sets.items():
            values[f"heldout/{model}/{name}/loss"] = m["loss"]
            values[f"heldout/{model}/{name}/exact"] = m["exact"]
    values |= {f"seconds/{name}": s for name, s in record["seconds"].items()}
    return {name: value for name, value in values.items() if value is not None}


def line_of_turn(turn: Turn, rounds: int, update: Update) -> str:
    loss = update.metrics.get("loss")
    if update.num_samples:
        loss = "loss unknown" if loss is None else f"loss {loss:.4f}"
    else:
        loss = "no sample in this round"
    seconds = update.metrics.get("seconds", 0.0)
    return (
        f"round {turn.round}/{rounds}  {turn.name:<20} {update.num_samples:>6} samples  "
        f"{loss}  {seconds:.1f} s"
    )


def lines_of_measures(record: dict, rounds: int) -> Iterator[str]:
    for model, sets in record["heldout"].items():
        for name, m in sets.items():
            yield (
                f"round {record['round']}/{rounds}  {model} on {name}: "
                f"loss {m['loss']:.4f}, exact {100 * m['exact']:.1f} % of {m['samples']}"
            )
