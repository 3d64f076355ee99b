"""The spool: whole files, answers of the right site to the right request."""

from __future__ import annotations

import json

import pytest

from fed.remote.spool import DONE, FAILED, PROGRESS, REQUEST, STATE, UPDATE, Spool, digest, key_of
from llava.errors import InputError


@pytest.fixture
def spool(tmp_path):
    return Spool(tmp_path / "spool", "a")


def asked(spool, value: int = 1) -> tuple[str, dict]:
    state = spool.folder / ".state"
    state.write_bytes(bytes([value]) * 1000)
    ticket = {"round": value, "state": digest(state)}
    return spool.ask(ticket, state), ticket


def names(spool) -> list[str]:
    return sorted(path.name for path in spool.folder.iterdir())


def test_a_request_and_its_answer(spool):
    key, ticket = asked(spool)
    assert spool.requests() == [key] == [key_of(ticket)]
    assert spool.ticket(key) == ticket
    assert spool.answer(key) is None
    spool.tell(key, {"step": 3})
    assert spool.progress(key) == {"step": 3}
    update = spool.folder / ".update"
    update.write_bytes(b"x" * 100)
    spool.give(key, {"samples": 4}, update)
    answer = spool.answer(key)
    assert (answer.facts, answer.reason) == ({"samples": 4}, None)
    assert answer.update.read_bytes() == b"x" * 100
    assert spool.requests() == []
    assert spool.progress(key) == {}
    spool.withdraw(key)
    assert names(spool) == [f"{key}{DONE}", f"{key}{UPDATE}"]
    spool.forget()
    assert names(spool) == []


def test_the_same_request_is_asked_once_and_another_one_is_another(spool):
    key, _ = asked(spool)
    before = spool.file(key, REQUEST).stat().st_mtime_ns
    assert asked(spool)[0] == key
    assert spool.file(key, REQUEST).stat().st_mtime_ns == before
    other, _ = asked(spool, 2)
    assert spool.requests() == [key, other]
    spool.withdraw_all(but={other})
    assert names(spool) == sorted([f"{other}{REQUEST}", f"{other}{STATE}"])


def test_a_failure_has_its_reason(spool):
    key, _ = asked(spool)
    spool.fail(key, "no such flag", refused=True)
    answer = spool.answer(key)
    assert (answer.reason, answer.refused, answer.update) == ("no such flag", True, None)
    assert not spool.requests()


def test_a_ticket_that_was_changed_is_refused(spool):
    key, ticket = asked(spool)
    for text in (json.dumps({**ticket, "key": key, "round": 2}), "{", "[]"):
        spool.file(key, REQUEST).write_text(text)
        with pytest.raises(InputError, match=rf"{key}\.req"):
            spool.ticket(key)


def test_any_flipped_bit_of_an_answer_is_found(spool):
    key, _ = asked(spool)
    for kind, answer in (
        (DONE, lambda: spool.give(key, {"samples": 4})),
        (FAILED, lambda: spool.fail(key, "because")),
    ):
        answer()
        whole = spool.file(key, kind).read_bytes()
        meant = spool.answer(key)
        for place in range(len(whole)):
            for bit in (1, 4, 32):
                changed = bytearray(whole)
                changed[place] ^= bit
                spool.file(key, kind).write_bytes(changed)
                with pytest.raises(InputError):
                    spool.answer(key)
        spool.file(key, kind).write_bytes(whole)
        assert spool.answer(key) == meant
        spool.reject(key)


def test_a_file_that_was_cut_or_changed_or_is_gone_is_refused(spool):
    key, _ = asked(spool)
    update = spool.folder / ".update"
    update.write_bytes(b"x" * 100)
    spool.give(key, {}, update)
    file = spool.file(key, UPDATE)
    for data, message in ((b"x" * 99, "99 bytes, expected 100"), (b"x" * 99 + b"y", "SHA-256")):
        file.write_bytes(data)
        with pytest.raises(InputError, match=f"the answer of site a, .*{message}"):
            spool.answer(key)
    file.unlink()
    with pytest.raises(InputError, match="there is no such file"):
        spool.answer(key)


def test_other_files_are_let_be(spool):
    key, _ = asked(spool)
    for name in (".lock", "alive", "notes.txt", f"x{REQUEST}", f"{key[:-1]}{DONE}"):
        (spool.folder / name).write_text("x")
    assert spool.requests() == [key]
    spool.forget()
    spool.withdraw_all()
    assert len(names(spool)) == 5


def test_progress_that_cannot_be_read_is_none(spool):
    key, _ = asked(spool)
    spool.file(key, PROGRESS).write_text("{")
    assert spool.progress(key) == {}
