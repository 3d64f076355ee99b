from __future__ import annotations

import json

import pytest
from PIL import Image

from fed.report import RunRecords, main, reliability_table, rows_of, table
from llava.errors import InputError


def measures(loss, exact, **domains):
    of_domains = {d: {"samples": 2, "loss": v, "exact": v / 10} for d, v in domains.items()}
    return {"samples": 4, "loss": loss, "exact": exact, "domains": of_domains}


def write_run(folder, heldouts, clients=("a", "b")):
    folder.mkdir(parents=True)
    records = [
        {
            "round": i + 1,
            "clients": {name: {"samples": 3, "loss": 1.0} for name in clients},
            "cosines": [[1.0 if a == b else -0.25 for a in clients] for b in clients],
            "heldout": heldout,
        }
        for i, heldout in enumerate(heldouts)
    ]
    (folder / "rounds.jsonl").write_text("".join(json.dumps(r) + "\n" for r in records))


@pytest.fixture
def runs(tmp_path):
    shared = [{"global": {"test": measures(v, 0.1, cats=v, dogs=1.0)}} for v in (2.0, 1.5)]
    write_run(tmp_path / "fed", shared)
    alone = {name: {"test": measures(3.0, 0.0, cats=3.0)} for name in "ab"}
    write_run(tmp_path / "alone", [alone])
    write_run(tmp_path / "pool", [{"global": {"test": measures(0.5, 0.75)}}], clients=("pool",))
    return tmp_path


def test_rows_and_table(runs):
    loaded = [RunRecords.load(n, runs / f) for n, f in (("Alone", "alone"), ("Fed", "fed"))]
    rows = rows_of(loaded)
    assert [row["model"] for row in rows] == ["a, Alone", "b, Alone", "Fed"]
    assert rows[2]["measures"]["test"]["loss"] == 1.5  # the last round's
    text = table(rows, ["test"])
    assert "| Fed      |      1.500 |      10.0 % |" in text
    assert "| Fed      | 15.0 % | 10.0 % |" in text  # per domain, cats and dogs
    assert "| a, Alone | 30.0 % |      – |" in text


def test_the_command_writes_everything(runs, capsys):
    out = runs / "report"
    names = [f"{name}={runs / name}" for name in ("alone", "fed", "pool")]
    main(["--runs", *names, "--output", str(out), "--title", "A title", "--note", "A note."])
    printed = capsys.readouterr().out
    assert printed.startswith("# A title\n\nA note.\n")
    assert "pool" in printed
    assert (out / "report.md").read_text() == printed
    assert len(json.loads((out / "report.json").read_text())["rows"]) == 4
    for name in ("loss.png", "cosines.png"):
        with Image.open(out / name) as picture:
            colours = picture.convert("RGB").getcolors(1 << 24)
            assert min(picture.size) > 200
            assert len(colours) > 20


@pytest.mark.parametrize("name", ["model", "run", "personal", "measures"])
def test_a_held_out_file_may_be_called_as_a_key_of_a_row(tmp_path, name):
    write_run(tmp_path / "fed", [{"global": {name: measures(2.0, 0.5, cats=1.0)}}])
    main(["--runs", f"Fed={tmp_path / 'fed'}", "--output", str(tmp_path / "report")])
    (row,) = json.loads((tmp_path / "report/report.json").read_text())["rows"]
    assert (row["model"], row["run"], row["personal"]) == ("Fed", "Fed", False)
    assert row["measures"][name]["loss"] == 2.0
    text = (tmp_path / "report/report.md").read_text()
    assert f"| model | {name}: loss | {name}: exact |" in text
    assert f"Caption loss per domain, {name}:" in text


@pytest.mark.parametrize("content", [None, "", "{", "[1"])
def test_folders_that_hold_no_run(tmp_path, content):
    if content is not None:
        (tmp_path / "rounds.jsonl").write_text(content)
    with pytest.raises(InputError, match="rounds.jsonl"):
        RunRecords.load("x", tmp_path)


def test_what_clients_pictures_explain_is_a_table(tmp_path):
    told = [{"a": 0.5, "b": 0.1}, {"a": 0.75, "c": 1.0}]
    write_run(tmp_path / "fed", [{"global": {"test": measures(2.0, 0.5)}}] * 2)
    file = tmp_path / "fed" / "rounds.jsonl"
    records = [json.loads(line) for line in file.read_text().splitlines()]
    assert "reliability" not in reliability_table([RunRecords("Fed", records)])
    records = [{**record, "reliability": told[i]} for i, record in enumerate(records)]
    text = reliability_table([RunRecords("Fed", records)])
    assert "| reliability  |    b |    a |     c |" in text
    assert "| Fed, round 1 | 10 % | 50 % |     – |" in text
    assert "| Fed, round 2 |    – | 75 % | 100 % |" in text
    once = reliability_table([RunRecords("Fed", records[:1])])
    assert once.count("Fed, round") == 1
    many = {f"c{i:02}": i / 100 for i in range(1, 40)}
    text = reliability_table([RunRecords("Fed", [{**records[0], "reliability": many}])])
    assert "the 12 lowest" in text
    assert "c12" in text
    assert "c13" not in text
