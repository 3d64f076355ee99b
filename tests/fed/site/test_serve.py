"""A site: what it refuses, what it keeps, what it does with its model."""

from __future__ import annotations

import dataclasses
import errno
import functools
import json
import math
import shutil
import signal
import threading

import pytest
import torch

from fed.clients.update import Update, load_update
from fed.remote.site_yaml import read_site
from fed.remote.spool import REQUEST, Spool
from fed.remote.state_file import Sender
from fed.remote.ticket import Ticket
from fed.site.kept_answer import KeptAnswer, is_good
from fed.site.serve import Site
from fed.site.trainer import check_pictures
from llava.errors import InputError
from tests.fed.drivers.test_remote import REMOTE
from tests.fed.remote.sites import clients_yaml, end, site_yaml, start, wait_for

FLAGS = {
    "version": "plain",
    "mm_projector_type": "mlp2x_gelu",
    "mm_vision_select_layer": "-2",
    "mm_use_im_patch_token": "False",
    "tune_mm_mlp_adapter": "True",
    "per_device_train_batch_size": "2",
    "learning_rate": "0.01",
    "logging_steps": "1",
    "save_strategy": "no",
    "fed_lr_schedule": "run",
    "seed": "7",
}


class Asker:
    """A driver's side of the spool of a site in this process."""

    def __init__(self, folder, tiny, **changes):
        self.spool = Spool(folder / "spool" / "a", "a")
        self.file = site_yaml(folder, tiny, "a", folder / "spool", **changes)
        self.site = Site(read_site(self.file))
        self.sender = Sender()
        self.hello: dict = {}
        self.run = "0" * 32

    def ask(self, kind: str, state=None, **changes):
        """Place a request, let the site answer; its answer."""
        ticket = Ticket(kind, self.run, "a", **{"flags": FLAGS, **changes})
        if state is None:
            key = self.spool.ask(ticket.as_json())
        else:
            key = self.sender.ask(
                self.spool, state, {}, functools.partial(dataclasses.replace, ticket)
            )
        self.site.look(self.spool)
        answer = self.spool.answer(key)
        self.spool.withdraw(key)
        return answer

    def meet(self, **changes):
        from fed.remote.hello import read_hello

        answer = self.ask("hello", nonce="1" * 32, **changes)
        assert answer.reason is None, answer.reason
        self.facts = read_hello(answer.facts, "a")
        return self.facts

    def state(self):
        trainer = self.site._trainer
        return trainer.driver.part.of_model(trainer.driver.session.model)

    def task(self, **changes):
        return self.ask("task", self.state(), **{"round": 1, "facts": self.facts.digest, **changes})


@pytest.fixture
def asker(tmp_path, tiny):
    return Asker(tmp_path, tiny)


def test_the_model_is_loaded_once_for_settings(asker, tiny, capfd):
    facts = asker.meet()
    assert facts.samples == 12
    update = load_update(asker.task().update)
    assert update.num_samples == 12
    assert set(update.metrics) == {"loss", "steps", "seconds", "parameters"}
    asker.run = "1" * 32  # another run of the same settings
    asker.meet()
    asker.task()
    loaded = capfd.readouterr().out.count("loading the model")
    assert loaded == 1
    asker.meet(flags={**FLAGS, "learning_rate": "0.1"})
    assert capfd.readouterr().out.count("loading the model") == 1


def test_an_update_that_could_not_be_handed_over_is_not_trained_again(asker, monkeypatch, capfd):
    flags = {**FLAGS, "fed_rounds": "2", "fed_one_pass": "False"}
    asker.meet(flags=flags)
    state = {name: tensor.clone() for name, tensor in asker.state().items()}

    def task(round=1, **changes):
        facts = {"facts": asker.facts.digest, "flags": flags}
        return asker.ask("task", state, round=round, **facts, **changes)

    def full(*args, **kwargs):
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(Spool, "give", full)
        assert "OSError" in task().reason
    asker.site = Site(read_site(asker.file))  # it was ended, too
    first = task(nonce="1" * 32).update.read_bytes()
    again = task(nonce="2" * 32).update.read_bytes()
    assert first == again
    said = capfd.readouterr().out
    assert said.count("round 1 begins") == 1
    assert said.count("round 1 is done; its update is handed over again") == 2

    # Where the site's own settings have changed it is another answer.
    other = dataclasses.replace(asker.site.config, flags={"optim": "sgd"})
    ticket = Ticket("task", asker.run, "a", flags=flags)
    folder = asker.site.config.work
    assert (
        KeptAnswer(folder, ticket, other).file != KeptAnswer(folder, ticket, asker.site.config).file
    )

    (kept,) = (asker.site.config.work / "runs" / asker.run).glob("answer-*")
    kept.write_bytes(kept.read_bytes()[:-100])
    assert load_update(task(nonce="3" * 32).update).num_samples == 12
    assert task(round=2, last_round=1).reason is None
    assert capfd.readouterr().out.count(" begins") == 2
    assert len(list(kept.parent.glob("answer-*"))) == 1


def test_what_the_driver_will_refuse_is_not_given_again():
    base, state = {"w": torch.ones(2)}, {"w": torch.full((2,), 2.0)}
    told = {"loss": 1.0, "steps": 3, "seconds": 0.1, "parameters": {"w": 2}, "explained": [1.0]}
    assert is_good(Update(state, 3, told), base, told)
    assert not is_good(Update(state, 3), base, {**told, "loss": None})
    assert not is_good(Update(state, 3), base, {**told, "loss": math.nan})
    assert not is_good(Update({"w": torch.zeros(2)}, 3), base, told)
    assert not is_good(Update({"w": torch.tensor([1.0, math.inf])}, 3), base, told)
    assert not is_good(Update(state, 3, extras={"c": torch.tensor([math.nan])}), base, told)


def test_what_is_not_allowed_is_refused_by_name_before_anything_is_loaded(asker, capfd):
    for changes, message in (
        ({"flags": {**FLAGS, "output_dir": "x"}}, "--output_dir is not a flag that this site"),
        ({"own": {"optim": "/bin/sh"}}, "--optim is '/bin/sh': a run names no paths"),
    ):
        answer = asker.ask("hello", **changes)
        assert answer.refused
        assert message in answer.reason
    assert asker.site._trainer is None
    assert "refused: --output_dir" in capfd.readouterr().out


def test_a_site_that_allows_less(tmp_path, tiny):
    asker = Asker(tmp_path, tiny, allow=[name for name in FLAGS if name != "learning_rate"])
    assert (
        asker.ask("hello").reason == "--learning_rate is not a flag that this site lets a run set"
    )


def test_changed_data_are_refused(asker, tiny, tmp_path):
    data = json.loads((tiny / "a.json").read_text())
    mine = tmp_path / "a.json"
    mine.write_text(json.dumps(data))
    asker = Asker(tmp_path / "x", tiny, data_path=str(mine))
    asker.meet()
    assert asker.task().reason is None
    mine.write_text(json.dumps(data[:-1]))
    answer = asker.task(round=2, last_round=1)
    assert answer.refused
    assert "its samples has changed since the run began: 12, now 11" in answer.reason


def test_what_is_wrong_with_the_data_stays_at_the_site(tmp_path, tiny, capfd):
    data = json.loads((tiny / "a.json").read_text())
    data[3]["image"] = "patient-17.png"
    (tmp_path / "a.json").write_text(json.dumps(data))
    asker = Asker(tmp_path, tiny, data_path=str(tmp_path / "a.json"))
    answer = asker.ask("hello")
    assert answer.reason == "it came to nothing (InputError); the site's own output says why"
    assert "patient-17.png" in capfd.readouterr().out


@pytest.mark.parametrize(
    "picture", ["../secret.png", "/etc/secret.png", "x/../../secret.png", "C:\\x.png", "..\\x.png"]
)
def test_pictures_are_opened_below_the_image_folder_alone(tmp_path, tiny, picture):
    data = json.loads((tiny / "a.json").read_text())
    for image in (picture, ["a-0.png", picture]):
        data[3]["image"] = image
        (tmp_path / "a.json").write_text(json.dumps(data))
        config = read_site(
            site_yaml(tmp_path, tiny, "a", "spool", data_path=str(tmp_path / "a.json"))
        )
        with pytest.raises(InputError, match="record 3 has the picture .* not below image_folder"):
            check_pictures(config)


def test_a_damaged_state_is_not_trained_from(asker, capfd):
    asker.meet()
    ticket = Ticket("task", asker.run, "a", FLAGS, round=1, facts=asker.facts.digest)
    key = asker.sender.ask(
        asker.spool, asker.state(), {}, functools.partial(dataclasses.replace, ticket)
    )
    file = asker.spool.file(key, ".state.safetensors")
    data = bytearray(file.read_bytes())
    data[-3] ^= 1
    file.write_bytes(data)
    asker.site.look(asker.spool)
    assert "came to nothing" in asker.spool.answer(key).reason
    assert "its content was changed on its way" in capfd.readouterr().out


def test_a_request_that_is_taken_back_ends_the_task(asker, capfd):
    asker.meet(flags={**FLAGS, "num_train_epochs": "100000"})
    flags = {**FLAGS, "num_train_epochs": "100000"}

    def take_back():
        key = wait_for(lambda: asker.spool.keys(".progress"))[0]
        asker.spool.withdraw(key)

    thread = threading.Thread(target=take_back)
    thread.start()
    asker.task(flags=flags)
    thread.join()
    assert "the request was taken back" in capfd.readouterr().out
    asker.site.look(asker.spool)
    assert not asker.spool.keys(".progress", ".done", ".failed", REQUEST)


def test_another_request_of_the_same_round_does_not_go_on_from_the_last_ones_steps(asker):
    flags = {**FLAGS, "save_strategy": "steps", "save_steps": "1", "num_train_epochs": "3"}
    asker.meet(flags=flags)
    start_from = asker.state()
    trainer = asker.site._trainer
    whole = load_update(asker.task(flags=flags).update).state
    # As a site that was killed in another task of this round has left it.
    stale = trainer.folder / "round-0001" / "a" / "checkpoint-1"
    stale.mkdir(parents=True)
    (stale / "trainer_state.json").write_text("{}")
    (trainer.folder / "begun").write_text("another key")
    answer = asker.ask(
        "task", start_from, flags=flags, round=1, facts=asker.facts.digest, nonce="0" * 32
    )
    again = load_update(answer.update).state
    assert all(bool((again[name] == whole[name]).all()) for name in whole)


KEEPERS = {
    "scaffold": {"fed_method": "scaffold"},
    "pilot": {
        "fed_method": "pilot",
        "mm_projector_type": "pilot",
        "pilot_tasks": ["x", "y"],
        "tune_mm_mlp_adapter": "False",
        "lora_enable": "True",
        "lora_r": "2",
    },
}


@pytest.mark.parametrize("method", KEEPERS)
def test_a_task_begins_with_what_was_kept_in_the_last_round_that_counted(
    tmp_path, tiny, method, capfd
):
    """Three rounds of which the second one's update has not reached the driver, and two alone."""
    flags = {**FLAGS, **KEEPERS[method], "fed_rounds": "4", "fed_one_pass": "False"}
    ends = []
    for name, uncounted in (("two", []), ("four", [2, 3])):
        asker = Asker(tmp_path / name, tiny)
        asker.meet(flags=flags, task="x")
        start_from = asker.state()
        for round in (1, *uncounted, 4):
            asker.sender = Sender()
            answer = asker.ask(
                "task",
                start_from,
                flags=flags,
                task="x",
                facts=asker.facts.digest,
                round=round,
                last_round=1 if round > 1 else 0,
            )
            assert answer.reason is None, answer.reason
            update = load_update(answer.update)
            assert not update.kept
            ends.append(update)
    lone, late = ends[1], ends[-1]
    for part in ("state", "extras"):
        expected, found = getattr(lone, part), getattr(late, part)
        assert all(bool((expected[name] == found[name]).all()) for name in expected)
        assert expected.keys() == found.keys()
    for file in (asker.site.config.work / "runs").rglob("0001.safetensors"):
        file.unlink()
    last = {"round": 3, "last_round": 1, "nonce": "1" * 32}  # asked for once more
    answer = asker.ask("task", start_from, flags=flags, task="x", facts=asker.facts.digest, **last)
    assert "came to nothing" in answer.reason  # what was kept is lost, and is not made up
    assert "0001.safetensors" in capfd.readouterr().out


def test_a_command_of_its_own(tmp_path, tiny, flags):
    """As clients of the script driver: an answer is what the command has left."""
    (tmp_path / "own.sh").write_text(
        'while [ $# -gt 0 ]; do case "$1" in --output_dir) out=$2;; '
        "--pretrain_mm_mlp_adapter) sent=$2;; esac; shift; done\n"
        f'echo done >> {tmp_path}/history; cp "$sent" "$out/mm_projector.bin"\n'
        'touch "$out/$@"'
    )
    asker = Asker(tmp_path, tiny, command=f"bash {tmp_path}/own.sh")
    facts = asker.meet()
    assert facts.flags["command"] == "its own"
    answer = asker.ask("hello", flags={**FLAGS, "fed_method": "scaffold"})
    assert answer.refused  # the method is named: it is a matter of flags, not of data
    assert "--fed_method scaffold changes the clients' own steps" in answer.reason
    asker.meet()
    state = asker.site._trainer.driver.initial
    update = load_update(asker.ask("task", state, round=1, facts=facts.digest).update)
    assert all(bool((update.state[name] == state[name]).all()) for name in state)
    assert update.num_samples == 12
    assert (tmp_path / "history").read_text() == "done\n"


@pytest.mark.slow
def test_processes_of_one_name_and_ctrl_c(tmp_path, tiny, flags):
    """Two sites under one name, and Ctrl-C at the site and at the driver."""
    out = tmp_path / "out"
    spool = out / "fed" / "spool"
    one = site_yaml(tmp_path / "one", tiny, "a", spool)
    two = site_yaml(tmp_path / "two", tiny, "a", spool)
    names = clients_yaml(tmp_path, {"name": "a"}, {"name": "b"})
    argv = flags(fed_clients=names, output_dir=out, **REMOTE)
    logs = {name: tmp_path / f"{name}.log" for name in ("run", "one", "two", "same")}
    run = start("fed.train", *argv, log=logs["run"])
    first = start("fed.site", str(one), log=logs["one"])
    others = []
    try:
        wait_for(lambda: "site a: 12 samples" in logs["run"].read_text())
        for name, file in (("two", two), ("same", one)):
            others.append(start("fed.site", str(file), log=logs[name]))
        assert [process.wait(600) for process in others] == [2, 2]
        said = logs["two"].read_text().splitlines()[-1]
        assert said.startswith(f"error: {spool / 'a'}: another site works there under the name a (")
        assert f".{first.pid}." in said
        said = logs["same"].read_text().splitlines()
        assert (
            said
            == [line for line in said if "another process of this site is running" in line]
            != []
        )
        for process, log in ((run, logs["run"]), (first, logs["one"])):
            process.send_signal(signal.SIGINT)
            assert process.wait(600) == 130
            text = log.read_text()
            assert text.splitlines()[-1] == "interrupted; the same command goes on from here"
            assert "Traceback" not in text
    finally:
        end([run, first, *others])
    assert not (spool / "a" / "alive").exists()


def test_another_model_is_refused_at_hello(tmp_path, tiny, flags):
    """A real site whose language model differs in one byte."""
    other = tmp_path / "llm"
    shutil.copytree(tiny / "llm", other)
    weights = other / "model.safetensors"
    data = bytearray(weights.read_bytes())
    data[-1] ^= 1
    weights.write_bytes(data)
    asker = Asker(tmp_path, tiny, model_name_or_path=str(other))
    mine = Asker(tmp_path / "x", tiny)
    assert asker.meet().model != mine.meet().model
    assert asker.facts.tower == mine.facts.tower
    assert asker.facts.data != mine.facts.data  # of the same records: a site's secret is in it
    before, mine.run = mine.facts.data, "1" * 32
    assert mine.meet().data != before  # of no meaning beyond a run


def test_usage(tmp_path, capsys):
    from fed.site.__main__ import site

    with pytest.raises(SystemExit):
        site([])
    assert "usage: python -m fed.site" in capsys.readouterr().err
    with pytest.raises(InputError, match="nothing.yaml: No such file"):
        site([str(tmp_path / "nothing.yaml")])
