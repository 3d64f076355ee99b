"""`fed.train --fed_driver remote`: sites as processes, and what may come from one."""

from __future__ import annotations

import dataclasses
import itertools
import json
import os
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from fed import methods
from fed.drivers.remote import RemoteClient, RemoteDriver
from fed.remote.board import Board
from fed.remote.hello import Hello
from fed.remote.spool import DONE, UPDATE
from fed.server.loop import RoundLoop
from fed.server.round_state import RoundState
from fed.train import train
from llava.errors import InputError
from tests.fed.remote.sites import (
    ROOT,
    StandIn,
    clients_yaml,
    end,
    is_at_work,
    site_yaml,
    start,
    wait_for,
)

REMOTE = {"fed_driver": "remote", "fed_courier": "folder"}


def records(output: Path) -> list[dict]:
    """rounds.jsonl without the clocks."""
    found = [json.loads(line) for line in (output / "rounds.jsonl").read_text().splitlines()]
    for record in found:
        record.pop("seconds")
        for client in record["clients"].values():
            client.pop("seconds")
    return found


def weights(folder: Path) -> dict[str, bytes]:
    """The files of a checkpoint, and of what lies below it, by their names."""
    kinds = ("*.bin", "*.safetensors", "config.json", "adapter_config.json")
    found = {f for kind in kinds for f in folder.rglob(kind) if "fed" not in f.parts}
    return {str(f.relative_to(folder)): f.read_bytes() for f in found}


@pytest.fixture(scope="module")
def two_sites(tiny, tmp_path_factory):
    """Sites a and b, which serve all runs below the folder; gives it."""
    folder = tmp_path_factory.mktemp("sites")
    processes = [
        start(
            "fed.site",
            str(site_yaml(folder, tiny, name, folder / "*" / "fed" / "spool")),
            log=folder / f"{name}.log",
        )
        for name in "ab"
    ]
    yield folder
    end(processes)


LORA = {"tune_mm_mlp_adapter": False, "lora_enable": True, "lora_r": 2}
RUNS = {
    "bf16": {"fed_wire": "bf16"},
    "fedavg": {},
    "fedcmp": {"fed_method": "fedcmp", "fed_options": ["beta=0.5"]},
    "explained": {"fed_weighting": "explained"},
    "scaffold": {"fed_method": "scaffold", "fed_options": ["server_lr=0.9"]},
    "lora": LORA,
    "pilot": {
        **LORA,
        "fed_method": "pilot",
        "mm_projector_type": "pilot",
        "pilot_stage1_learning_rate": 1e-3,
    },
}


@pytest.mark.slow
@pytest.mark.parametrize("name", RUNS)
def test_sites_end_in_the_bits_of_the_resident_driver(name, two_sites, flags, tiny, tmp_path):
    own = {"a": {"learning_rate": 3e-3}, "b": {"image_aspect_ratio": "pad"}}
    tasks = {"a": "colour", "b": "shape"}
    data = {n: {"data_path": f"{tiny}/{n}.json", "image_folder": f"{tiny}/images"} for n in "ab"}
    both = [{"name": n, **own[n], "task": tasks[n]} for n in "ab"]
    here, there = tmp_path / "resident", two_sites / name
    common = {"fed_rounds": 2, **RUNS[name]}
    if name == "fedavg":
        common["fed_eval_data_path"] = tiny / "heldout.json"
    entries = [{**entry, **data[entry["name"]]} for entry in both]
    train(flags(fed_clients=clients_yaml(tmp_path, *entries), output_dir=here, **common))
    train(flags(fed_clients=clients_yaml(tmp_path, *both), output_dir=there, **common, **REMOTE))

    assert records(there) == records(here)
    run = json.loads((there / "fed" / "run.json").read_text())["run"]
    sites = {n: two_sites / f"work-{n}" / "runs" / run for n in "ab"}
    if name == "pilot":
        assert weights(there / "tasks") == weights(here / "tasks") != {}
        assert not (there / "clients").exists()  # private parameters stay with the sites
        for n, folder in sites.items():
            assert weights(folder / "clients" / n) == weights(here / "clients" / n)
    else:
        assert weights(there) == weights(here) != {}
        for folder in sites.values():
            assert weights(folder) == weights(here)
    if name == "scaffold":
        assert not RoundState.load(there / "fed").kept
    train(flags(fed_clients=clients_yaml(tmp_path, *both), output_dir=there, **common, **REMOTE))


@pytest.mark.slow
def test_killed_sites_and_a_killed_driver_change_nothing(flags, tiny, tmp_path):
    common = {
        "fed_rounds": 2,
        "fed_method": "scaffold",
        "fed_one_pass": False,
        "num_train_epochs": 30,
        "save_strategy": "steps",
        "save_steps": 40,
    }
    train(flags(fed_clients=tiny / "clients.yaml", output_dir=tmp_path / "calm", **common))

    out = tmp_path / "out"
    spool = out / "fed" / "spool"
    files = {n: site_yaml(tmp_path, tiny, n, spool) for n in "ab"}
    sites = {n: start("fed.site", str(f), log=tmp_path / f"{n}.log") for n, f in files.items()}
    names = clients_yaml(tmp_path, {"name": "a"}, {"name": "b"})
    argv = flags(fed_clients=names, output_dir=out, **common, **REMOTE)
    run = start("fed.train", *argv, log=tmp_path / "run.log")
    try:
        wait_for(lambda: is_at_work(spool / "a"))
        sites["a"].send_signal(signal.SIGKILL)
        sites["a"].wait()
        assert is_at_work(spool / "a")
        sites["a"] = start("fed.site", str(files["a"]), log=tmp_path / "a.log")
        wait_for(lambda: (out / "rounds.jsonl").exists() and (out / "rounds.jsonl").read_text())
        wait_for(lambda: is_at_work(spool / "b"))
        run.send_signal(signal.SIGKILL)
        run.wait()
        sites["b"].send_signal(signal.SIGKILL)
        sites["b"].wait()
        sites["b"] = start("fed.site", str(files["b"]), log=tmp_path / "b.log")
        train(argv)
    finally:
        end([run, *sites.values()])
    assert weights(out) == weights(tmp_path / "calm")
    assert [r["clients"] for r in records(out)] == [
        r["clients"] for r in records(tmp_path / "calm")
    ]


@pytest.fixture
def sites(flags, tiny, tmp_path):
    """`sites(a=answer, …)`: a run of stand-ins of that name; gives its records and them."""

    def run(entries: list[dict] | None = None, away: str = "", **answers_and_changes):
        changes = dict(answers_and_changes)
        answers = {n: changes.pop(n, None) for n in "ab"}
        out = changes.setdefault("output_dir", tmp_path / "out")
        names = clients_yaml(tmp_path, *(entries or [{"name": "a"}, {"name": "b"}]))
        there = {n: StandIn(out, tiny, n, answers[n]) for n in "ab" if n not in away}
        for one in there.values():
            one.start()
        try:
            train(flags(fed_clients=names, **{"fed_rounds": 2, **REMOTE, **changes}))
        finally:
            for one in there.values():
                one.__exit__()
        return records(out), there

    return run


def test_a_ticket_has_values_alone(sites, tiny, tmp_path):
    found, there = sites(
        entries=[{"name": "a", "learning_rate": 5e-4, "task": "x"}, {"name": "b", "task": "y"}],
        fed_method="fedavgm",
        fed_options=["momentum=0.5"],
        lr_scheduler_kwargs='{"num_cycles": 0.25}',
    )
    assert [record["clients"]["a"]["samples"] for record in found] == [6, 6]
    kinds = [ticket.kind for ticket in there["a"].tickets]
    assert kinds == ["hello", "task", "task", "stop"]
    ticket = there["a"].tickets[1]
    assert ticket.own == {"learning_rate": "0.0005"}
    assert ticket.flags["fed_options"] == ["momentum=0.5"]
    assert json.loads(ticket.flags["lr_scheduler_kwargs"]) == {"num_cycles": 0.25}
    assert (ticket.round, ticket.last_round, ticket.task) == (1, 0, "x")
    assert there["a"].tickets[2].last_round == 1
    assert "/" not in json.dumps(ticket.as_json())
    for word in ("model_name_or_path", "vision_tower", "image_folder", "output_dir", "data_path"):
        assert word not in ticket.flags
    rows = json.loads((tmp_path / "out" / "fed" / "sites.json").read_text())
    assert {n: (row["state"], row["asked"]) for n, row in rows.items()} == {
        "a": ("waiting", None),
        "b": ("waiting", None),
    }


def test_the_board_says_what_each_site_is_asked_for(sites, monkeypatch):
    shown = []
    usual = Board.show

    def show(self, carried, asked, progress):
        shown.append(asked.get("b"))
        usual(self, carried, asked, progress)

    monkeypatch.setattr(Board, "show", show)
    sites(entries=[{"name": "a"}, {"name": "b", "from_round": 2}])
    requests = [text for text, _ in itertools.groupby(text for text in shown if text)]
    assert requests == ["hello", "round 2", "stop"]


def nan(stand_in, spool, key, ticket):
    update = stand_in.update(spool, key, ticket)
    next(iter(update.state.values())).view(-1)[0] = torch.nan
    stand_in.give(spool, key, update)


def shapes(stand_in, spool, key, ticket):
    update = stand_in.update(spool, key, ticket)
    update.state["model.mm_projector.2.bias"] = torch.ones(3)
    stand_in.give(spool, key, update)


def count(stand_in, spool, key, ticket):
    update = stand_in.update(spool, key, ticket)
    stand_in.give(spool, key, dataclasses.replace(update, num_samples=10**6))


def keeps(stand_in, spool, key, ticket):
    update = stand_in.update(spool, key, ticket)
    stand_in.give(spool, key, dataclasses.replace(update, kept=update.state))


def extras(stand_in, spool, key, ticket):
    update = stand_in.update(spool, key, ticket)
    stand_in.give(spool, key, dataclasses.replace(update, extras=update.state))


def measures(stand_in, spool, key, ticket):
    update = stand_in.update(spool, key, ticket)
    update.metrics["patients"] = 7
    stand_in.give(spool, key, update)


def silent(stand_in, spool, key, ticket):
    update = stand_in.update(spool, key, ticket)
    del update.metrics["loss"]
    stand_in.give(spool, key, update)


def explains(stand_in, spool, key, ticket):
    update = stand_in.update(spool, key, ticket)
    update.metrics["explained"] = {
        "own": 1.0,
        "other": -2.0,
        "spread": 0.1,
        "tokens": 3,
        "samples": 1,
    }
    stand_in.give(spool, key, update)


def other_tensors(stand_in, spool, key, ticket):
    spool.give(
        key, {}, Path(shutil.copy(stand_in.tiny / "llm" / "config.json", spool.folder / "x"))
    )


def nothing(stand_in, spool, key, ticket):
    spool.give(key, {})


def reason(stand_in, spool, key, ticket):
    spool.fail(key, "it came to nothing (OutOfMemoryError)")


def changed_after(change):
    """A good answer in which something is changed before the driver can see it whole."""

    def answer(stand_in, spool, key, ticket):
        outside = type(spool)(spool.folder / "outside", spool.site)
        good = stand_in.update(spool, key, ticket)
        stand_in.give(outside, key, good)
        change(outside, key)
        for kind in (UPDATE, DONE):
            outside.file(key, kind).rename(spool.file(key, kind))

    return answer


def cut(spool, key):
    file = spool.file(key, UPDATE)
    file.write_bytes(file.read_bytes()[:-100])


def flip(spool, key):
    data = bytearray(spool.file(key, UPDATE).read_bytes())
    data[-5] ^= 4
    spool.file(key, UPDATE).write_bytes(data)


def lie(spool, key):
    file = spool.file(key, DONE)
    file.write_text(file.read_text().replace('"site": "b"', '"site": "a"'))


def sealed_as(**changes):
    """The answer that a site gives to another request, or under another name."""

    def change(spool, key):
        other = type(spool)(spool.folder / "other", changes.get("site", spool.site))
        update = spool.file(key, UPDATE)
        other.give(changes.get("key", key), {}, Path(shutil.copy(update, other.folder / "x")))
        name = changes.get("key", key)
        other.file(name, UPDATE).replace(update)
        other.file(name, DONE).replace(spool.file(key, DONE))

    return change


BAD = {
    "nan": (nan, "its state: tensor .* has 1 NaN"),
    "shapes": (shapes, r"its state: tensor .*2.bias has shape \(3,\)"),
    "samples": (count, "it says 1000000 samples, expected 12"),
    "keeps": (keeps, "it has tensors that the site should keep"),
    "extras": (extras, "what it sent beside its state: tensor .* is not expected"),
    "measures": (measures, "its measures are .*patients"),
    "no loss": (silent, "its measures are .*steps"),
    "explained": (explains, "in what its pictures explain: numbers from 0 to .* are expected"),
    "no tensors": (other_tensors, "not a file of this run"),
    "no update": (nothing, "the answer has no update"),
    "failed": (reason, r"site b says: it came to nothing \(OutOfMemoryError\)"),
    "cut": (changed_after(cut), "it has .* bytes, expected"),
    "flipped": (changed_after(flip), "its content was changed on its way"),
    "head": (changed_after(lie), r"\.done: it was changed on its way"),
    "name": (changed_after(sealed_as(site="a")), "it is for site 'a', expected 'b'"),
    "old key": (changed_after(sealed_as(key="0" * 32)), "it is for key '0000"),
}


@pytest.mark.parametrize("case", BAD)
def test_a_bad_answer_is_named_and_the_same_command_goes_on(sites, case):
    answer, message = BAD[case]
    with pytest.raises(InputError, match=f"client b, round 1: .*{message}"):
        sites(b=answer, fed_rounds=1)
    found, there = sites(fed_rounds=1)
    assert len(found) == 1
    assert [t.kind for t in there["a"].tickets] == ["stop"]  # its update was kept


def test_an_answer_that_failed_is_asked_for_again(sites):
    tries = []

    def at_first(stand_in, spool, key, ticket):
        tries.append(key)
        (nan if len(tries) == 1 else StandIn.usual)(stand_in, spool, key, ticket)

    found, _ = sites(b=at_first, fed_rounds=1, fed_client_retries=1)
    assert found[0]["failed"] == {}
    assert len(set(tries)) == 2


def test_a_round_goes_on_without_a_site_that_is_away(sites, tiny, tmp_path, capfd):
    away = {"away": "b", "fed_client_timeout": 1}
    with pytest.raises(InputError, match="site b has not answered within 1 s"):
        sites(**away)
    found, _ = sites(**away, fed_min_clients=1, output_dir=tmp_path / "x")
    assert [list(record["clients"]) for record in found] == [["a"], ["a"]]
    assert "has not answered within 1 s" in found[0]["failed"]["b"]
    said = capfd.readouterr().out
    assert "site b: away, since" in said
    assert "round 1/2  goes on without b" in said


def test_an_answer_that_comes_too_late_is_not_used(sites):
    seen = []

    def late(stand_in, spool, key, ticket):
        seen.append(ticket)
        if ticket.round == 1:  # it answers when nobody asks any more
            update = stand_in.update(spool, key, ticket)
            wait_for(lambda: not spool.is_asked(key))
            stand_in.give(spool, key, dataclasses.replace(update, num_samples=1))
        else:
            StandIn.usual(stand_in, spool, key, ticket)

    found, _ = sites(b=late, fed_client_timeout=2, fed_min_clients=1)
    assert [list(record["clients"]) for record in found] == [["a"], ["a", "b"]]
    assert "round 1: no answer within 2 s (the site is connected)" in found[0]["failed"]["b"]
    assert found[1]["clients"]["b"]["samples"] == 6
    assert [(ticket.round, ticket.last_round) for ticket in seen] == [(1, 0), (2, 0)]


def test_a_late_site_may_be_absent_at_the_start(sites, flags, tiny, tmp_path):
    late = [{"name": "a"}, {"name": "b", "from_round": 2}]
    out = tmp_path / "out"
    second = StandIn(out, tiny, "b")

    def then_b_comes(stand_in, spool, key, ticket):
        if ticket.round == 2:
            second.start()
        StandIn.usual(stand_in, spool, key, ticket)

    found, _ = sites(entries=late, away="b", a=then_b_comes, output_dir=out)
    second.__exit__()
    assert [record["clients"]["b"]["samples"] for record in found] == [0, 12]
    assert [t.kind for t in second.tickets] == ["hello", "task", "stop"]


def test_the_draw_does_not_depend_on_what_a_late_site_has_told(tmp_path):
    """b has no samples in some rounds, which is not known before it is asked."""
    driver = SimpleNamespace(clients=[RemoteClient("a", 1), RemoteClient("b", 2)])
    driver.drawn_from = lambda round: RemoteDriver.drawn_from(driver, round)
    loop = RoundLoop(driver, methods.get("fedavg"), {}, tmp_path, {}, rounds=8, seed=3,
                     clients_per_round=1)  # fmt: skip
    before = [[client.name for client in loop.chosen(round)] for round in range(1, 9)]
    for client in driver.clients:
        client.hello = Hello(2, "", "", "")
        client.slices = [[], [0], [], [1], [], [], [], []]
    after = [[client.name for client in loop.chosen(round)] for round in range(1, 9)]
    assert before == after
    assert before[0] == ["a"]
    assert ["b"] in before[1:]


def refuses(own):
    raise InputError("--seed is not a flag that this site lets a run set")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda own: dataclasses.replace(own, tower="f" * 16), "another vision tower than .*ffff"),
        (lambda own: dataclasses.replace(own, model="f" * 16), "another language model than .*ff"),
        (lambda own: dataclasses.replace(own, samples=0), "its facts are .*'samples': 0"),
        (lambda own: dataclasses.replace(own, samples="12"), "its facts have samples '12'"),
        (lambda own: dataclasses.replace(own, flags={"x": 1}), "its facts have flags {'x': 1}"),
        (refuses, "says: --seed is not a flag that this site lets a run set"),
    ],
)
def test_a_site_that_has_no_part_in_a_run(sites, monkeypatch, change, message):
    usual = StandIn.hello

    def hello(self):
        own = usual(self)
        return change(own) if self.name_of_site == "b" else own

    monkeypatch.setattr(StandIn, "hello", hello)
    with pytest.raises(InputError, match=f"site b:? (has )?{message}"):
        sites()


@pytest.mark.parametrize(
    ("entry", "changes", "message"),
    [
        ({"data_path": "x.json"}, {}, "client a has data_path; where a site's data lie"),
        ({"command": "x"}, {}, "client a has command, which is for --fed_driver script"),
        ({}, {"fed_courier": None}, "--fed_driver remote needs --fed_remote_kit, or --fed_courier"),
        ({}, {"fed_courier": "floder"}, "did you mean folder"),
        ({}, {"fed_pool": True}, "--fed_pool has no place with --fed_driver remote"),
        ({}, {"deepspeed": "zero2.json"}, "one process, which trains nothing"),
        ({}, {"fed_driver": "resident"}, "--fed_courier is for --fed_driver remote"),
    ],
)
def test_bad_flags(flags, tmp_path, entry, changes, message):
    names = clients_yaml(tmp_path, {"name": "a", **entry})
    with pytest.raises(InputError, match=message):
        train(flags(fed_clients=names, **{**REMOTE, **changes}))


def test_secure_sums_have_no_flags_of_single_clients(flags, tmp_path):
    names = clients_yaml(
        tmp_path, {"name": "a", "learning_rate": 0.0}, {"name": "b"}, {"name": "c"}
    )
    with pytest.raises(InputError, match="client a has learning_rate of its own in clients.yaml"):
        train(flags(fed_clients=names, **{**REMOTE, "fed_secure": True}))


def test_states_are_written_once_for_all_sites(sites):
    from fed.remote.spool import STATE

    inodes = {}

    def looks(stand_in, spool, key, ticket):
        inodes[stand_in.name_of_site] = spool.file(key, STATE).stat().st_ino
        wait_for(lambda: len(inodes) == 2)
        StandIn.usual(stand_in, spool, key, ticket)

    sites(a=looks, b=looks, fed_rounds=1)
    assert inodes["a"] == inodes["b"]


LIMITED = """
import resource, runpy, sys
resource.setrlimit(resource.RLIMIT_FSIZE, (int(sys.argv[1]), int(sys.argv[1])))
sys.argv = sys.argv[2:]
runpy.run_module(sys.argv[0], run_name="__main__", alter_sys=True)
"""


def limited(size: int, *words: str) -> subprocess.Popen:
    """`python -m WORDS` with room for files of `size` bytes at most; its output is piped."""
    return subprocess.Popen(
        [sys.executable, "-c", LIMITED, str(size), *words],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT), "PYTHONUNBUFFERED": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


@pytest.mark.slow
def test_a_full_disk_at_either_side_loses_nothing(flags, tiny, tmp_path):
    entry = {"name": "a", "data_path": f"{tiny}/a.json", "image_folder": f"{tiny}/images"}
    train(flags(fed_clients=clients_yaml(tmp_path, entry), output_dir=tmp_path / "calm"))
    room = (tmp_path / "calm" / "mm_projector.bin").stat().st_size // 2

    out = tmp_path / "out"
    argv = flags(fed_clients=clients_yaml(tmp_path, {"name": "a"}), output_dir=out, **REMOTE)
    file = str(site_yaml(tmp_path, tiny, "a", out / "fed" / "spool"))
    site = limited(room, "fed.site", file)
    try:
        with pytest.raises(InputError, match=r"site a says: it came to nothing \(OSError\)"):
            train(argv)
    finally:
        site.terminate()
        said = site.communicate()[0]
    assert "failed: [Errno 27] File too large: " in said

    site = start("fed.site", file, log=tmp_path / "a.log")
    try:
        shutil.rmtree(out / "fed")  # as before the first round
        driver = limited(room, "fed.train", *argv)
        said = driver.communicate()[0]
        assert driver.returncode == 2
        assert re.search(r"error: \[Errno 27\] File too large: '.*out/fed/.*'\n$", said)
        train(argv)
    finally:
        end([site])
    assert weights(out) == weights(tmp_path / "calm")
