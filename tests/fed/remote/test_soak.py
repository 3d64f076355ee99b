"""A run of real processes under faults at random; `pytest -m soak` alone runs it."""

from __future__ import annotations

import os
import random
import signal
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest

pytest.importorskip("nvflare", reason="the extra `remote` is not installed")

from fed.train import train
from tests.conftest import make_data, make_llm, make_vision_tower
from tests.fed.drivers.test_remote import records, weights
from tests.fed.remote.rig import SITES
from tests.fed.remote.sites import clients_yaml, rounds_of, start_run


@pytest.fixture(scope="module")
def wide(tmp_path_factory) -> Path:
    """A model whose projector is a file of some pieces, with the data of sites a and b."""
    folder = tmp_path_factory.mktemp("wide")
    make_vision_tower(folder / "vision_tower")
    make_llm(folder / "llm", 768)
    entries = []
    for name, samples in (("a", 12), ("b", 9)):
        data = make_data(folder, name, samples, seed=samples)
        entries.append(
            {"name": name, "data_path": str(data), "image_folder": str(folder / "images")}
        )
    clients_yaml(folder, *entries)
    return folder


def faults_of(rig, line, luck: random.Random) -> dict[str, Callable[[], None]]:
    """What befalls a run, by name, in an order of its own."""

    def restart(name: str) -> None:
        rig.kill(name)
        time.sleep(luck.choice([0, 3]))
        rig.start(name)

    def kill_job(kit: str) -> None:
        rig.wait(lambda: rig.job(kit), f"a job of {kit}")
        if (pid := rig.job(kit)) is not None:
            os.kill(pid, signal.SIGKILL)

    def cut(state: str, seconds: float) -> None:
        line.cut(state)
        time.sleep(seconds)
        line.mend()

    def cut_in_a_file() -> None:
        """Close all connections once some more of a state or an update has passed."""
        line.cut_at = line.carried + luck.randrange(5_000_000)
        rig.wait(lambda: line.state == "closed", "the line is cut")
        time.sleep(3)
        line.mend()

    faults: dict[str, Callable[[], None]] = {
        **{f"kill {name}": partial(restart, name) for name in ("server", "driver", *SITES)},
        **{f"kill the job of {kit}": partial(kill_job, kit) for kit in ("localhost", *SITES)},
        **{f"{state} for 5 s": partial(cut, state, 5) for state in ("closed", "silent")},
        **{f"{state} for 90 s": partial(cut, state, 90) for state in ("closed", "silent")},
        **{f"cut in a file, {which}": cut_in_a_file for which in ("once", "twice")},
    }
    return dict(luck.sample(list(faults.items()), len(faults)))


@pytest.mark.slow
@pytest.mark.soak
@pytest.mark.parametrize("seed", [1, 2, 3])
def test_random_kills_and_cuts_change_nothing(rig, line, flags, wide, seed):
    """Whatever is killed and wherever the line is cut, the run ends in the bits of a calm one.

    A round is to end after each fault; jobs are renewed meanwhile, after some rounds.
    """
    luck = random.Random(seed)
    faults = faults_of(rig, line, luck)
    common = {
        "model_name_or_path": wide / "llm",
        "vision_tower": wide / "vision_tower",
        "fed_rounds": 2 * len(faults) + 2,
        "fed_method": "scaffold",
        "fed_one_pass": False,
        "num_train_epochs": 2,
        "save_strategy": "steps",
        "save_steps": 3,
    }
    calm = wide / "calm"  # the same for all seeds
    if not (calm / "config.json").exists():
        train(flags(fed_clients=wide / "sites.yaml", output_dir=calm, **common))

    output = start_run(rig, flags, wide, fed_job_gb=0.05, **common)
    rig.wait(lambda: rounds_of(output), "the first round")
    for name, fault in faults.items():
        time.sleep(luck.uniform(0, 3))
        before = rounds_of(output)
        print(f"{time.ctime()} after round {before}: {name}", flush=True)
        fault()
        assert not rig.done(), "the run is too short for its faults"
        rig.wait(lambda before=before: rounds_of(output) > before, f"a round after: {name}")
    rig.wait(rig.done, "the end of the run")
    assert weights(output) == weights(calm) != {}
    found, expected = records(output), records(calm)
    assert [round["clients"] for round in found] == [round["clients"] for round in expected]


@pytest.mark.slow
@pytest.mark.soak
def test_jobs_are_renewed_in_the_middle_of_a_run(rig, flags, tiny):
    """Each job ends once it has carried a file, so that a round needs several of each site."""
    common = {"fed_rounds": 2, "fed_one_pass": False}
    here = rig.folder / "resident"
    train(flags(fed_clients=tiny / "clients.yaml", output_dir=here, **common))
    there = start_run(rig, flags, tiny, fed_job_gb=0, **common)
    rig.wait(rig.done, "the end of the run")
    assert weights(there) == weights(here) != {}
    for site in SITES:  # FLARE has kept a folder of each job; a file went down and up each round
        assert len([*(rig.folder / "kits" / site).glob("*-*-*-*-*")]) >= 4
        (own,) = (rig.folder / f"work-{site}" / "runs").iterdir()  # the last file is taken, too
        assert weights(own) == weights(here)
