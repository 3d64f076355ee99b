"""The metrics of a round: its record in rounds.jsonl, its curves, its lines on the screen."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from fed.clients import reliability
from fed.clients.task import ClientTask
from fed.clients.update import Update
from fed.server.comparison import compare
from fed.server.reliability import doubtful

OPEN = ("steps", "seconds", "parameters")  # of a client, where sums are secure
OUTLIER_RATIO = 20.0  # times the median length: nobody trains so much more than the others


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
    round: int,
    tasks: Sequence[ClientTask],
    updates: Mapping[str, Update],
    failed: Mapping[str, str],
    secure: bool = False,
    **facts: object,
) -> dict:
    """A line of rounds.jsonl; `facts` are those of the whole round.

    Of secure sums nothing is in it that was measured on a single client's data or update.
    """
    done = [(task, updates[task.name]) for task in tasks if task.name in updates]
    metrics = {t.name: u.metrics for t, u in done}
    compared: dict[str, Any] = {"norms": None, "cosines": None, "drift": None, "copies": []}
    if secure:
        metrics = {n: {k: m[k] for k in OPEN if k in m} for n, m in metrics.items()}
    else:
        compared = compare(
            [t.state for t, _ in done],
            [u.state for _, u in done],
            [u.num_samples for _, u in done],
        ).facts()
    return {
        "round": round,
        "clients": {t.name: {"samples": u.num_samples, **metrics[t.name]} for t, u in done},
        "failed": {task.name: failed[task.name] for task in tasks if task.name in failed},
        **compared,
        **facts,
    }


def suspicions(record: dict) -> Iterator[str]:
    """Warnings: updates of zero, very long ones, and copies of each other."""
    if record["norms"] is None:
        return
    samples = {name: client["samples"] for name, client in record["clients"].items()}
    norms = {n: norm for n, norm in zip(samples, record["norms"], strict=True) if samples[n]}
    typical = sorted(norms.values())[len(norms) // 2] if norms else 0.0
    for name, norm in norms.items():
        if norm == 0:
            yield f"client {name} sent back just what it was sent"
        elif len(norms) > 2 and norm > OUTLIER_RATIO * typical > 0:
            yield f"client {name}'s update is {norm / typical:.0f} times as long as the median one"
    names = list(samples)
    for i, j in record["copies"]:
        yield f"clients {names[i]} and {names[j]} sent the same update"
    yield from _doubts_of_pictures(record)


def _doubts_of_pictures(record: dict) -> Iterator[str]:
    """Warnings: clients whose pictures explain nothing, and those of whom nothing is known."""
    shares = record.get("reliability")
    if shares is None:
        return
    for name, share, typical in doubtful(shares):
        if name in record["clients"]:
            yield (
                f"the pictures of client {name} explain {100 * share:.0f} % of its captions, those "
                f"of the others {100 * typical:.0f} %: do they belong together?"
            )
    silent = [n for n, client in record["clients"].items() if client["samples"] and n not in shares]
    if silent:
        instead = "the others' mean" if shares else "1 for all"
        yield f"{', '.join(silent)} did not say what pictures explain; reliability: {instead}"


def curves(record: dict) -> dict[str, float]:
    """The numbers of a record that make curves."""
    values = {f"clients/{n}/loss": c.get("loss") for n, c in record["clients"].items()}
    for model, sets in record["heldout"].items():
        for name, m in sets.items():
            for key in ("loss", "exact", "explained"):
                values[f"heldout/{model}/{name}/{key}"] = m.get(key)
    for name, share in record.get("reliability", {}).items():
        values[f"clients/{name}/reliability"] = share
    if record["drift"] is not None:
        values["clients/drift"] = record["drift"]
    values |= {f"seconds/{name}": s for name, s in record["seconds"].items()}
    return {name: value for name, value in values.items() if value is not None}


def line_of_task(task: ClientTask, rounds: int, update: Update, secure: bool = False) -> str:
    """A task's line on the screen; `secure` leaves out what was measured on the client's data."""
    loss = update.metrics.get("loss")
    if not update.num_samples:
        loss = "no sample in this round"
    elif secure:
        loss = "kept to itself"
    else:
        loss = "loss unknown" if loss is None else f"loss {loss:.4f}"
    seconds = update.metrics.get("seconds", 0.0)
    explained = reliability.read(update.metrics.get("explained"))
    share = None if explained is None or secure else explained.share
    return (
        f"round {task.round}/{rounds}  {task.name:<20} {update.num_samples:>6} samples  {loss}  "
        + ("" if share is None else f"explained {100 * share:.0f} %  ")
        + f"{seconds:.1f} s"
    )


def lines_of_measures(record: dict, rounds: int) -> Iterator[str]:
    for model, sets in record["heldout"].items():
        for name, m in sets.items():
            share = m.get("explained")
            yield (
                f"round {record['round']}/{rounds}  {model} on {name}: "
                f"loss {m['loss']:.4f}, exact {100 * m['exact']:.1f} % of {m['samples']}"
                + ("" if share is None else f", explained {100 * share:.1f} %")
            )
