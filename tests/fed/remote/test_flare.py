"""The courier between machines: FLARE's server, sites and jobs as processes, killed and cut."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys

import pytest

pytest.importorskip("nvflare", reason="the extra `remote` is not installed")

from fed.remote.site_yaml import read_site
from fed.site.held import Held
from fed.state import load
from fed.train import train
from tests.conftest import assert_moved_alike
from tests.fed.drivers.test_remote import weights
from tests.fed.remote.rig import ROOT, SITES
from tests.fed.remote.sites import is_at_work, rounds_of, site_yaml, start_run


def test_sites_end_in_the_bits_of_a_resident_run_through_kills(rig, flags, tiny, tmp_path):
    """Two rounds of `fed.train`; a site and the server are killed while they are needed."""
    common = {"fed_rounds": 2, "fed_one_pass": False, "num_train_epochs": 12}
    here = tmp_path / "resident"
    train(flags(fed_clients=tiny / "clients.yaml", output_dir=here, **common))

    there = start_run(rig, flags, tiny, **common)
    spool = there / "fed" / "spool"
    rig.wait(lambda: is_at_work(spool / "a"), "site a is at work")
    rig.kill("a")
    rig.start("a")
    rig.wait(lambda: rounds_of(there) == 1, "the first round")
    rig.kill("server")
    rig.start("server")
    rig.wait(rig.done, "the end of the run")
    assert weights(there) == weights(here) != {}
    # Nothing of the records or their pictures has come to the server.
    for folder in (tmp_path / "kits/localhost", spool):
        for file in folder.rglob("*"):
            if file.is_file():
                assert not re.search(
                    rb"a (red|green|blue) picture|[ab]-\d+\.png", file.read_bytes()
                )


def test_sums_alone_come_through_kills(rig, flags, tiny, tmp_path):
    """Two sites in secure sums: one is killed in a sum, the driver in another."""
    configs = {n: read_site(site_yaml(tmp_path, tiny, n, tmp_path)) for n in SITES}
    keys = {name: Held.public_key(config) for name, config in configs.items()}
    of_site = {
        name: {"secure_min": 2, "trust": {n: k for n, k in keys.items() if n != name}}
        for name in SITES
    }
    common = {"fed_rounds": 2, "fed_method": "fedavgm", "learning_rate": 1e-2}
    sums = {"fed_secure": True, "fed_secure_min": 2}
    there = start_run(rig, flags, tiny, of_site, **common, **sums)

    def summing(round: int):  # or past it, where the look came late
        return list(there.glob(f"fed/round-{round:04d}/sum-0/*.json")) or rounds_of(there) >= round

    rig.wait(lambda: summing(1), "a sum of the first round")
    rig.kill("a")
    rig.start("a")
    rig.wait(lambda: summing(2), "a sum of the second round")
    rig.kill("driver")
    rig.start("driver")
    rig.wait(rig.done, "the end of the run")
    runs = {"open": {}, "still": {"learning_rate": 0}}
    for name, changes in runs.items():
        out = tmp_path / name
        train(flags(fed_clients=tiny / "clients.yaml", output_dir=out, **{**common, **changes}))
    ends = [load(folder / "mm_projector.bin") for folder in (there, *map(tmp_path.joinpath, runs))]
    assert_moved_alike(*ends, 0.01)


def test_a_running_server_refuses_second_processes_and_withdrawn_sites(rig, tmp_path):
    """A second process with the kit of site a waits; site b, which is connected, is withdrawn."""

    def registered(name: str) -> int:
        log = tmp_path / name / "flare.log"
        return log.exists() and log.read_text().count("Successfully registered client")

    for name in ("server", *SITES):
        rig.start(name)
    rig.wait(lambda: all(map(registered, SITES)), "both sites are connected")
    shutil.copytree(tmp_path / "kits/a", tmp_path / "two/kits/a")  # as on another machine
    rig.launch("second", "tests.fed.remote.rig", "a", str(tmp_path / "two"))
    withdraw = ["-m", "fed.remote.kits", "--withdraw", "b", "--output", str(tmp_path / "kits")]
    said = subprocess.run([sys.executable, *withdraw], cwd=ROOT, stdout=subprocess.PIPE, text=True)
    assert said.stdout == (
        "b is withdrawn: the server refuses it from now on; take it out of clients.yaml\n"
    )

    def says(name: str, text: str) -> None:
        log = tmp_path / f"{name}.log"
        rig.wait(lambda: text in log.read_text(), f"{name} says: {text}")

    says("second", "site a: another process with this kit is, or was just now, at the server")
    says("b", "site b: the coordinator has withdrawn this site; the server refuses it")
    assert "another process" not in (tmp_path / "a.log").read_text()
    assert registered("a") == 1
