from __future__ import annotations

import dataclasses
import hashlib
import json

import pytest
import torch

from fed.server.client_states import ClientStates
from fed.server.records import Records
from fed.server.round_state import RoundState
from llava.errors import InputError


def one(value: float) -> dict[str, torch.Tensor]:
    return {"w": torch.tensor([value, value])}


def files(folder) -> list[str]:
    return sorted(path.name for path in folder.rglob("*") if path.is_file())


def test_a_state_comes_back_as_it_was(tmp_path):
    state = RoundState.first(tmp_path, one(1.0), {"--seed": "1"}, Records(tmp_path).mark)
    state.save(tmp_path)
    kept = state.kept.after(2, ["a"])
    kept.write("a", one(7.0))
    later = dataclasses.replace(
        state, round=2, kept=kept, memory={"w.m": torch.ones(1)}, last={"a": 2}
    )
    later.save(tmp_path)
    found = RoundState.load(tmp_path)
    assert (found.round, found.settings, found.last) == (2, {"--seed": "1"}, {"a": 2})
    assert found.records == state.records
    assert torch.equal(found.shared["w"], one(1.0)["w"])
    assert torch.equal(found.memory["w.m"], torch.ones(1))
    assert list(found.kept) == ["a"]
    assert torch.equal(found.kept["a"]["w"], one(7.0)["w"])
    assert dict(found.personal) == {}


def test_only_what_changed_is_written_and_counts_with_the_round(tmp_path):
    states = ClientStates(tmp_path).after(1, "abc")
    for i, name in enumerate("abc"):
        states.write(name, one(i))
    later = states.after(2, "b")
    later.write("b", one(8.0))  # the run may be killed here: both are there
    assert [float(states[n]["w"][0]) for n in "abc"] == [0, 1, 2]
    assert [float(later[n]["w"][0]) for n in "abc"] == [0, 8, 2]
    later.remove_others()
    assert files(tmp_path) == ["a.0001.safetensors", "b.0002.safetensors", "c.0001.safetensors"]


def test_the_file_of_another_client_is_refused(tmp_path):
    states = ClientStates(tmp_path).after(1, "ab")
    for name in "ab":
        states.write(name, one(1.0))
    (tmp_path / "a.0001.safetensors").replace(tmp_path / "b.0001.safetensors")
    with pytest.raises(InputError, match=r"b.0001.safetensors: is of .*'a'.*, expected .*'b'"):
        states["b"]
    with pytest.raises(InputError, match=r"a.0001.safetensors: not a file of this run"):
        states["a"]


def test_records_behind_the_mark_are_cut_off(tmp_path):
    records = Records(tmp_path)
    records.add({"round": 1}, write=True)
    mark = records.mark
    records.add({"round": 2}, write=True)  # and then the run is killed
    (tmp_path / "rounds.jsonl").unlink()  # and somebody takes the copy away
    records = Records(tmp_path)
    records.resume(mark, write=True)
    records.add({"round": 2, "again": True}, write=True)
    lines = (tmp_path / "rounds.jsonl").read_text()
    assert [json.loads(line) for line in lines.splitlines()] == [
        {"round": 1},
        {"round": 2, "again": True},
    ]
    assert (tmp_path / "fed/rounds.jsonl").read_text() == lines
    assert records.mark["sha256"] == hashlib.sha256(lines.encode()).hexdigest()


@pytest.mark.parametrize("change", ["", '{"round": 9}\n'])
def test_records_that_somebody_changed_are_refused(tmp_path, change):
    records = Records(tmp_path)
    records.add({"round": 1}, write=True)
    (tmp_path / "fed/rounds.jsonl").write_text(change)
    with pytest.raises(InputError, match="not those that were written"):
        Records(tmp_path).resume(records.mark, write=True)


def test_the_copy_of_the_records_is_mended(tmp_path):
    records = Records(tmp_path)
    records.add({"round": 1}, write=True)
    (tmp_path / "rounds.jsonl").write_text("notes\n")
    records.add({"round": 2}, write=True)
    assert (tmp_path / "rounds.jsonl").read_text() == (tmp_path / "fed/rounds.jsonl").read_text()
