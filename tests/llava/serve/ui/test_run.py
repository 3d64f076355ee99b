"""The plots of real runs and merges."""

from __future__ import annotations

import json
from xml.etree import ElementTree

import gradio
import pytest

from fed.remote.board import Board
from llava.serve.ui import run, run_data


def test_records_of_others_are_one_sentence_and_no_plot(tmp_path):
    for line in ('{"round": 1}', "[]", "3"):
        (tmp_path / "rounds.jsonl").write_text(line + "\n")
        text, *rest = run.seen_in(tmp_path)
        assert text == f"The records in {tmp_path} are not as `fed` writes them."
        assert not any(update["visible"] for update in rest)


def test_a_run_of_one_round_has_bars_in_place_of_lines(recorded):
    rounds, _ = run_data.read(recorded / "fedcmp")
    lines = [plot[2] == "line" for plot in run.PLOTS]

    def visible(rounds):
        updates = run._plotted(rounds, None)
        return [u["visible"] for u in updates[: len(lines)]], [
            u["visible"] for u in updates[len(lines) :]
        ]

    assert visible(rounds) == (lines, [False] * 6)
    only_spectrum = [plot[0] == "direction" for plot in run.PLOTS]
    assert visible(rounds[:1]) == (only_spectrum, [True] * 5 + [False])


def test_a_clients_name_is_text_on_the_page(recorded):
    rounds, _ = run_data.read(recorded / "fedcmp")
    text = json.dumps(rounds).replace('"a"', '"<img src=x>"')
    table = run._cosines(json.loads(text))["value"]
    assert "<img" not in table
    assert "&lt;img src=x&gt;" in table


def test_a_cosine_that_rounds_to_nothing_has_no_sign():
    cosines = [[1.0, -0.001], [-0.001, 1.0]]
    table = run._cosines([{"round": 1, "clients": {"a": {}, "b": {}}, "cosines": cosines}])["value"]
    assert "1.00" in table
    assert table.count(">0.00<") == 2


@pytest.fixture
def board(tmp_path):
    """What the driver keeps of the sites of a run in `tmp_path`, of which no round is finished."""
    (tmp_path / "fed").mkdir()
    return Board(tmp_path / "fed" / "sites.json", ["north", "st-mary", "south"])


def show(board, step: int, north: str = "connected") -> None:
    board.show(
        {"north": north, "st-mary": "connected", "south": "connected"},
        {"north": "round 2", "st-mary": "round 2"},
        {"st-mary": {"step": step, "steps": 90, "total": 100 + step, "loss": 0.25}},
    )


def table_of(update: dict) -> list[list[str]]:
    """The rows of a table, the words of their cells."""
    assert update["visible"]
    body = ElementTree.fromstring(update["value"])
    return [["".join(cell.itertext()) for cell in row] for row in body.findall("tr")]


def test_sites_are_shown_before_a_round_is_finished(tmp_path, board):
    show(board, 9, north="away: no such host")
    text, *plots, sites, _ = run.changed_in(tmp_path, None)
    assert text == "No round is finished yet."
    assert not any(update["visible"] for update in plots)
    head, north, mary, south = table_of(sites)
    assert head == ["Site", "State", "Since"]
    assert north[:2] == ["north", "away: no such host"]
    assert mary[:2] == ["st-mary", "at work on round 2: step 9 of 90, loss 0.2500"]
    assert south[:2] == ["south", "waiting"]
    rows = json.loads((tmp_path / "fed" / "sites.json").read_text())
    assert [row[2] for row in (north, mary, south)] == [row["since"] for row in rows.values()]
    table = ElementTree.fromstring(sites["value"])
    assert table.find("caption").text.startswith("Sites: 1 away, 1 at work, 1 waiting; last change")
    assert {cell.get("scope") for cell in table.iter("th")} == {"col", "row"}


def test_only_what_has_changed_is_drawn_again(recorded, tmp_path, board):
    skipped, records = gradio.skip(), (recorded / "fedcmp" / "rounds.jsonl").read_text()
    *_, before = run.changed_in(tmp_path, None)
    show(board, 9)
    *updates, sites, before = run.changed_in(tmp_path, before)
    assert updates[0] == "No round is finished yet."
    assert "step 9 of 90" in sites["value"]
    assert all(u == skipped for u in run.changed_in(tmp_path, before)[:-1])
    show(board, 10)
    *updates, sites, before = run.changed_in(tmp_path, before)
    assert all(update == skipped for update in updates)
    assert "step 10 of 90" in sites["value"]
    (tmp_path / "rounds.jsonl").write_text(records)
    text, *_, sites, before = run.changed_in(tmp_path, before)
    assert "round 2 is finished" in text
    assert sites == skipped
    (tmp_path / "fed" / "sites.json").unlink()
    *_, sites, _ = run.changed_in(tmp_path, before)
    assert sites["visible"] is False


def test_what_sites_say_is_text_on_the_page(tmp_path):
    (tmp_path / "fed").mkdir()
    bad = "<img src=x>&"
    row = {"state": f"at work {bad}", "since": bad, "asked": bad, "step": 1, "steps": 2}
    (tmp_path / "fed" / "sites.json").write_text(json.dumps({bad: row}))
    assert table_of(run.sites_in(tmp_path))[1] == [
        bad, f"at work {bad} on {bad}: step 1 of 2", bad
    ]  # fmt: skip


def test_sites_that_cannot_be_read_are_one_sentence_and_the_plots_stay(recorded, tmp_path):
    file = tmp_path / "<fed>" / "fed" / "sites.json"
    file.parent.mkdir(parents=True)
    (file.parents[1] / "rounds.jsonl").write_text(
        (recorded / "fedcmp" / "rounds.jsonl").read_text()
    )
    file.write_text('{"north": {"state": "wai')
    text, *plots, _, sites, _ = run.changed_in(file.parents[1], None)
    assert "round 2 is finished" in text
    assert any(update["visible"] for update in plots)
    said = ElementTree.fromstring(sites["value"])
    assert said.text == f"{file} is not as `fed` writes it."


def test_the_agreement_of_many_clients_says_what_it_is(recorded):
    rounds, _ = run_data.read(recorded / "fedcmp")
    agreement = [plot[1] for plot in run.PLOTS].index("cosine")
    assert run._plotted(rounds, None)[agreement]["y_title"] == run.PLOTS[agreement][-1]
    for record in rounds:
        record |= {"cosines": None, "to_mean": [0.5, None]}
    shown = run._plotted(rounds, None)
    assert shown[agreement]["y_title"] == run.WITH_MEAN
    assert list(shown[agreement]["value"]["of"]) == ["a", "a"]
    assert not run._cosines(rounds)["visible"]
    bars = run._plotted(rounds[:1], None)[len(run.PLOTS) + agreement]
    assert bars["y_title"] == run.WITH_MEAN
