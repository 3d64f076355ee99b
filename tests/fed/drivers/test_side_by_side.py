"""Processes that train clients of their own give what one process gives, to the bit."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from fed.drivers import worker_group
from fed.drivers.resident import ResidentDriver
from fed.server.round_state import RoundState
from fed.state import fingerprint
from fed.train import train
from llava.errors import InputError
from tests.conftest import make_data

ENV = {**os.environ, "OMP_NUM_THREADS": "1"}

# Imports everything once, then forks a child for each line that it reads; a second line with its
# number waits for it.
NURSERY = r"""
import json, os, sys, time
from fed.drivers.resident import ResidentDriver
from llava.errors import InputError
import fed.train

fit = ResidentDriver.fit

def trouble(self, task):
    # Of process WHO, the first task of round 2 leaves MARK, and then waits to be killed, or fails.
    if task.round == 2 and os.environ["WHO"] == rank:
        open(os.environ["MARK"], "w").close()
        if os.environ["FAILS"]:
            raise InputError("no")
        time.sleep(600)
    return fit(self, task)

def answer(value):
    print(json.dumps(value), flush=True)

answer("ready")
for line in sys.stdin:
    order = json.loads(line)
    if isinstance(order, int):
        answer(os.waitstatus_to_exitcode(os.waitpid(order, 0)[1]))
        continue
    pid = os.fork()
    if pid:
        answer(pid)
        continue
    for number, file in ((1, order["stdout"]), (2, order["stderr"])):
        os.dup2(os.open(file, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), number)
    os.environ.update(order["env"])
    rank = os.environ["RANK"]
    if os.environ.get("WHO"):
        ResidentDriver.fit = trouble
    sys.argv[1:] = order["argv"]
    fed.train.main()
    os._exit(0)
"""


class Processes:
    """Real processes with a launcher's environment, forked by one that has imported everything."""

    def __init__(self, nursery: subprocess.Popen, folder: Path):
        self.nursery, self.folder = nursery, folder
        assert self._answer() == "ready"

    def _answer(self):
        return json.loads(self.nursery.stdout.readline())

    def _ask(self, order):
        self.nursery.stdin.write(json.dumps(order) + "\n")
        self.nursery.stdin.flush()
        return self._answer()

    def start(self, argv: list[str], size: int = 2, **env: str) -> list[int]:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = str(free.getsockname()[1])
        env |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "WORLD_SIZE": str(size)}
        orders = [
            {
                "argv": argv,
                "env": {**env, "RANK": str(rank), "LOCAL_RANK": str(rank)},
                **{name: str(self.folder / f"{name}-{rank}") for name in ("stdout", "stderr")},
            }
            for rank in range(size)
        ]
        return [self._ask(order) for order in orders]

    def end(self, pids: list[int]) -> list[tuple[int, str, str]]:
        """Each one's exit code, what it printed, and what it said on stderr."""
        codes = [self._ask(pid) for pid in pids]
        said = [
            [(self.folder / f"{name}-{rank}").read_text() for name in ("stdout", "stderr")]
            for rank in range(len(pids))
        ]
        return [(code, *texts) for code, texts in zip(codes, said, strict=True)]

    def run(self, argv: list[str]) -> list[tuple[int, str, str]]:
        results = self.end(self.start(argv))
        assert [code for code, _, _ in results] == [0, 0], results
        return results


@pytest.fixture(scope="module")
def processes(tmp_path_factory):
    nursery = subprocess.Popen(
        [sys.executable, "-c", NURSERY],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        env=ENV,
        text=True,
    )
    yield Processes(nursery, tmp_path_factory.mktemp("said"))
    nursery.stdin.close()
    nursery.wait()


@pytest.fixture(autouse=True)
def one_thread():
    """As the processes have: a sum's bits depend on how many share it."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def clients(tiny, tmp_path_factory) -> Path:
    """Five clients of unequal size."""
    folder = tmp_path_factory.mktemp("five")
    lines = ["clients:\n"]
    for i, samples in enumerate((4, 12, 3, 8, 5)):
        make_data(folder, f"c{i}", samples, seed=10 + i)
        lines.append(f"  - {{name: c{i}, data_path: c{i}.json, image_folder: images, task: t}}\n")
    (folder / "clients.yaml").write_text("".join(lines))
    return folder / "clients.yaml"


def left(folder: Path) -> tuple:
    """What a run leaves, but for its seconds: state, memory, what clients keep, and the records."""
    state = RoundState.load(folder / "fed")
    kept = {name: fingerprint(own) for name, own in state.kept.items()}
    records = []
    for line in (folder / "rounds.jsonl").read_text().splitlines():
        record = json.loads(line)
        del record["seconds"]
        for client in record["clients"].values():
            client.pop("seconds", None)
        records.append(record)
    return fingerprint(state.shared), fingerprint(state.memory), kept, records


def test_two_processes_are_one(flags, tiny, clients, processes, tmp_path):
    common = {
        "fed_clients": clients,
        "fed_rounds": 2,
        "fed_method": "scaffold",
        "fed_eval_data_path": [tiny / "heldout.json"],
        "report_to": "tensorboard",
    }
    train(flags(**common, output_dir=tmp_path / "one"))
    argv = flags(**common, fed_parallel_clients=2, output_dir=tmp_path / "two")
    main, other = processes.run(argv)
    assert other[1] == ""
    lines = [line for line in main[1].splitlines() if line.startswith("round 1/2  c")]
    assert sorted(line.split()[2] for line in lines) == ["c0", "c1", "c2", "c3", "c4"]
    assert left(tmp_path / "one") == left(tmp_path / "two")
    assert curves(tmp_path / "one") == curves(tmp_path / "two") != set()
    files = [(tmp_path / name / "mm_projector.bin").read_bytes() for name in ("one", "two")]
    assert files[0] == files[1]
    one, two = (
        {p.relative_to(folder) for p in (folder / "fed").rglob("*")}
        for folder in (tmp_path / "one", tmp_path / "two")
    )
    assert one == two  # nothing is left of a round's work


@pytest.mark.slow
def test_under_torchrun(flags, clients, tmp_path):
    common = {"fed_clients": clients, "feature_cache": tmp_path / "features"}
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2",
                "--standalone", "-m", "fed.train"]  # fmt: skip
    two = flags(**common, fed_parallel_clients=2, output_dir=tmp_path / "two")
    done = subprocess.run([*torchrun, *two], env=ENV, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    train(flags(**common, output_dir=tmp_path / "one"))
    assert left(tmp_path / "one") == left(tmp_path / "two")


def curves(folder: Path) -> set[tuple]:
    """The clients' and the rounds' curves in TensorBoard's files."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    found = set()
    for file in (folder / "runs").rglob("events.*"):
        events = EventAccumulator(str(file)).Reload()
        for tag in events.Tags()["scalars"]:
            if "seconds" not in tag:
                found |= {(tag, event.step, event.value) for event in events.Scalars(tag)}
    return found


def test_pilots_private_parameters_stay_with_the_clients(flags, clients, processes, tmp_path):
    common = {
        "fed_clients": clients,
        "fed_rounds": 1,
        "fed_method": "pilot",
        "fed_one_pass": False,
        "mm_projector_type": "pilot",
        "tune_mm_mlp_adapter": False,
        "lora_enable": True,
        "lora_r": 2,
    }
    one, two = tmp_path / "one", tmp_path / "two"
    train(flags(**common, output_dir=one))
    processes.run(flags(**common, fed_parallel_clients=2, output_dir=two))
    names = [f.relative_to(one) for f in one.rglob("*.safetensors") if f.parts[-2] != "fed"]
    assert len(names) > 10
    assert all((one / name).read_bytes() == (two / name).read_bytes() for name in names)
    for name in ("c0", "c4"):
        steps = [(run / "clients" / name / "steps.jsonl").read_text() for run in (one, two)]
        assert steps[0] == steps[1]


@pytest.mark.parametrize("who", [0, 1])
def test_a_process_that_is_killed_ends_the_run_which_goes_on_from_there(
    flags, clients, processes, tmp_path, who
):
    argv = flags(
        fed_clients=clients, fed_rounds=2, fed_parallel_clients=2, output_dir=tmp_path / "two"
    )
    mark, folder = tmp_path / "stuck", tmp_path / "two" / "fed" / "round-0002"
    pids = processes.start(argv, WHO=str(who), MARK=str(mark), FAILS="")
    deadline = time.monotonic() + 300
    while not (mark.exists() and any(folder.glob("[!.]*.safetensors"))):
        assert time.monotonic() < deadline
        time.sleep(0.05)
    os.kill(pids[who], signal.SIGKILL)
    order = [who, 1 - who]  # one that is killed is gone when it has been waited for
    codes = {rank: processes.end([pids[rank]])[0][0] for rank in order}
    said = (processes.folder / f"stderr-{1 - who}").read_text()
    assert codes == {who: -signal.SIGKILL, 1 - who: 2}, said
    assert said.count("error:") == 1
    assert f"process {who} of 2" in said
    kept = {file.stem for file in folder.glob("[!.]*.safetensors")}
    printed = processes.run(argv)[0][1]
    lines = [line for line in printed.splitlines() if line.startswith("round 2/2  c")]
    assert {line.split()[2] for line in lines} == {"c0", "c1", "c2", "c3", "c4"} - kept
    train(flags(fed_clients=clients, fed_rounds=2, output_dir=tmp_path / "one"))
    assert left(tmp_path / "one") == left(tmp_path / "two")


def test_an_error_of_any_process_is_said_once(flags, clients, processes, tmp_path):
    argv = flags(fed_clients=clients, fed_rounds=2, fed_parallel_clients=2)
    pids = processes.start(argv, WHO="1", MARK=str(tmp_path / "x"), FAILS="yes")
    results = processes.end(pids)
    assert [code for code, _, _ in results] == [2, 2]
    assert results[1][1] == ""  # it has trained, and printed nothing
    errors = [[line for line in r[2].splitlines() if "error" in line] for r in results]
    assert errors == [[], ["error: no"]]


@pytest.mark.parametrize(
    ("changes", "there", "message"),
    [
        ({"fed_parallel_clients": 2}, None, "is for 2 processes, .*, found 1$"),
        ({"fed_parallel_clients": 2}, "4", "--nproc_per_node 2 .*, found 4$"),
        ({"fed_parallel_clients": 2, "deepspeed": "scripts/zero3.json"}, "2", "with ZeRO-3 cuts"),
        ({"fed_parallel_clients": 2, "fsdp": "full_shard"}, "2", "and --fsdp cuts"),
        ({"fed_parallel_clients": 0}, None, "--fed_parallel_clients is 0"),
    ],
)
def test_what_cannot_be_side_by_side_is_refused(
    flags, clients, tmp_path, monkeypatch, changes, there, message
):
    if there is not None:
        monkeypatch.setenv("WORLD_SIZE", there)
    with pytest.raises(InputError, match=message):
        train(flags(fed_clients=clients, **changes))
    assert not (tmp_path / "out").exists()


def test_each_process_has_a_gpu_of_its_own(monkeypatch):
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    assert [worker_group._device(rank, 2) for rank in (0, 1)] == ["0", "1"]
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "5, 7")
    assert [worker_group._device(rank, 2) for rank in (0, 1)] == ["5", "7"]
    assert worker_group._device(1, 0) is None
    with pytest.raises(InputError, match=r"process 2 .* has no GPU, there are 2"):
        worker_group._device(2, 2)


def test_alone_is_what_a_run_is_without_the_flag(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")  # a launcher whose processes share every batch
    assert ResidentDriver.join(["--output_dir", "x"]).alone
    assert os.environ["WORLD_SIZE"] == "2"
