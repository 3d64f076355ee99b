"""SIGKILL at random instructions of a run, with real processes: the end is the same to the bit.

One process imports everything once and forks a child per run. The child counts events (a step of
training, a call of the method, the start, middle and end of every write) and kills itself with
SIGKILL when the count reaches a drawn number, with the file at hand half written where it is a
write's middle. Then the same command is started again, killed again, and at last left to finish.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest

from fed.server.round_state import RoundState
from fed.state import fingerprint

RUNNER = r"""
import functools, io, json, os, random, signal, sys

import torch
import fed.methods
import fed.server.loop
import fed.train
from llava.train.llava_trainer import LLaVATrainer
from transformers.trainer_callback import TrainerState

events = limit = 0

def event():
    global events
    events += 1
    if events == limit:
        os.kill(os.getpid(), signal.SIGKILL)

def around(owner, name, middle=None):
    original = getattr(owner, name)

    @functools.wraps(original)
    def wrapped(*args, **kwargs):
        event()
        if middle is not None and events + 1 == limit:
            middle(*args, **kwargs)
        event()
        result = original(*args, **kwargs)
        event()
        return result

    setattr(owner, name, wrapped)

def half_of_torch_save(value, target, **kwargs):
    whole = io.BytesIO()
    save(value, whole)
    half = whole.getvalue()[: len(whole.getvalue()) // 2]
    if hasattr(target, "write"):
        target.write(half)
        target.flush()
    else:
        with open(target, "wb") as file:
            file.write(half)

def half_of_state(self, path):
    with open(path, "w") as file:
        file.write('{"global_step": ')

save = torch.save
around(os, "replace")
around(os, "fsync")
around(torch, "save", half_of_torch_save)
around(TrainerState, "save_to_json", half_of_state)
around(LLaVATrainer, "training_step")
around(fed.server.loop.RoundLoop, "_aggregate")

def child(argv, at):
    # Runs the command in a child; returns (killed, events it saw).
    global limit
    reader, writer = os.pipe()
    pid = os.fork()
    if pid == 0:
        limit = at
        os.close(reader)
        torch.set_num_threads(1)
        fed.train.train(argv)
        os.write(writer, str(events).encode())
        os._exit(0)
    os.close(writer)
    seen = os.read(reader, 100)
    os.close(reader)
    _, status = os.waitpid(pid, 0)
    killed = os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGKILL
    assert killed or status == 0, status
    return killed, int(seen or 0)

def runs(argv, folder, count, seed):
    _, total = child([*argv, "--output_dir", f"{folder}/whole"], at=-1)
    rng = random.Random(seed)
    kills = 0
    for run in range(count):
        command = [*argv, "--output_dir", f"{folder}/killed-{run}"]
        for _ in range(2):
            kills += child(command, at=rng.randint(1, total))[0]
        assert child(command, at=-1)[0] is False
    return {"events": total, "kills": kills}

answers = os.fdopen(os.dup(1), "w")
os.dup2(2, 1)  # what the runs print goes to the log
for line in sys.stdin:
    print(json.dumps(runs(*json.loads(line))), file=answers, flush=True)
"""


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """`runs(argv, folder, count, seed)`: a whole run and `count` killed ones; what was counted."""
    log = tmp_path_factory.mktemp("kill") / "log"
    with (
        open(log, "w") as errors,
        subprocess.Popen(
            [sys.executable, "-c", RUNNER],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=errors,
            text=True,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
        ) as runner,
    ):

        def ask(*request):
            runner.stdin.write(json.dumps(request) + "\n")
            runner.stdin.flush()
            answer = runner.stdout.readline()
            assert answer, log.read_text()[-3000:]
            return json.loads(answer)

        yield ask


@pytest.mark.slow
@pytest.mark.parametrize("save_strategy", ["no", "steps"])
@pytest.mark.parametrize(
    ("method", "options"),
    [("fedcmp", ["beta=0.5", "rank=8"]), ("scaffold", ["server_lr=0.9"])],
)
def test_killed_anywhere_and_started_again_ends_in_the_same_bits(
    runs, flags, tiny, tmp_path, method, options, save_strategy
):
    count = 3
    argv = flags(
        fed_clients=tiny / "clients.yaml",
        fed_rounds=3,
        fed_method=method,
        fed_options=options,
        fed_eval_data_path=[tiny / "heldout.json"],
        save_strategy=save_strategy,
        save_steps=1,
        save_total_limit=1,
    )
    at = argv.index("--output_dir")
    del argv[at : at + 2]
    counted = runs(argv, str(tmp_path), count, 0)
    assert counted["events"] > 50
    assert counted["kills"] >= count

    whole = (tmp_path / "whole" / "mm_projector.bin").read_bytes()
    for run in range(count):
        folder = tmp_path / f"killed-{run}"
        assert (folder / "mm_projector.bin").read_bytes() == whole
        assert heldout(folder) == heldout(tmp_path / "whole")
        assert files(folder) == files(tmp_path / "whole")
        assert left_for_later(folder) == left_for_later(tmp_path / "whole")


def files(folder) -> list[str]:
    """What a run leaves in `fed/`: no work of a round, no old file of a client."""
    return sorted(str(p.relative_to(folder)) for p in (folder / "fed").rglob("*") if p.is_file())


def left_for_later(folder) -> dict[str, str]:
    """The method's memory and what clients keep, which the last projector does not show."""
    state = RoundState.load(folder / "fed")
    return {"memory": fingerprint(state.memory)} | {
        name: fingerprint(own) for name, own in state.kept.items()
    }


def heldout(folder) -> list[dict]:
    """What the run measured; the seconds differ, of course."""
    lines = (folder / "rounds.jsonl").read_text().splitlines()
    return [json.loads(line)["heldout"] for line in lines]
