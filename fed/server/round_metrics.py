"""The metrics of a round: its record in rounds.jsonl, its curves, its lines on the screen."""

from __future__ import annotations

import contextlib
import math
import time
from collections.abc import Iterator, Mapping, Sequence

import torch

from fed.clients.task import ClientTask
from fed.clients.update import Update
from fed.numerics.chunks import blocks
from fed.numerics.consensus import consensus_of_gram
from fed.numerics.pairwise import gram
from fed.state import State

OUTLIER_RATIO = 20.0  # times the median length: nobody trains so much more than the others
DUPLICATE_TOLERANCE = (
    1e-12  # equal updates' products differ by a rounding where a processor's kernels do
)


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
    **facts: object,
) -> dict:
    """A line of rounds.jsonl; `facts` are those of the whole round."""
    done = [(task, updates[task.name]) for task in tasks if task.name in updates]
    products = update_products([t.state for t, _ in done], [u.state for _, u in done])
    return {
        "round": round,
        "clients": {t.name: {"samples": u.num_samples, **u.metrics} for t, u in done},
        "failed": {task.name: failed[task.name] for task in tasks if task.name in failed},
        "norms": products.diagonal().sqrt().tolist(),
        "cosines": cosines_of(products),
        "drift": drift_of(products, [u.num_samples for _, u in done]),
        **facts,
    }


def update_products(starts: Sequence[State], ends: Sequence[State]) -> torch.Tensor:
    """Inner products of the clients' updates (end − start, all tensors as one vector), (K, K)."""
    # Sorted, for a state that is read again from a file may have another order.
    like = {name: ends[0][name] for name in sorted(ends[0])} if ends else {}
    pairs = zip(blocks(starts, like), blocks(ends, like), strict=True) if ends else ()
    return gram((end.clients.sub_(start.clients) for start, end in pairs), len(ends))


def cosines_of(products: torch.Tensor) -> list[list[float | None]]:
    """Cosines from inner products, (K, K); None where an update is zero."""
    norms = products.diagonal().sqrt()
    cosines = products / torch.outer(norms, norms)
    return [
        [
            None if norms[i] == 0 or norms[j] == 0 else float(cosines[i, j])
            for j in range(len(norms))
        ]
        for i in range(len(norms))
    ]


def drift_of(products: torch.Tensor, weights: Sequence[float]) -> float | None:
    """The clients' distance from their mean update over their updates' length, root mean squares.

    The root of 1 − kappa (`fed.numerics.consensus`): 0 when all clients move alike, sqrt(1 − 1/K)
    when K equal ones move at right angles, 1 when they cancel; None when nobody moved.
    """
    kappa = consensus_of_gram(products, weights)
    return None if kappa is None else max(1 - kappa, 0.0) ** 0.5


def suspicions(record: dict) -> Iterator[str]:
    """Warnings: updates of zero, very long ones, and copies of each other."""
    names = [n for n, client in record["clients"].items() if client["samples"]]
    places = [i for i, client in enumerate(record["clients"].values()) if client["samples"]]
    norms = [record["norms"][i] for i in places]
    typical = sorted(norms)[len(norms) // 2] if norms else 0.0
    for name, norm in zip(names, norms, strict=True):
        if norm == 0:
            yield f"client {name} sent back just what it was sent"
        elif len(norms) > 2 and norm > OUTLIER_RATIO * typical > 0:
            yield f"client {name}'s update is {norm / typical:.0f} times as long as the median one"
    for i, a in enumerate(places):
        for j, b in list(enumerate(places))[i + 1 :]:
            cosine = record["cosines"][a][b]
            if cosine is None or cosine <= 1 - DUPLICATE_TOLERANCE:
                continue
            if math.isclose(norms[i], norms[j], rel_tol=DUPLICATE_TOLERANCE):
                yield f"clients {names[i]} and {names[j]} sent the same update"


def curves(record: dict) -> dict[str, float]:
    """The numbers of a record that make curves."""
    values = {f"clients/{n}/loss": c.get("loss") for n, c in record["clients"].items()}
    for model, sets in record["heldout"].items():
        for name, m in sets.items():
            values[f"heldout/{model}/{name}/loss"] = m["loss"]
            values[f"heldout/{model}/{name}/exact"] = m["exact"]
    if record["drift"] is not None:
        values["clients/drift"] = record["drift"]
    values |= {f"seconds/{name}": s for name, s in record["seconds"].items()}
    return {name: value for name, value in values.items() if value is not None}


def line_of_task(task: ClientTask, rounds: int, update: Update) -> str:
    loss = update.metrics.get("loss")
    if update.num_samples:
        loss = "loss unknown" if loss is None else f"loss {loss:.4f}"
    else:
        loss = "no sample in this round"
    seconds = update.metrics.get("seconds", 0.0)
    return (
        f"round {task.round}/{rounds}  {task.name:<20} {update.num_samples:>6} samples  "
        f"{loss}  {seconds:.1f} s"
    )


def lines_of_measures(record: dict, rounds: int) -> Iterator[str]:
    for model, sets in record["heldout"].items():
        for name, m in sets.items():
            yield (
                f"round {record['round']}/{rounds}  {model} on {name}: "
                f"loss {m['loss']:.4f}, exact {100 * m['exact']:.1f} % of {m['samples']}"
            )
