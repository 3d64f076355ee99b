"""The plots of real runs and merges."""

from __future__ import annotations

import json

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

    assert visible(rounds) == (lines, [False] * 4)
    only_spectrum = [plot[0] == "direction" for plot in run.PLOTS]
    assert visible(rounds[:1]) == (only_spectrum, [True, True, True, False])


def test_a_clients_name_is_text_on_the_page(recorded):
    rounds, _ = run_data.read(recorded / "fedcmp")
    text = json.dumps(rounds).replace('"a"', '"<img src=x>"')
    table = run._table(json.loads(text))["value"]
    assert "<img" not in table
    assert "&lt;img src=x&gt;" in table


def test_a_cosine_that_rounds_to_nothing_has_no_sign():
    cosines = [[1.0, -0.001], [-0.001, 1.0]]
    table = run._table([{"round": 1, "clients": {"a": {}, "b": {}}, "cosines": cosines}])["value"]
    assert "1.00" in table
    assert table.count(">0.00<") == 2
