"""Sites that train in private, because the run says so or because they themselves do."""

from __future__ import annotations

import json

import pytest

from fed.train import train
from tests.fed.remote.sites import clients_yaml, end, site_yaml, start

PRIVATE = {"fed_dp_epsilon": 8, "fed_dp_delta": 1e-6, "fed_dp_clip": 0.5}


@pytest.mark.slow
def test_what_a_site_insists_on_holds_and_what_the_run_asks_for_too(flags, tiny, tmp_path):
    strict = {"flags": {**PRIVATE, "fed_dp_epsilon": 2}}
    spools = tmp_path / "*" / "fed" / "spool"
    sites = [
        start("fed.site", str(site_yaml(tmp_path, tiny, name, spools, **own)),
              log=tmp_path / f"{name}.log")
        for name, own in (("a", {}), ("b", strict))
    ]  # fmt: skip
    try:
        clients = clients_yaml(tmp_path, {"name": "a"}, {"name": "b"})
        common = {"fed_clients": clients, "fed_rounds": 2, "fed_driver": "remote",
                  "fed_courier": "folder"}  # fmt: skip
        open_run, private_run = tmp_path / "open", tmp_path / "private"
        train(flags(**common, output_dir=open_run))
        train(flags(**common, **PRIVATE, output_dir=private_run))
    finally:
        end(sites)
    for output, silent in ((open_run, {"b"}), (private_run, {"a", "b"})):
        rounds = [json.loads(line) for line in (output / "rounds.jsonl").read_text().splitlines()]
        assert len(rounds) == 2
        for record in rounds:
            told = record["clients"]
            assert {n for n in told if "loss" not in told[n] and "seconds" not in told[n]} == silent
        assert not list(output.rglob("noise"))  # the secrets never were there
        run = json.loads((output / "fed" / "run.json").read_text())["run"]
        for name in "ab":
            folder = tmp_path / f"work-{name}" / "runs" / run
            assert (folder / "mm_projector.bin").exists()
            assert not (folder / "noise").exists()  # it went when the run was over
            assert (folder / "README.md").exists() is (name in silent)
    assert not (open_run / "privacy.json").exists()
    stated = json.loads((private_run / "privacy.json").read_text())["guarantees"]
    assert {name: of["records"] for name, of in stated.items()} == {"a": 12, "b": 9}
    assert "client a is private: epsilon 8 " in (tmp_path / "a.log").read_text()
    assert "client b is private: epsilon 2 " in (tmp_path / "b.log").read_text()
    assert "client b is private: epsilon 8 " not in (tmp_path / "b.log").read_text()
