"""A thousand clients, fifty a round, by a driver that draws numbers."""

from __future__ import annotations

import json
import threading
import weakref
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from fed import methods
from fed.clients.update import Update
from fed.methods.interface.each import Each
from fed.methods.interface.method import Method, Outcome
from fed.server.loop import RoundLoop
from fed.server.round_state import RoundState

CLIENTS, TAKING, ROUNDS = 1000, 50, 3
START = {
    "model.mm_projector.0.weight": torch.ones(4, 4),
    "base_model.model.q_proj.lora_A.weight": torch.ones(2, 4),
}


class Client:
    def __init__(self, name: str):
        self.name = name

    def samples(self, round: int) -> int:
        return 10


class Numbers:
    clients_keep = writes_updates = False

    def __init__(self, method: methods.Method, stop_at: int = 0):
        self.clients = [Client(f"c{k:03d}") for k in range(CLIENTS)]
        self.keeps, self.stop_at, self.done = method.client_rule is not None, stop_at, 0

    def drawn_from(self, round: int) -> list[Client]:
        return self.clients

    def run(self, tasks, go_on) -> Iterator[tuple]:
        for task in tasks:
            if self.stop_at and self.done == self.stop_at:
                raise KeyboardInterrupt
            self.done += 1
            draw = torch.Generator().manual_seed(hash((int(task.name[1:]), task.round)))
            moved = {n: torch.randn(t.shape, generator=draw) for n, t in task.state.items()}
            state = {n: t + 0.1 * moved[n] for n, t in task.state.items()}
            beside = moved if self.keeps else {}
            yield task, Update(state, 10, {"loss": 1.0}, extras=beside, kept=beside)


def loop(folder: Path, name: str, stop_at: int = 0) -> RoundLoop:
    method = methods.get(name)
    driver = Numbers(method, stop_at)
    tasks = {client.name: f"task{k % 3}" for k, client in enumerate(driver.clients)}
    return RoundLoop(driver, method, {}, folder, {}, rounds=ROUNDS, seed=4,
                     clients_per_round=TAKING, task_of=tasks)  # fmt: skip


def files(folder: Path) -> dict[str, tuple[int, int]]:
    """Each client's own file in the run's folder, and what tells whether it was written again."""
    return {
        str(path.relative_to(folder)): (path.stat().st_ino, path.stat().st_mtime_ns)
        for kind in ("personal", "kept")
        for path in (folder / "fed" / kind).glob("*.safetensors")
    }


@pytest.mark.parametrize("name", ["fedavg", "scaffold", "pilot"])
def test_a_round_writes_the_files_of_those_who_took_part(tmp_path, name):
    run, before = loop(tmp_path, name), {}
    for round in range(1, ROUNDS + 1):
        run.rounds = round
        run.run(START)
        after = files(tmp_path)
        record = json.loads((tmp_path / "rounds.jsonl").read_text().splitlines()[-1])
        written = {path for path, mark in after.items() if before.get(path) != mark}
        taking = {Path(path).name.partition(".")[0] for path in written}
        assert len(record["clients"]) == TAKING
        assert taking == (set() if name == "fedavg" else set(record["clients"]))
        before = after
    names = [Path(path).name.partition(".")[0] for path in before]
    assert len(names) == len(set(names))  # one file a client, whatever the rounds


def test_cut_short_it_ends_in_the_same_bits(tmp_path):
    whole = loop(tmp_path / "whole", "scaffold").run(START)
    for stop_at in (20, 60):
        with pytest.raises(KeyboardInterrupt):
            loop(tmp_path / "cut", "scaffold", stop_at).run(START)
    cut = loop(tmp_path / "cut", "scaffold").run(START)
    assert isinstance(cut, RoundState)
    assert all(torch.equal(cut.shared[n], t) for n, t in whole.shared.items())
    assert cut.kept.rounds == whole.kept.rounds
    for name, state in whole.kept.items():
        assert all(torch.equal(cut.kept[name][n], t) for n, t in state.items())


class Counted:
    """A personal method that moves all by one: how many it made, and the `most` at once."""

    def __init__(self):
        self.made = self.most = 0
        self.alive = weakref.WeakSet()
        self.method = Method("counted", self.function, personal=True)

    def function(self, states, *, weights, base) -> Outcome:
        return Outcome(Each(len(states), lambda k: self.make(states[k])))

    def make(self, state):
        moved = {name: tensor + 1 for name, tensor in state.items()}
        self.alive.update(moved.values())
        self.made, self.most = self.made + 1, max(self.most, len(self.alive) // len(moved))
        return moved


def test_personal_states_are_made_one_by_one_and_only_where_they_are_written(tmp_path):
    both, of_main, of_other = threading.Barrier(2, timeout=60), Counted(), Counted()
    loops = [
        RoundLoop(Numbers(counted.method), counted.method, {}, tmp_path, {}, rounds=2, seed=4,
                  clients_per_round=TAKING, main=counted is of_main, barrier=both.wait)
        for counted in (of_main, of_other)
    ]  # fmt: skip
    other = threading.Thread(target=loops[1].run, args=(START,))
    other.start()
    final = loops[0].run(START)
    other.join()
    assert (of_main.made, of_main.most) == (2 * TAKING, 1)
    assert of_other.made == 0
    assert final.personal.rounds == final.last
    assert list(final.last.values()).count(2) == TAKING
    assert all(state.keys() == START.keys() for state in final.personal.values())
