"""Federated runs whose clients train in private: what is stated, what leaves a client, who is
refused.
"""

from __future__ import annotations

import dataclasses
import json
import secrets
from types import SimpleNamespace

import pytest

from fed import report, validation
from fed.clients.task import ClientTask
from fed.drivers.private_clients import PrivateClients, entries_of
from fed.server.loop import RoundLoop
from fed.train import train
from llava.errors import InputError
from llava.train.arguments import parse
from llava.train.private_accounting import Guarantee
from llava.train.private_trainer import PrivateTrainer

PRIVATE = {"fed_dp_epsilon": 8, "fed_dp_delta": 1e-6, "fed_dp_clip": 0.5}


@pytest.fixture
def private(flags, tiny):
    def make(**changes):
        clients = {"fed_clients": tiny / "clients.yaml", "fed_rounds": 2}
        return flags(**{**clients, **PRIVATE, **changes})

    return make


def guarantees(out) -> dict:
    return json.loads((out / "privacy.json").read_text())["guarantees"]


@pytest.mark.parametrize(
    ("changes", "entries"),
    [
        ({}, 1),
        ({"num_train_epochs": 2, "bf16": True}, 2),
        ({"fed_one_pass": False}, 2),
        ({"fed_method": "scaffold"}, 1),
        ({"fed_method": "fedprox", "fed_wire": "bf16"}, 1),
        ({"fed_method": "fedcmp", "fed_options": ["reliability=none"]}, 1),
        ({"tune_mm_mlp_adapter": False, "lora_enable": True, "lora_r": 2, "lora_dropout": 0.0}, 1),
    ],
)
def test_a_run_states_what_each_clients_records_are_promised(
    private, tiny, tmp_path, capsys, changes, entries
):
    train(private(**changes, fed_eval_data_path=tiny / "heldout.json"))
    out = tmp_path / "out"
    found = guarantees(out)
    assert {name: of["records"] for name, of in found.items()} == {"a": 12, "b": 9}
    assert {of["entries"] for of in found.values()} == {entries}
    for of in found.values():
        assert of["epsilon"] == pytest.approx(8, abs=1e-6)
        assert of["noise"] == pytest.approx(0.652935385 * entries**0.5, rel=1e-6)
    assert "| a | 8 | 1e-06 |" in (out / "README.md").read_text()
    said = capsys.readouterr().out
    assert "client a is private: epsilon 8 at delta 1e-06 for a record of 12" in said
    assert not (out / "noise").exists()


def test_a_run_that_stops_keeps_its_secrets_for_going_on(private, tmp_path, monkeypatch):
    usual = RoundLoop._aggregate

    def stops(self, state, tasks, *rest):
        if tasks[0].round == 2:
            raise InputError("client b: its state has 1 NaN")
        return usual(self, state, tasks, *rest)

    out = tmp_path / "out"
    with monkeypatch.context() as patch:
        patch.setattr(RoundLoop, "_aggregate", stops)
        with pytest.raises(InputError, match="client b: its state"):
            train(private())
    assert (out / "mm_projector.bin").exists()
    assert "| a | 8 | 1e-06 |" in (out / "README.md").read_text()
    assert not json.loads((out / "privacy.json").read_text())["finished"]
    secrets_of = {file: file.read_bytes() for file in (out / "noise").iterdir()}
    assert len(secrets_of) == 2
    train(private())
    assert json.loads((out / "privacy.json").read_text())["finished"]
    assert not (out / "noise").exists()


def test_what_cannot_be_written_does_not_hide_why_a_run_stops(
    private, tmp_path, monkeypatch, capfd
):
    def stops(self, *rest):
        raise InputError("client b: out of luck")

    def full(*rest):
        raise OSError(28, "No space left on device")

    usual = RoundLoop._task
    monkeypatch.setattr(RoundLoop, "_task", lambda *a: stops(*a) if a[-1] == 2 else usual(*a))
    monkeypatch.setattr("fed.clients.store.ClientStore.export", full)
    with pytest.raises(InputError, match="out of luck"):
        train(private())
    assert "warning: it could not be written: [Errno 28]" in capfd.readouterr().out


def test_each_client_has_a_card_where_each_has_a_checkpoint(private, tmp_path):
    train(private(fed_method="local", fed_rounds=1, fed_dp_epsilon=None, fed_dp_noise=1.0))
    out = tmp_path / "out"
    for name in "ab":  # noise 1 at delta 1e-6: epsilon 4.88655
        assert (out / "clients" / name / "mm_projector.bin").exists()
        assert f"| {name} | 4.887 | 1e-06 |" in (out / "clients" / name / "README.md").read_text()


def test_nothing_that_was_measured_on_their_data_leaves_clients(private, tmp_path, capsys):
    train(private(report_to="tensorboard"))
    out = tmp_path / "out"
    rounds = [json.loads(line) for line in (out / "rounds.jsonl").read_text().splitlines()]
    assert len(rounds) == 2
    for record in rounds:
        for told in record["clients"].values():
            assert told.keys() == {"samples", "steps", "parameters"}
        assert "reliability" not in record
    curves = [path.read_bytes() for path in (out / "runs").rglob("*tfevents*")]
    assert any(b"clients/a/learning_rate" in text for text in curves)
    assert not any(b"clients/a/loss" in text for text in curves)
    said = capsys.readouterr().out
    assert "loss unknown" in said
    assert not any("client" in line and "loss 0" in line for line in said.splitlines())


def test_a_pool_is_one_client_of_all_records(private, tmp_path):
    train(private(fed_pool=True))
    found = guarantees(tmp_path / "out")
    assert found.keys() == {"pool"}
    assert (found["pool"]["records"], found["pool"]["entries"]) == (21, 1)


def test_a_client_of_its_own_flags_has_its_own_noise(private, tiny, tmp_path):
    folder = {"image_folder": str(tiny / "images")}
    clients = [
        {"name": "a", "data_path": str(tiny / "a.json"), "num_train_epochs": 3, **folder},
        {
            "name": "b",
            "data_path": str(tiny / "b.json"),
            "per_device_train_batch_size": 4,
            **folder,
        },
    ]
    (tmp_path / "own.yaml").write_text(json.dumps({"clients": clients}))
    train(private(fed_clients=tmp_path / "own.yaml"))
    found = guarantees(tmp_path / "out")
    assert (found["a"]["entries"], found["a"]["step"]) == (3, 2)
    assert (found["b"]["entries"], found["b"]["step"]) == (1, 4)
    assert found["a"]["noise"] == pytest.approx(3**0.5 * found["b"]["noise"])
    clients[1]["per_device_train_batch_size"] = 1
    (tmp_path / "own.yaml").write_text(json.dumps({"clients": clients}))
    with pytest.raises(InputError, match="client b: a step of one sample has no place"):
        train(private(fed_clients=tmp_path / "own.yaml", output_dir=tmp_path / "other"))


@pytest.mark.parametrize("method", ["fedavg", "scaffold"])
def test_killed_and_started_again_it_ends_in_the_same_bits(private, tmp_path, monkeypatch, method):
    monkeypatch.setattr(secrets, "token_hex", lambda count: "5a" * count)
    common = {"fed_method": method, "save_strategy": "steps", "save_steps": 1}
    train(private(**common, output_dir=tmp_path / "whole"))

    class Killed(Exception):  # noqa: N818
        pass

    steps, step = [], PrivateTrainer.training_step

    def until(self, *args):
        steps.append(1)
        if len(steps) in (5, 9):
            raise Killed
        return step(self, *args)

    cut = private(**common, output_dir=tmp_path / "cut")
    with monkeypatch.context() as patch:
        patch.setattr(PrivateTrainer, "training_step", until)
        for _ in range(2):
            with pytest.raises(Killed):
                train(cut)
        train(cut)
    a, b = ((tmp_path / n / "mm_projector.bin").read_bytes() for n in ("whole", "cut"))
    assert a == b


def test_a_round_from_another_state_is_not_trained_again(tmp_path):
    import torch

    of = Guarantee(8, 1e-6, 18, 0.65, 0.5, 1, 12, 4)
    flags = {"a": {"--learning_rate": "0.1"}}
    clients = PrivateClients({"a": of}, tmp_path, flags)
    state = {"w": torch.zeros(3)}
    task = ClientTask(SimpleNamespace(name="a", slices=[[0], [1]]), state, 1, tmp_path)
    steps = clients.steps(task)
    assert (steps.clip, steps.noise, steps.task) == (0.5, 0.65, "round 1 of client a")
    assert PrivateClients({"a": of}, tmp_path, flags).steps(task).task == steps.task
    clients.steps(dataclasses.replace(task, round=2, state={"w": torch.ones(3)}))
    for change in ({"state": {"w": torch.ones(3)}}, {"extras": state}, {"kept": state}):
        with pytest.raises(InputError, match="round 1 of client a has begun before from another"):
            clients.steps(dataclasses.replace(task, **change))
    other = SimpleNamespace(name="a", slices=[[1], [0]])  # of another seed: 1 was seen already
    with pytest.raises(InputError, match="the run has begun before from another state or under"):
        clients.steps(dataclasses.replace(task, client=other, round=2))
    with pytest.raises(InputError, match="the run has begun before"):
        PrivateClients({"a": dataclasses.replace(of, noise=0.1)}, tmp_path, flags).steps(task)
    with pytest.raises(InputError, match="the run has begun before"):
        PrivateClients({"a": of}, tmp_path, {"a": {"--learning_rate": "0.2"}}).steps(task)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"fed_driver": "script", "fed_client_command": "true"},
         "private training is of the clients' own steps, which a script of --fed_driver script"),
        ({"fed_method": "pilot", "mm_projector_type": "pilot"},
         "--fed_method pilot has no place in private training"),
        ({"fed_weighting": "explained"}, "--fed_weighting explained has no place in private"),
        ({"fed_method": "fedcmp"}, "--fed_method fedcmp with reliability=explained has no place"),
        ({"fed_dp_epsilon": 0}, "--fed_dp_epsilon is 0"),
        ({"fed_dp_metrics": "on"}, "--fed_dp_metrics is 'on'; known is off"),
        ({"per_device_train_batch_size": 1}, "a step of one sample"),
        ({"fed_dp_delta": 0.1}, "client a: --fed_dp_delta is 0.1, at most 1 / 12"),
        ({"bits": 8}, "--bits 8 has no place"),
        ({"mm_use_im_start_end": True}, "picture_rows trains in a Embedding"),
    ],
)  # fmt: skip
def test_what_does_not_fit_is_refused_before_anything_trains(private, tmp_path, changes, message):
    with pytest.raises(InputError, match=message):
        train(private(**changes))
    assert not (tmp_path / "out" / "privacy.json").exists()


def test_deepspeed_is_refused(private, tiny, tmp_path):
    file = tmp_path / "zero2.json"
    file.write_text('{"zero_optimization": {"stage": 2}}')
    arguments = validation.parse_arguments(private())
    training = dataclasses.replace(arguments.training)
    training.deepspeed = str(file)
    with pytest.raises(InputError, match="--deepspeed .* has no place in private training"):
        validation.check_flags(arguments._replace(training=training))


def test_the_steps_that_a_record_enters(flags):
    args = parse(flags(num_train_epochs=2))[2]
    assert entries_of(args, [[0, 1], [2], []]) == 2  # one pass
    assert entries_of(args, [[0, 1, 2]] * 3) == 6
    by_steps = parse(flags(max_steps=2))[2]  # batches of 2: of 2 samples twice, of 3 once
    assert entries_of(by_steps, [[0, 1], [2, 3, 4]]) == 2
    assert entries_of(by_steps, [[0, 1, 2], [2, 3, 4]]) == 2
    assert entries_of(args, [[], []]) == 1


def test_the_report_has_the_guarantees(private, flags, tiny, tmp_path):
    train(private(fed_eval_data_path=tiny / "heldout.json"))
    plain = tmp_path / "plain"
    train(flags(fed_clients=tiny / "clients.yaml", output_dir=plain))
    runs = [report.RunRecords.load(n, f) for n, f in (("p", tmp_path / "out"), ("q", plain))]
    text = report.report(runs, tmp_path / "report", "x")
    assert "Differential privacy of a record:" in text
    assert "| p, a | 8 | 1e-06 |" in text
    assert "Batches are fixed" in text
    assert "q, a" not in text
    assert "Differential privacy" not in report.report(runs[1:], tmp_path / "other", "x")
