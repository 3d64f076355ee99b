"""The round loop: choose, send down, collect, aggregate, write the state, go on.

A run may be killed at any instruction. Started again with the same command it ends in the same
bits: whatever is drawn (who takes part, which samples, in which order) depends on the seed and the
round alone, what is kept lies in files that are whole or absent, and a round that was cut short is
finished from the updates that were there.
"""

from __future__ import annotations

import json
import random
import shutil
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch

from fed import state as states
from fed.clients import seed_of
from fed.round_state import RoundState, Update, load_update, save_update
from fed.state import State
from llava.atomic import remove_leftovers, write_text
from llava.errors import InputError


class Participant(Protocol):
    """What the loop knows of a client."""

    name: str

    def samples(self, round: int) -> int: ...


@dataclass
class Loop:
    """One federated run.

    Args:
        clients: all clients, in a fixed order.
        fit: `fit(client, state, round, work_dir) -> Update`: the driver.
        method: a bound aggregation method, `method(states, weights=, base=, memory=, clients=)`.
        output_dir: gets `rounds.jsonl`, and `fed/` with what resuming needs.
        settings: what must be the same when a run is continued.
        evaluate: `evaluate(state) -> dict`, or None.
        log: `log(values, round)`: scalars for TensorBoard and its like.
        main: whether this process writes; in a distributed run just one does.
        barrier: waits for all processes of a distributed run.
    """

    clients: Sequence[Participant]
    fit: Callable[[Any, State, int, Path], Update]
    method: Callable[..., Any]
    output_dir: Path
    settings: Mapping[str, Any]
    rounds: int
    seed: int
    clients_per_round: int = 0
    evaluate: Callable[[State], dict] | None = None
    evaluate_every: int = 1
    log: Callable[[dict[str, float], int], None] = lambda values, round: None
    main: bool = True
    barrier: Callable[[], None] = lambda: None

    @property
    def _file(self) -> Path:
        return self.output_dir / "fed" / "state.safetensors"

    def _folder(self, round: int) -> Path:
        """Where a round's finished updates lie until it is over."""
        return self.output_dir / "fed" / f"round-{round:04d}"

    def run(self, initial: State) -> RoundState:
        """Run all rounds that are left, from `initial` if none was; returns the last state."""
        now = self._resume(initial)
        self.barrier()
        self._mark = time.perf_counter()
        while now.round < self.rounds:
            now = self._round(now)
        return now

    def _resume(self, initial: State) -> RoundState:
        settings = json.loads(json.dumps(dict(self.settings)))
        if self.main:
            for folder in (self.output_dir, self._file.parent):
                remove_leftovers(folder)
        if not self._file.exists():
            # Written before anything trains: a round that is cut short belongs to these settings.
            fresh = RoundState(round=0, shared=initial, settings=settings)
            if self.main:
                fresh.save(self._file)
            return fresh
        found = RoundState.load(self._file)
        for key in sorted(settings.keys() | found.settings.keys()):
            if settings.get(key) != found.settings.get(key):
                raise InputError(
                    f"--output_dir {self.output_dir} holds a run with {key} = "
                    f"{found.settings.get(key)!r}, now it is {settings.get(key)!r}; continue with "
                    "the same command, or choose another --output_dir"
                )
        self._say(f"continuing after round {found.round} of {self.rounds}")
        if self.main:
            self._write_records(found)
            for done in range(1, found.round + 1):
                shutil.rmtree(self._folder(done), ignore_errors=True)
        return found

    def chosen(self, round: int) -> list[Participant]:
        """Who takes part in a round: all, or as many as asked for, drawn anew each round."""
        if not self.clients_per_round or self.clients_per_round >= len(self.clients):
            return list(self.clients)
        draw = random.Random(seed_of(self.seed, "clients of round", round))
        picked = set(draw.sample(range(len(self.clients)), self.clients_per_round))
        return [client for i, client in enumerate(self.clients) if i in picked]

    def _round(self, now: RoundState) -> RoundState:
        # A round's time runs from the end of the one before, so the writing of its state counts.
        began, round = self._mark, now.round + 1
        folder = self._folder(round)
        chosen = self.chosen(round)
        finished = {c.name: folder / f"{c.name}.safetensors" for c in chosen}
        finished = {name: file for name, file in finished.items() if file.exists()}
        self.barrier()

        updates: list[Update] = []
        training = 0.0  # of the turns that this process ran
        for client in chosen:
            if client.name in finished:
                updates.append(load_update(finished[client.name]))
                continue
            sent = now.personal.get(client.name, now.shared)
            update = self.fit(client, sent, round, folder / client.name)
            states.check(update.state, like=sent, who=f"client {client.name}")
            if self.main:
                save_update(update, folder / f"{client.name}.safetensors")
            updates.append(update)
            training += update.metrics.get("seconds", 0.0)
            self._say_turn(round, client.name, update)

        aggregating = time.perf_counter()
        after, facts = self._aggregate(now, chosen, updates, round)
        aggregating = time.perf_counter() - aggregating

        evaluating = time.perf_counter()
        heldout = self._measure(after)
        evaluating = time.perf_counter() - evaluating

        record = {
            "round": round,
            "method": self.settings["--fed_method"],
            "clients": {
                client.name: {"samples": u.num_samples, **u.metrics}
                for client, u in zip(chosen, updates, strict=True)
            },
            "cosines": update_cosines(
                [now.personal.get(c.name, now.shared) for c in chosen], [u.state for u in updates]
            ),
            "heldout": heldout,
            "facts": facts,
        }
        self._mark = time.perf_counter()
        whole = self._mark - began
        record["seconds"] = {
            "training": training,
            "aggregation": aggregating,
            "evaluation": evaluating,
            "other": whole - training - aggregating - evaluating,
        }
        after.records = [*now.records, record]
        if self.main:
            after.save(self._file)
            self._write_records(after)
            shutil.rmtree(folder, ignore_errors=True)
        self.log(_scalars(record), round)
        self._say_round(record)
        self.barrier()
        return after

    def _aggregate(self, now: RoundState, chosen, updates, round: int) -> tuple[RoundState, dict]:
        after = RoundState(round, now.shared, dict(now.personal), now.memory, [], now.settings)
        at_work = [(c, u) for c, u in zip(chosen, updates, strict=True) if u.num_samples > 0]
        if not at_work:
            return after, {"skipped": "no client had a sample in this round"}
        outcome = self.method(
            [u.state for _, u in at_work],
            weights=[u.num_samples for _, u in at_work],
            base=now.shared,
            memory=now.memory or None,
            clients=[c.name for c, _ in at_work],
        )
        if isinstance(outcome.state, list):
            for (client, _), state in zip(at_work, outcome.state, strict=True):
                after.personal[client.name] = state
        else:
            after.shared = outcome.state
        after.memory = outcome.memory or {}
        return after, outcome.facts

    def _measure(self, after: RoundState) -> dict:
        due = self.evaluate_every and (
            after.round % self.evaluate_every == 0 or after.round == self.rounds
        )
        if self.evaluate is None or not due:
            return {}
        if after.personal:
            return {name: self.evaluate(state) for name, state in after.personal.items()}
        return {"global": self.evaluate(after.shared)}

    def _write_records(self, state: RoundState) -> None:
        lines = "".join(json.dumps(record) + "\n" for record in state.records)
        write_text(self.output_dir / "rounds.jsonl", lines)

    def _say(self, text: str) -> None:
        if self.main:
            print(text, flush=True)

    def _say_turn(self, round: int, name: str, update: Update) -> None:
        loss = update.metrics.get("loss")
        loss = "no sample in this round" if loss is None else f"loss {loss:.4f}"
        seconds = update.metrics.get("seconds", 0.0)
        self._say(
            f"round {round}/{self.rounds}  {name:<20} {update.num_samples:>6} samples  "
            f"{loss}  {seconds:.1f} s"
        )

    def _say_round(self, record: dict) -> None:
        for model, sets in record["heldout"].items():
            for name, m in sets.items():
                self._say(
                    f"round {record['round']}/{self.rounds}  {model} on {name}: "
                    f"loss {m['loss']:.4f}, exact {100 * m['exact']:.1f} % of {m['samples']}"
                )


def update_cosines(starts: Sequence[State], ends: Sequence[State]) -> list[list[float | None]]:
    """Cosines between the clients' updates (end − start, all tensors as one vector).

    None where an update is zero.
    """
    vectors = [
        torch.cat([(end[name] - start[name]).flatten().double() for name in sorted(end)])
        for start, end in zip(starts, ends, strict=True)
    ]
    norms = [float(v.norm()) for v in vectors]
    return [
        [
            float(a @ b) / (norms[i] * norms[j]) if norms[i] and norms[j] else None
            for j, b in enumerate(vectors)
        ]
        for i, a in enumerate(vectors)
    ]


def _scalars(record: dict) -> dict[str, float]:
    """The numbers of a round that make curves."""
    values = {f"clients/{n}/loss": c["loss"] for n, c in record["clients"].items()}
    for model, sets in record["heldout"].items():
        for name, m in sets.items():
            values[f"heldout/{model}/{name}/loss"] = m["loss"]
            values[f"heldout/{model}/{name}/exact"] = m["exact"]
    values |= {f"seconds/{name}": s for name, s in record["seconds"].items()}
    return {name: value for name, value in values.items() if value is not None}
