"""The board: a line when a site's state changes, and all of them in a file."""

from __future__ import annotations

import json

from fed.remote.board import Board


def test_a_line_for_each_change(tmp_path, capsys):
    board = Board(tmp_path / "sites.json", ["a", "b"])
    steps = {"step": 1, "steps": 9, "total": 10, "loss": 0.25}
    for carried, asked, progress in (
        ({"a": "away: no such host", "b": "connected"}, {"b": "round 2"}, {}),
        ({"a": "connected", "b": "connected"}, {"b": "round 2"}, {"b": steps}),
        ({"a": "connected", "b": "connected"}, {"b": "round 2"}, {"b": {**steps, "step": 2}}),
        ({"a": "connected", "b": "connected"}, {}, {}),
    ):
        board.show(carried, asked, progress)
        board.show(carried, asked, progress)
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("site a: away: no such host, since ")
    assert lines[1:] == [
        "site b: connected",
        "site a: waiting",
        "site b: at work on round 2: step 1/9 loss 0.2500",
        "site b: waiting",
    ]
    rows = json.loads((tmp_path / "sites.json").read_text())
    assert {name: row["state"] for name, row in rows.items()} == {"a": "waiting", "b": "waiting"}


def test_the_file_has_the_step(tmp_path):
    board = Board(tmp_path / "sites.json", ["b"])
    for step in (1, 2):
        board.show({"b": "connected"}, {"b": "round 2"}, {"b": {"step": step, "steps": 9}})
    row = json.loads((tmp_path / "sites.json").read_text())["b"]
    row.pop("since")
    assert row == {"state": "at work", "asked": "round 2", "step": 2, "steps": 9}
