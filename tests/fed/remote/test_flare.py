"""The courier between machines: FLARE's server, sites and jobs as processes, killed and cut."""

from __future__ import annotations

import re

import pytest

pytest.importorskip("nvflare", reason="the extra `remote` is not installed")

from fed.train import train
from tests.fed.drivers.test_remote import weights
from tests.fed.remote.sites import is_at_work, rounds_of, start_run


def test_sites_end_in_the_bits_of_a_resident_run_through_kills(rig, flags, tiny, tmp_path):
    """Two rounds of `fed.train`; a site and the server are killed while they are needed."""
    common = {"fed_rounds": 2, "fed_one_pass": False, "num_train_epochs": 12}
    here = tmp_path / "resident"
    train(flags(fed_clients=tiny / "clients.yaml", output_dir=here, **common))

    there = start_run(rig, flags, tiny, **common)
    spool = there / "fed" / "spool"
    rig.wait(lambda: is_at_work(spool / "a"), 90, "site a is at work")
    rig.kill("a")
    rig.start("a")
    rig.wait(lambda: rounds_of(there) == 1, 90, "the first round")
    rig.kill("server")
    rig.start("server")
    rig.wait(rig.done, 90, "the end of the run")
    assert weights(there) == weights(here) != {}
    # Nothing of the records or their pictures has come to the server.
    for folder in (tmp_path / "kits/localhost", spool):
        for file in folder.rglob("*"):
            if file.is_file():
                assert not re.search(
                    rb"a (red|green|blue) picture|[ab]-\d+\.png", file.read_bytes()
                )
