"""Two spools made alike over messages that may be lost, cut, sent twice or answered wrongly."""

from __future__ import annotations

import contextlib
import json
import os
import random

import pytest

from fed.remote import exchange
from fed.remote.exchange import LostError, ServerEnd, SiteEnd
from fed.remote.spool import DONE, REQUEST, STATE, UPDATE, Spool, digest

SITE = "st-mary"


class Wire:
    """Brings a site's messages to the server, as JSON would hold them; `fault` may raise."""

    def __init__(self, server: ServerEnd, fault=lambda message: None):
        self.server, self.fault, self.sent = server, fault, []

    def __call__(self, message):
        self.sent.append(message)
        self.fault(message)
        return self.server.answer(message)


@pytest.fixture
def spools(tmp_path):
    return Spool(tmp_path / "server", SITE), Spool(tmp_path / "site", SITE)


@pytest.fixture
def small_pieces(monkeypatch):
    monkeypatch.setattr(exchange, "PIECE", 1000)


def ask(server: Spool, size: int = 5500, round: int = 1) -> tuple[str, bytes]:
    """Place a request with a state of `size` bytes; its key, and the bytes."""
    data = random.Random(round).randbytes(size)
    file = server.folder / "state.tmp"
    file.write_bytes(data)
    return server.ask({"kind": "task", "round": round, "state": digest(file)}, file), data


def reply(site: Spool, key: str, data: bytes) -> None:
    file = site.folder / "update.tmp"
    file.write_bytes(data)
    site.give(key, {"num_samples": 3}, file)


def until_still(site: SiteEnd) -> None:
    for _ in range(1000):
        try:
            if not site.step():
                return
        except LostError:
            continue
    raise AssertionError("it goes on for ever")


def test_there_and_back(spools, small_pieces):
    server, site = spools
    key, state = ask(server)
    end = SiteEnd(site, Wire(ServerEnd(server)))
    until_still(end)
    assert site.requests() == [key]
    assert site.file(key, STATE).read_bytes() == state
    assert site.ticket(key)["round"] == 1

    site.tell(key, {"step": 3, "steps": 9, "loss": 1.5})
    end.step()
    assert server.progress(key) == {"step": 3, "steps": 9, "loss": 1.5}

    reply(site, key, state[::-1])
    until_still(end)
    answer = server.answer(key)
    assert answer.facts == {"num_samples": 3}
    assert answer.update.read_bytes() == state[::-1]

    server.withdraw(key)
    until_still(end)
    site.forget()
    assert [p.name for p in site.folder.iterdir()] == []
    assert [p.name for p in server.folder.iterdir()] == []


@pytest.mark.parametrize("seed", range(4))
def test_losses_and_restarts_change_nothing(spools, small_pieces, seed):
    """Each message may be lost before or after it is acted on, and both ends begin anew."""
    server, site = spools
    key, state = ask(server)
    luck = random.Random(seed)
    ends = [ServerEnd(server)]

    def wire(message):
        if luck.random() < 0.3:
            raise LostError("lost on the way")
        if luck.random() < 0.1:
            ends.append(ServerEnd(server))
        found = ends[-1].answer(message)
        if luck.random() < 0.3:
            raise LostError("the answer is lost")
        return found

    def carry(wanted):
        for _ in range(500):
            if wanted():
                return
            with contextlib.suppress(LostError):
                SiteEnd(site, wire).step()  # each time a new one
        raise AssertionError("it did not come")

    carry(lambda: site.requests() == [key])
    assert site.file(key, STATE).read_bytes() == state
    reply(site, key, state * 2)
    carry(lambda: server.answer(key) is not None)
    assert server.answer(key).update.read_bytes() == state * 2


def test_a_file_goes_on_from_where_it_was(spools, small_pieces):
    server, site = spools
    key, state = ask(server, 50_000)
    until_still(SiteEnd(site, Wire(ServerEnd(server))))
    reply(site, key, state)

    def cut(message):
        if message["do"] == "put" and message["at"] >= 30_000:
            raise LostError("the line is cut")

    with pytest.raises(LostError):
        SiteEnd(site, Wire(ServerEnd(server), cut)).step()
    again = Wire(ServerEnd(server))
    until_still(SiteEnd(site, again))
    assert server.answer(key).update.read_bytes() == state
    pieces = [m for m in again.sent if m["do"] == "put" and m["data"]]
    assert len(pieces) == 20  # and not 50


def test_a_piece_that_was_changed_on_its_way_is_brought_again(spools, small_pieces):
    server, site = spools
    key, state = ask(server)
    until_still(SiteEnd(site, Wire(ServerEnd(server))))
    reply(site, key, state)
    flipped = []

    def flip(message):
        if message["do"] == "put" and message["at"] == 2000 and not flipped:
            flipped.append(True)
            message["data"] = bytes([message["data"][0] ^ 1]) + message["data"][1:]

    until_still(SiteEnd(site, Wire(ServerEnd(server), flip)))
    assert flipped
    assert server.answer(key).update.read_bytes() == state


def test_an_answer_that_the_driver_rejects_is_given_anew(spools):
    server, site = spools
    key, state = ask(server)
    end = SiteEnd(site, Wire(ServerEnd(server)))
    until_still(end)
    reply(site, key, b"wrong")
    until_still(end)
    server.reject(key)
    until_still(end)
    assert site.requests() == [key]  # to be worked on once more
    assert server.answer(key) is None
    reply(site, key, state)
    until_still(end)
    assert server.answer(key).update.read_bytes() == state


def test_a_failure_is_brought(spools):
    server, site = spools
    key, _ = ask(server)
    end = SiteEnd(site, Wire(ServerEnd(server)))
    until_still(end)
    site.fail(key, "no pictures", refused=True)
    until_still(end)
    answer = server.answer(key)
    assert (answer.reason, answer.refused) == ("no pictures", True)


def test_nothing_else_leaves_a_site(spools, small_pieces):
    """What is sent is looks, questions and answers to what was asked; files beside them stay."""
    server, site = spools
    key, state = ask(server)
    wire = Wire(ServerEnd(server))
    end = SiteEnd(site, wire)
    until_still(end)
    other = "f" * 32
    for name in (f"{key}.kept.safetensors", f"{other}.update.safetensors", f"{other}.done",
                 "captions.json", "patient.png", f"{key}.log"):  # fmt: skip
        (site.folder / name).write_bytes(b"secret")
    site.tell(key, {"step": 1})
    end.step()
    reply(site, key, state[::-1])
    until_still(end)

    assert {message["do"] for message in wire.sent} == {"look", "get", "put", "say"}
    for message in wire.sent:
        assert b"secret" not in repr(message).encode()
        assert message.get("key", key) == key
        if message["do"] == "look":
            assert set(message) == {"do", "progress"}
            assert set(message["progress"]) <= {key}
        elif message["do"] in ("put", "say"):
            assert message["kind"] in (UPDATE, DONE)
    brought = b"".join(m["data"] for m in wire.sent if m["do"] == "put")
    assert brought == state[::-1]
    assert {p.name for p in server.folder.iterdir()} == {
        f"{key}{kind}" for kind in (STATE, REQUEST, UPDATE, DONE)
    }


@pytest.mark.parametrize(
    "message",
    [
        {"do": "get", "key": "../../etc/passwd", "kind": "", "at": 0},
        {"do": "get", "key": "f" * 32, "kind": REQUEST, "at": 0},
        {"do": "get", "key": "{key}", "kind": "/../lock", "at": 0},
        {"do": "get", "key": "{key}", "kind": UPDATE, "at": 0},
        {"do": "put", "key": "{key}", "kind": STATE, "at": 0, "data": b"x", "file": {}},
        {"do": "put", "key": "{key}", "kind": UPDATE, "at": 0, "data": b"x", "file": {}},
        {"do": "put", "key": "{key}", "kind": UPDATE, "at": "x", "data": b"x", "file": {}},
        {"do": "say", "key": "{key}", "kind": REQUEST, "text": "{}"},
        {"do": "say", "key": "{key}", "kind": DONE, "text": "x" * 2**21},
        {"do": "look", "progress": 7},
        {"do": "look", "progress": {"{key}": 7}},
        {"do": "delete", "key": "{key}"},
        {},
    ],
)
def test_the_server_takes_no_other_message(spools, message):
    server, _ = spools
    key, _ = ask(server)
    before = {p.name: p.read_bytes() for p in server.folder.iterdir()}
    filled = json.loads(
        json.dumps(message, default=lambda value: value.decode()).replace("{key}", key)
    )
    if isinstance(filled.get("data"), str):
        filled["data"] = filled["data"].encode()
    assert "error" in ServerEnd(server).answer(filled)
    assert {p.name: p.read_bytes() for p in server.folder.iterdir()} == before


@pytest.mark.parametrize("key", ["../../x", "x" * 32, 7])
def test_a_site_writes_no_file_of_another_name(spools, key, tmp_path):
    _, site = spools
    (tmp_path / "x").write_text("mine")

    def server(message):
        return {"asked": [key], "answered": [], "rejected": [key], "data": b"{}"}

    SiteEnd(site, server).step()
    assert os.listdir(site.folder) == []
    assert (tmp_path / "x").read_text() == "mine"


def test_a_full_disk_at_the_server_is_said(spools, monkeypatch):
    server, site = spools
    key, state = ask(server)
    end = SiteEnd(site, Wire(ServerEnd(server)))
    until_still(end)
    reply(site, key, state)

    def full(*args):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(exchange.os, "fsync", full)
        with pytest.raises(LostError, match="No space left on device"):
            end.step()
    until_still(end)
    assert server.answer(key).update.read_bytes() == state
