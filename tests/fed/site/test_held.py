"""Sites in a run of secure sums: real processes, and what leaves them."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import re
import signal
from types import SimpleNamespace

import pytest
import torch

from fed.clients.tensor_file import load_with_facts
from fed.clients.update import Update
from fed.methods.interface.sums import begun_with
from fed.remote.site_yaml import read_site
from fed.remote.spool import Spool
from fed.remote.ticket import Ticket
from fed.site.__main__ import site
from fed.site.held import Held
from fed.site.serve import Site
from fed.state import load
from fed.train import train
from llava.errors import InputError
from tests.conftest import assert_moved_alike
from tests.fed.drivers.test_remote import REMOTE, records
from tests.fed.remote.sites import clients_yaml, end, site_yaml, start, wait_for

NAMES = ("north", "south", "west")
DATA = {"north": "a", "south": "b", "west": "a"}
RUN = {"fed_rounds": 2, "fed_method": "fedcmp", "fed_secure": True}


def yamls(folder, tiny, spools, **changes):
    """The sites' files; each trusts the others."""
    for again in (False, True):
        trust = {n: Held.public_key(read_site(folder / f"{n}.yaml")) for n in NAMES if again}
        files = {
            name: site_yaml(
                folder,
                tiny,
                name,
                spools,
                data_path=str(tiny / f"{DATA[name]}.json"),
                **({"trust": {n: k for n, k in trust.items() if n != name}} if again else {}),
                **changes,
            )
            for name in NAMES
        }
    return files


def resident(flags, tiny, tmp_path, name, **changes):
    """The same run in one process, and open."""
    entries = [
        {"name": n, "data_path": f"{tiny}/{DATA[n]}.json", "image_folder": f"{tiny}/images"}
        for n in NAMES
    ]
    place = tmp_path / name
    place.mkdir()
    clients = clients_yaml(place, *entries)
    common = {**RUN, "fed_secure": False, **changes}
    train(flags(fed_clients=clients, output_dir=place / "out", **common))
    return load(place / "out" / "mm_projector.bin")


@contextlib.contextmanager
def at_work(files, tmp_path):
    running = {n: start("fed.site", str(f), log=tmp_path / f"{n}.log") for n, f in files.items()}
    try:
        yield running
    finally:
        end(list(running.values()))


@pytest.mark.slow  # three sites and a driver that are killed: neither a sum nor a secret is lost
def test_sites_send_sums_alone_and_end_as_the_open_run(flags, tiny, tmp_path):
    out = tmp_path / "out"
    spool = out / "fed" / "spool"
    files = yamls(tmp_path, tiny, spool)
    names = clients_yaml(tmp_path, *({"name": name} for name in NAMES))
    argv = flags(fed_clients=names, output_dir=out, **RUN, **REMOTE)
    sums = out / "fed" / "round-0001" / "sum-0"
    with at_work(files, tmp_path) as sites:
        run = start("fed.train", *argv, log=tmp_path / "run.log")
        try:
            wait_for(lambda: (sums / "AdvertiseKeys.json").exists())
            run.send_signal(signal.SIGKILL)
            sites["south"].send_signal(signal.SIGKILL)
            run.wait(), sites["south"].wait()
            kept = [load_with_facts(f)[0] for f in (out / "fed/round-0001").glob("*.safetensors")]
            assert kept == [{}] * 3  # of a task no tensor has come
            sites["south"] = start("fed.site", str(files["south"]), log=tmp_path / "south.log")
            train(argv)
        finally:
            end([run])
    found = load(out / "mm_projector.bin")
    expected = resident(flags, tiny, tmp_path, "open")
    still = resident(flags, tiny, tmp_path, "still", learning_rate=0)
    assert_moved_alike(found, expected, still, 0.01)
    for record in records(out):
        assert "reliability" not in record
        assert record["cosines"] is None
        for client in record["clients"].values():
            assert client.keys() == {"samples", "steps", "parameters"}
    name = json.loads((out / "fed" / "run.json").read_text())["run"]
    for site_name in NAMES:
        own = load(tmp_path / f"work-{site_name}" / "runs" / name / "mm_projector.bin")
        assert all(torch.equal(own[n], found[n]) for n in found)
        assert not (tmp_path / f"work-{site_name}" / "runs" / name / "held").exists()


@pytest.mark.parametrize(
    ("trust", "flags", "message"),
    [
        (
            {"south": "0" * 64},
            {"fed_secure": "True", "learning_rate": "its own"},
            "sets --learning_rate for this site alone",
        ),
        ({}, {"fed_secure": "True"}, "its site.yaml has no `trust`, the public keys of the other"),
        ({"south": "0" * 64}, {}, "its site.yaml has `trust`: .* --fed_secure True alone"),
        ({"south": "0" * 64}, {"fed_secure": "False"}, "--fed_secure True alone"),
    ],
)
@pytest.mark.parametrize("kind", ["hello", "task", "sum"])
def test_who_takes_part_in_what(tiny, tmp_path, trust, flags, message, kind):
    file = site_yaml(tmp_path, tiny, "a", tmp_path, trust=trust)
    spool = Spool(tmp_path / "spool" / "a", "a")
    said = {"sha256": "", "bytes": 0} if kind != "hello" else None
    own = {name: "0" for name, value in flags.items() if value == "its own"}
    flags = {name: value for name, value in flags.items() if name not in own}
    ticket = Ticket(kind, "0" * 32, "a", flags=flags, own=own, round=1, state=said)
    key = spool.ask(ticket.as_json())
    assert Site(read_site(file)).look(spool)  # before any model is loaded
    answer = spool.answer(key)
    assert answer.refused
    assert re.search(message, answer.reason)


def test_a_site_prints_its_public_key(tiny, tmp_path, capsys):
    file = site_yaml(tmp_path, tiny, "a", tmp_path)
    site([str(file), "--key"])
    key = capsys.readouterr().out.strip()
    assert len(bytes.fromhex(key)) == 32
    site([str(file), "--key"])
    assert capsys.readouterr().out.strip() == key
    assert (tmp_path / "work-a" / "signing.pem").stat().st_mode & 0o777 == 0o600


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"trust": ["north"]}, "trust is .*sites and their public keys"),
        ({"trust": {"north": "abc"}}, "trust has 'abc' for north; 64 hex digits"),
        ({"secure_min": 1}, "secure_min is 1, 2 or more"),
    ],
)
def test_bad_keys_in_site_yaml(tiny, tmp_path, changes, message):
    with pytest.raises(InputError, match=message):
        read_site(site_yaml(tmp_path, tiny, "a", tmp_path, **changes))


def test_a_tasks_update_goes_into_no_other_kind_of_sum(tmp_path):
    def held(**changes):
        flags = {"fed_secure_min": 8, "fed_secure_norm": 1000.0, "fed_dp_shares": True, **changes}
        run = SimpleNamespace(
            method=SimpleNamespace(name="fedavg"),
            options={},
            explains=False,
            arguments=SimpleNamespace(fed=SimpleNamespace(**flags)),
        )
        return Held(None, run, tmp_path)

    state, sent = {"w": torch.ones(2)}, {"c": torch.ones(3)}
    task = Ticket("task", "0" * 32, "a", flags={"learning_rate": "0.1"}, round=1)
    held().keep(task, state, sent, Update(state, 3, {}))
    own = held()._own(task, check=True)
    assert own.weight == 3
    assert own.begun == begun_with(state, sent)
    assert own.begun.keys() == {"w", "extras/c"}
    with pytest.raises(InputError, match="the task of round 1 was for a sum by .*8.*asked for by"):
        held(fed_secure_min=3)._own(task, check=True)
    other = {**task.flags, "gradient_checkpointing": "True"}  # decides nothing
    assert held()._own(dataclasses.replace(task, flags=other), check=True).weight == 3
    with pytest.raises(InputError, match=r"was for .*'0\.1'.*asked for by .*'0\.2'"):
        held()._own(dataclasses.replace(task, flags={"learning_rate": "0.2"}), check=True)
