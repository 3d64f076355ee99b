"""The records of real runs and merges, as rows of plots."""

from __future__ import annotations

import json

import pytest

from fed.remote.board import Board
from fed.train import train
from llava.serve.ui import run, run_data
from llava.serve.ui.worker_client import PageError


def test_a_runs_records_become_plots(recorded):
    rounds, none = run_data.read(recorded / "fedcmp")
    assert none is None
    assert len(rounds) == 2
    losses = run_data.client_losses(rounds)
    assert [(row["round"], row["of"]) for row in losses] == [(1, "a"), (1, "b"), (2, "a"), (2, "b")]
    assert losses[3]["loss"] == rounds[1]["clients"]["b"]["loss"]
    held = run_data.heldout_losses(rounds)
    assert {row["of"] for row in held} == {"global on heldout"}
    assert len(held) == 2
    explained = run_data.explained_shares(rounds)
    assert [row["explained share"] for row in explained] == [
        record["heldout"]["global"]["heldout"]["explained"] for record in rounds
    ]
    reliable = run_data.reliabilities(rounds)
    assert [row["of"] for row in reliable] == ["a", "b"] * 2
    assert reliable[3]["reliability"] == rounds[1]["reliability"]["b"]
    agreed = run_data.agreements(rounds)
    assert agreed[0]["cosine"] == rounds[0]["cosines"][0][1]
    assert len(agreed) == 4
    spectrum = [row for row in run_data.spectrum(rounds) if row["of"] == "layer 2"]
    assert [row["share"] for row in spectrum] == (
        rounds[1]["facts"]["layers"]["model.mm_projector.2"]["spectrum"]
    )
    alone = run_data.heldout_losses(run_data.read(recorded / "local")[0])
    assert {row["of"] for row in alone} == {"a on heldout", "b on heldout"}


def test_a_run_of_secure_sums_has_plots_of_what_is_known(recorded, flags, tiny, tmp_path):
    sums = {"fed_secure": True, "fed_secure_min": 2, "fed_eval_data_path": tiny / "heldout.json"}
    train(
        flags(fed_clients=tiny / "clients.yaml", output_dir=tmp_path, fed_method="fedcmp", **sums)
    )
    rounds, none = run_data.read(tmp_path)
    assert none is None
    assert len(run_data.heldout_losses(rounds)) == 1
    assert run_data.spectrum(rounds)
    for plot in (run_data.client_losses, run_data.reliabilities, run_data.agreements):
        assert plot(rounds) == []
    assert "no client's loss or update is known here" in run.seen_in(tmp_path)[0]


def test_a_merges_weights_become_plots(recorded):
    none, facts = run_data.read(recorded / "merge")
    assert none == []
    assert run_data.experts(facts) == ["a", "b"]
    rows = run_data.layer_weights(facts)
    said = facts["method_facts"]["layers"]["model.mm_projector.0"]["alpha"]
    assert [row["weight"] for row in rows if row["layer"] == "layer 0"] == said
    facts["method_facts"], facts["experts"][1]["weight"] = {}, 3.0
    assert [row["weight"] for row in run_data.layer_weights(facts)] == [0.25, 0.75] * 2
    facts["experts"][1]["path"] = facts["experts"][0]["path"].replace("local", "other")
    assert run_data.experts(facts) == ["local/clients/a", "other/clients/a"]


def test_a_line_that_is_being_written_waits_for_its_end(recorded, tmp_path):
    text = (recorded / "fedcmp" / "rounds.jsonl").read_text()
    file = tmp_path / "rounds.jsonl"
    file.write_text(text[: len(text) - 30])
    before = run_data.stamp(tmp_path)
    assert len(run_data.read(tmp_path)[0]) == 1
    file.write_text(text)
    assert len(run_data.read(tmp_path)[0]) == 2
    assert run_data.stamp(tmp_path) != before


def test_a_folder_that_is_no_run_is_said_in_one_sentence(tmp_path):
    with pytest.raises(PageError, match="neither rounds.jsonl nor merge.json"):
        run_data.read(tmp_path)
    (tmp_path / "rounds.jsonl").write_text("rounds\n")
    with pytest.raises(PageError, match="are not JSON"):
        run_data.read(tmp_path)


def test_the_agreement_of_many_clients_is_with_their_mean(recorded):
    rounds, _ = run_data.read(recorded / "fedcmp")
    assert not run_data.compared_with_mean(rounds)
    rounds[1] |= {"cosines": None, "to_mean": [0.5, None]}
    assert run_data.compared_with_mean(rounds)
    assert run_data.agreements(rounds) == [{"round": 2, "cosine": 0.5, "of": "a"}]


def test_sites_are_as_the_driver_has_written_them(tmp_path):
    assert run_data.sites(tmp_path) is None
    (tmp_path / "fed").mkdir()
    before = run_data.sites_stamp(tmp_path), run_data.stamp(tmp_path)
    steps = {"step": 1, "steps": 9, "total": 10, "loss": 0.25}
    board = Board(tmp_path / "fed" / "sites.json", ["a", "b"])
    board.show({"a": "away: no such host", "b": "connected"}, {"b": "round 2"}, {"b": steps})
    (a, b), _ = run_data.sites(tmp_path)
    assert (a.pop("since"), b.pop("since")) > ("2000", "2000")
    assert a == {"site": "a", "state": "away: no such host"}
    assert b == {
        "site": "b", "state": "at work", "asked": "round 2", "step": 1, "steps": 9, "loss": 0.25
    }  # fmt: skip
    assert run_data.sites_stamp(tmp_path) != before[0]
    assert run_data.stamp(tmp_path) != before[1]
    assert run_data.read(tmp_path) == ([], None)


def test_numbers_that_are_none_are_left_out(tmp_path):
    row = {"state": "at work", "since": "", "asked": 3, "step": "1", "loss": float("nan")}
    (tmp_path / "fed").mkdir()
    (tmp_path / "fed" / "sites.json").write_text(json.dumps({"a": row}))
    (site,), _ = run_data.sites(tmp_path)
    assert site == {"site": "a", "state": "at work", "since": ""}


def test_sites_that_fed_has_not_written_are_one_sentence(tmp_path):
    whole = json.dumps({"a": {"state": "waiting", "since": "2026-01-01 12:00:00", "asked": None}})
    cut = [whole[:length] for length in range(0, len(whole), 7)]
    rows = ["[]", "3", '{"a": 3}', '{"a": {}}', '{"a": {"state": 1, "since": ""}}']
    half = json.dumps({"a": {"state": "away: \ud83d", "since": ""}})
    (tmp_path / "fed").mkdir()
    for text in (*cut, *rows, half, "[" * 100_000):
        (tmp_path / "fed" / "sites.json").write_text(text)
        with pytest.raises(PageError, match=r"sites\.json is not as `fed` writes it\.$"):
            run_data.sites(tmp_path)
    (tmp_path / "fed" / "sites.json").write_text(whole)
    assert len(run_data.sites(tmp_path)[0]) == 1
