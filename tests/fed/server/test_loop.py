"""Who takes part in a round, and that a method can do with so many."""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import dataclass, field
from types import SimpleNamespace

import pytest

from fed import methods
from fed.drivers.driver import Driver
from fed.report import main as report
from fed.server.loop import RoundLoop
from fed.train import train
from llava.errors import InputError


@dataclass
class Client:
    """As much of a client as choosing needs; it comes in round `first` and misses `away`."""

    name: str
    first: int = 1
    away: set = field(default_factory=set)

    def samples(self, round: int) -> int:
        return 5 * (round >= self.first and round not in self.away)


def loop(tmp_path, clients, per_round, seed=0) -> RoundLoop:
    driver, mean = SimpleNamespace(clients=clients), methods.get("fedavg")
    driver.drawn_from = lambda round: Driver.drawn_from(driver, round)
    how = {"rounds": 50, "seed": seed, "clients_per_round": per_round}
    return RoundLoop(driver, mean, {}, tmp_path, {}, **how)


def names(loop: RoundLoop, round: int) -> list[str]:
    return [client.name for client in loop.chosen(round)]


def test_a_round_draws_among_those_that_have_samples_in_it(tmp_path):
    clients = [Client(name, first=1 if name in "ab" else 11) for name in "abcdefgh"]
    clients[0].away = {4}
    run = loop(tmp_path, clients, 2)
    for round in range(1, 11):
        assert names(run, round) == (["b"] if round == 4 else ["a", "b"])
    drawn = Counter(name for round in range(11, 51) for name in names(run, round))
    assert sum(drawn.values()) == 80
    assert set(drawn) == set("abcdefgh")
    assert all(len(names(run, round)) == 2 for round in range(11, 51))


def test_the_draw_depends_on_seed_and_round_alone(tmp_path):
    clients = [Client(name) for name in "abcdefgh"]
    runs = [loop(tmp_path, clients, 3, seed) for seed in (0, 0, 1)]
    draws = [[names(run, round) for round in range(1, 9)] for run in runs]
    assert draws[0] == draws[1] != draws[2]
    # Recorded: a run that was begun before goes on with the same clients.
    assert draws[0][:3] == [["b", "e", "f"], ["c", "d", "h"], ["a", "c", "f"]]


def test_without_a_number_all_take_part_and_a_round_may_have_nobody(tmp_path):
    clients = [Client("a"), Client("b", first=3)]
    assert names(loop(tmp_path, clients, 0), 1) == ["a", "b"]
    for client in clients:
        client.away = {5}
    assert names(loop(tmp_path, clients, 1), 5) == []


def clients_yaml(tmp_path, tiny, *more: str):
    """A client of 12 samples for each of the given ends of its entry."""
    path = tmp_path / "c.yaml"
    lines = (
        f"  - {{name: c{i}, data_path: {tiny}/a.json, image_folder: {tiny}/images{end}}}\n"
        for i, end in enumerate(more)
    )
    path.write_text("clients:\n" + "".join(lines))
    return path


KRUM = {"fed_method": "krum", "fed_options": ["byzantine=1"], "fed_rounds": 4}
LATE = ["", "", "", ", from_round: 3", ", from_round: 3"]


@pytest.mark.parametrize(
    ("ends", "changes", "message"),
    [
        (LATE, KRUM, r"at least 5 clients in a round, found 3 \(round 1 has 3\)"),
        ([""] * 5, {**KRUM, "fed_clients_per_round": 4}, r"found 4 \(round 1 has 4\)"),
        (LATE, {"fed_method": "slerp", "fed_rounds": 4}, r"\(round 1 has 3\)"),
        ([""] * 2 + LATE[3:4], {"fed_method": "slerp", "fed_rounds": 3}, r"\(round 3 has 3\)"),
    ],
)
def test_a_method_that_a_round_has_the_wrong_number_for_is_found_before_anything_is_loaded(
    flags, tiny, tmp_path, ends, changes, message
):
    clients = clients_yaml(tmp_path, tiny, *ends)
    with pytest.raises(InputError, match=message):
        train(flags(fed_clients=clients, model_name_or_path="no/such/model", **changes))
    assert not (tmp_path / "out").exists()


def test_the_least_that_a_round_goes_on_with_is_rehearsed_too(flags, tiny, tmp_path):
    clients = clients_yaml(tmp_path, tiny, *[""] * 5)
    script = {"fed_driver": "script", "fed_client_command": "true", "fed_min_clients": 3}
    with pytest.raises(InputError, match=r"found 3 \(--fed_min_clients lets a round go on with 3"):
        train(flags(fed_clients=clients, **KRUM, **script))


def test_empty_slices_count_as_nobody_before_anything_trains(flags, tiny, tmp_path):
    one = tmp_path / "one.json"
    one.write_text(json.dumps(json.loads((tiny / "a.json").read_text())[:1]))
    clients = clients_yaml(tmp_path, tiny, *[""] * 5)
    clients.write_text(clients.read_text().replace(f"{tiny}/a.json", str(one), 1))
    with pytest.raises(InputError, match=r"found 4 \(round 1 has 4\)"):
        train(flags(fed_clients=clients, **KRUM))
    assert not (tmp_path / "out" / "fed").exists()


def test_a_round_with_nobody_at_work_is_skipped(flags, tiny, tmp_path, capsys):
    one = tmp_path / "one.json"
    one.write_text(json.dumps(json.loads((tiny / "a.json").read_text())[:1]))
    clients = clients_yaml(tmp_path, tiny, "", ", from_round: 2")
    clients.write_text(clients.read_text().replace(f"{tiny}/a.json", str(one), 1))
    measured = {"fed_eval_data_path": [tiny / "heldout.json"]}
    train(flags(fed_clients=clients, fed_rounds=3, fed_clients_per_round=1, **measured))
    assert "round 1/3  skipped: no client had a sample" in capsys.readouterr().out
    lines = (tmp_path / "out" / "rounds.jsonl").read_text().splitlines()
    first, *rest = map(json.loads, lines)
    assert first["round"] == 1
    assert first["clients"] == {}
    assert "skipped" in first["facts"]
    assert [list(record["clients"]) for record in rest][0] == ["c1"]
    assert all(record["clients"] for record in rest)
    report(["--runs", f"x={tmp_path / 'out'}", "--output", str(tmp_path / "report")])


def test_rounds_without_the_state_that_they_are_of_are_refused(flags, tiny, tmp_path):
    left = tmp_path / "fed/round-0003/a.safetensors"
    left.parent.mkdir(parents=True)
    left.write_bytes(b"of another run")
    argv = flags(fed_clients=tiny / "clients.yaml", output_dir=tmp_path)
    with pytest.raises(InputError, match=r"round-0003 of an earlier run lies there, and its state"):
        train(argv)
    assert left.read_bytes() == b"of another run"
    assert not (tmp_path / "fed/state.safetensors").exists()
