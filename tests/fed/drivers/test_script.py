"""Clients that are processes: `fed.train --fed_driver script`."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from fed import state
from fed.server.round_state import RoundState
from fed.train import train
from llava.errors import InputError
from llava.processes import name_of
from llava.state import read_tensors
from tests.conftest import assert_moved_alike

NAMES = {
    f"model.mm_projector.{layer}.{part}": shape
    for layer, width in ((0, 32), (2, 48))
    for part, shape in (("weight", (48, width)), ("bias", (48,)))
}


def projector(value: float) -> state.State:
    return {name: torch.full(shape, value) for name, shape in NAMES.items()}


# Stands for a training script: leaves a file that was made before, after what $DO says.
CLIENT = """
args="$*"
while [ $# -gt 0 ]; do
  case "$1" in
    --output_dir) out=$2;;
    --pretrain_mm_mlp_adapter) sent=$2;;
    --data_path) data=$2;;
  esac
  shift
done
echo "training $NAME"
eval "$DO"
[ -z "$LEAVE" ] || cp "$LEAVE" "$out/mm_projector.bin"
"""


@pytest.fixture
def fake(flags, tiny, tmp_path):
    """Runs clients a and b of `CLIENT` in two rounds from a state of zeros; gives the records."""
    state.save(projector(0.0), tmp_path / "start.bin")
    for name, value in (("a", 1.0), ("b", 3.0)):
        state.save(projector(value), tmp_path / f"{name}.bin")
    (tmp_path / "client.sh").write_text(CLIENT)

    def run(a: dict | None = None, b: dict | None = None, out: str = "run", **changes):
        entries = []
        for name, own in (("a", a or {}), ("b", b or {})):
            env = {"NAME": name, "LEAVE": str(tmp_path / f"{name}.bin"), "DO": ""}
            entry = {"name": name, "data_path": f"{tiny}/{name}.json", **own}
            entries.append({**entry, "env": {**env, **own.get("env", {})}})
        (tmp_path / "clients.yaml").write_text(json.dumps({"clients": entries}))
        values = {
            "fed_driver": "script",
            "fed_client_command": f"bash {tmp_path}/client.sh",
            "fed_clients": tmp_path / "clients.yaml",
            "fed_rounds": 2,
            "pretrain_mm_mlp_adapter": tmp_path / "start.bin",
            "output_dir": tmp_path / out,
        }
        train(flags(**{**values, **changes}))
        lines = (tmp_path / out / "rounds.jsonl").read_text().splitlines()
        return [json.loads(line) for line in lines]

    return run


def do(**env: str) -> dict:
    return {"env": env}


def test_a_client_is_given_what_upstreams_flags_say(fake, tiny, tmp_path):
    keep = f'cp "$sent" {tmp_path}/sent-$NAME; cp "$data" {tmp_path}/data-$NAME; '
    keep += f'echo "$args" > {tmp_path}/args-$NAME; env > {tmp_path}/env-$NAME; pwd'
    os.environ["RANK"] = "0"
    try:
        records = fake(
            a={"image_folder": f"{tiny}/images", "learning_rate": 1e-4, **do(DO=keep)},
            b={"gpus": [1, 3], "cwd": str(tiny), **do(DO=keep, HOMES="${HOME}:x")},
            image_folder=None,
            fed_rounds=1,
        )
    finally:
        del os.environ["RANK"]
    assert (tmp_path / "sent-a").read_bytes() == (tmp_path / "start.bin").read_bytes()
    given = json.loads((tmp_path / "data-a").read_text())
    there = json.loads((tiny / "a.json").read_text())
    assert sorted(given, key=lambda r: r["id"]) == sorted(there, key=lambda r: r["id"]) != given
    words = (tmp_path / "args-a").read_text().split()
    own = dict(zip(words[::2], words[1::2], strict=True))
    assert list(own) == [
        *("--learning_rate", "--pretrain_mm_mlp_adapter", "--data_path", "--image_folder"),
        *("--output_dir", "--seed"),
    ]
    assert own["--image_folder"] == f"{tiny}/images"
    assert own["--output_dir"].startswith("/")
    assert "--image_folder" not in (tmp_path / "args-b").read_text()
    environment = dict(
        line.split("=", 1) for line in (tmp_path / "env-b").read_text().splitlines() if "=" in line
    )
    assert environment["CUDA_VISIBLE_DEVICES"] == "1,3"
    assert environment["HOMES"] == f"{os.environ['HOME']}:x"
    assert not {"RANK", "ACCELERATE_MIXED_PRECISION"} & set(environment)
    log = (tmp_path / "run" / "logs" / "round-0001-b.log").read_text()
    assert "training b" in log
    assert str(tiny) in log
    # The mean by samples, 12 of a and 9 of b.
    found = state.load(tmp_path / "run" / "mm_projector.bin")
    assert torch.allclose(found["model.mm_projector.0.bias"], torch.tensor((12 + 27) / 21))
    assert records[0]["clients"]["a"]["samples"] == 12
    assert records[0]["failed"] == {}
    config = json.loads((tmp_path / "run" / "config.json").read_text())
    assert config["model_type"] == "llava_llama"
    assert config["mm_projector_type"] == "mlp2x_gelu"


def log_of(tmp_path: Path, what: str) -> str:
    """For $DO: a line in a file, to see how often and in which order clients were at work."""
    return f"echo $NAME {what} >> {tmp_path}/history; "


def history(tmp_path: Path) -> list[str]:
    return (tmp_path / "history").read_text().split("\n")[:-1]


def once(tmp_path: Path, what: str) -> str:
    """For $DO: something that happens at a client's first try only."""
    return f"[ -e {tmp_path}/once-$NAME ] || {{ touch {tmp_path}/once-$NAME; {what}; }}"


def is_at_work(pid_file: Path) -> bool:
    """Whether the process is there, and no zombie that nobody has collected yet."""
    stat = Path("/proc") / pid_file.read_text().strip() / "stat"
    return stat.exists() and stat.read_text().rsplit(")", 1)[1].split()[0] != "Z"


BAD = {
    "exit code": (do(DO="echo out of luck; exit 3"), "ended with exit code 3"),
    "signal": (do(DO="kill -9 $$"), "was ended by SIGKILL"),
    "signal in a child": (do(DO="bash -c 'kill -9 $$'; exit $?"), r"exit code 137 \(SIGKILL\)"),
    "nothing": (do(LEAVE=""), "left no mm_projector.bin"),
    "nan": (do(LEAVE="nan.bin"), "left .*mm_projector.bin: tensor .*0.bias has 1 NaN"),
    "shape": (do(LEAVE="shape.bin"), r"left .*: tensor .*2.bias has shape \(3,\)"),
    "missing": (do(LEAVE="missing.bin"), "left .*: tensor .*2.bias is missing"),
    "code": (do(LEAVE="code.bin"), "left .*never unpickled"),
    "short": (do(LEAVE="short.bin"), "left .*cut short"),
}


@pytest.mark.parametrize("case", BAD)
def test_a_client_that_fails_is_named_and_the_same_command_goes_on(fake, tmp_path, case, capfd):
    bad = projector(2.0)
    bad["model.mm_projector.0.bias"][0] = torch.nan
    state.save(bad, tmp_path / "nan.bin")
    bad["model.mm_projector.2.bias"] = torch.ones(3)
    state.save(
        {**projector(2.0), "model.mm_projector.2.bias": torch.ones(3)}, tmp_path / "shape.bin"
    )
    bad.pop("model.mm_projector.2.bias")
    state.save(bad, tmp_path / "missing.bin")
    torch.save({"model.mm_projector.0.bias": Path("x")}, tmp_path / "code.bin")
    (tmp_path / "short.bin").write_bytes((tmp_path / "a.bin").read_bytes()[:100])
    client, message = BAD[case]
    if client["env"].get("LEAVE"):
        client = do(LEAVE=str(tmp_path / client["env"]["LEAVE"]))
    good = do(DO=log_of(tmp_path, "trained"))
    with pytest.raises(InputError, match=f"client b, round 1: `bash .*client.sh` .*{message}"):
        fake(a=good, b=client)
    assert "\n  b | training b\n" in capfd.readouterr().err
    assert len(fake(a=good)) == 2  # mended, and a's first round is not done again
    assert history(tmp_path) == ["a trained"] * 2
    assert not any((tmp_path / "run" / "fed").glob("round-*"))


def test_a_time_limit_ends_the_client_and_what_it_has_started(fake, tmp_path, monkeypatch):
    monkeypatch.setattr("fed.drivers.process_groups.GRACE", 0.5)
    slow = do(DO=f"sleep 1000 & echo $! > {tmp_path}/pid; trap '' TERM; wait; sleep 1000")
    with pytest.raises(InputError, match="client a, round 1: .* did not end within 0.5 s"):
        fake(a=slow, fed_client_timeout=0.5)
    assert not is_at_work(tmp_path / "pid")


def test_a_try_continues_a_checkpoint_or_begins_with_an_empty_folder(fake, tmp_path):
    look = f"ls $out >> {tmp_path}/history; "
    half = once(tmp_path, "touch $out/half; exit 1")
    fake(a=do(DO=look + half), fed_rounds=1, fed_client_retries=1, out="x")
    assert history(tmp_path) == []
    # Whole checkpoints are kept, but not if a try came no further than the one before.
    make = "mkdir -p $out/checkpoint-$STEP; cd $out/checkpoint-$STEP; "
    make += "touch trainer_state.json optimizer.pt mm_projector.bin; exit 1"
    step = f"STEP=$(wc -l < {tmp_path}/steps); echo >> {tmp_path}/steps; "
    (tmp_path / "steps").write_text("\n")
    step += "[ $STEP -lt 4 ] || STEP=3; "  # 1, 2, 3, 3, 3
    with pytest.raises(InputError, match="client a, round 1"):
        fake(a=do(DO=look + step + make), fed_rounds=1, fed_client_retries=4, out="y")
    first, second = ["checkpoint-1"], ["checkpoint-1", "checkpoint-2"]
    third = [*second, "checkpoint-3"]
    assert history(tmp_path) == [*first, *second, *third]


def test_a_round_goes_on_without_a_client_that_failed(fake, tmp_path, capfd):
    fails = do(DO=once(tmp_path, "exit 1"))
    records = fake(a=fails, fed_min_clients=1)
    assert list(records[0]["clients"]) == ["b"]
    assert list(records[1]["clients"]) == ["a", "b"]
    assert "exit code 1" in records[0]["failed"]["a"]
    assert not records[1]["failed"]
    assert "round 1/2  goes on without a" in capfd.readouterr().out
    with pytest.raises(
        InputError, match="client a.*, and 1 more failed; .*fewer than --fed_min_clients 1"
    ):
        fake(a=do(DO="exit 1"), b=do(DO="exit 1"), fed_min_clients=1, out="y")
    assert len(fake(fed_min_clients=1, out="y")) == 2


def test_who_has_left_a_round_stays_out_of_it_when_the_run_is_continued(fake, tmp_path):
    a = do(DO=once(tmp_path, "exit 1"))
    b = do(DO=once(tmp_path, f"echo $$ > {tmp_path}/pid; kill -TERM $PPID; sleep 1000"))
    with pytest.raises(SystemExit):
        fake(a=a, b=b, fed_min_clients=1)
    assert not is_at_work(tmp_path / "pid")
    assert list(fake(a=a, b=b, fed_min_clients=1)[0]["failed"]) == ["a"]


def test_ctrl_c_ends_all_clients(fake, tmp_path):
    wait = f"echo $$ > {tmp_path}/pid-$NAME; "
    wait += f"until [ -s {tmp_path}/pid-a -a -s {tmp_path}/pid-b ]; do sleep 0.02; done; "
    with pytest.raises(KeyboardInterrupt):
        fake(
            a=do(DO=wait + "sleep 1000"),
            b=do(DO=wait + "kill -INT $PPID; sleep 1000"),
            fed_parallel_clients=2,
            fed_client_timeout=60,
        )
    assert not is_at_work(tmp_path / "pid-a")
    assert not is_at_work(tmp_path / "pid-b")


def test_clients_are_at_work_at_once_but_not_on_one_gpu(fake, tmp_path):
    log = log_of(tmp_path, "begins") + "{}" + log_of(tmp_path, "ends")
    other = "until grep -q '{} begins' " + f"{tmp_path}/history; do sleep 0.02; done; "
    a, b = do(DO=log.format(other.format("b"))), do(DO=log.format(other.format("a")))
    both = {"fed_parallel_clients": 2, "fed_rounds": 1, "fed_client_timeout": 60}
    fake(a={"gpus": 0, **a}, b={"gpus": "1", **b}, out="x", **both)
    mean = (tmp_path / "x" / "mm_projector.bin").read_bytes()
    (tmp_path / "history").unlink()
    alone = do(DO=log.format("sleep 0.2; "))
    fake(a={"gpus": [0, 1], **alone}, b={"gpus": [1, 2], **alone}, out="y", **both)
    assert history(tmp_path) == ["a begins", "a ends", "b begins", "b ends"]
    # Whoever is first, the mean is the same.
    late = do(DO=f"until [ -e {tmp_path}/done ]; do sleep 0.02; done")
    fake(a=late, b=do(DO=f"touch {tmp_path}/done"), out="z", **both)
    for name in "yz":
        assert (tmp_path / name / "mm_projector.bin").read_bytes() == mean


def test_what_scripts_leave_travels_in_the_form_that_is_asked_for(fake, tmp_path):
    state.save(projector(1.001), tmp_path / "odd.bin")
    odd = do(LEAVE=str(tmp_path / "odd.bin"))
    for wire, value in (("float32", 1.001), ("bf16", 1.0)):
        fake(a=odd, b=odd, fed_rounds=1, out=wire, fed_wire=wire)
        found = state.load(tmp_path / wire / "mm_projector.bin")
        assert torch.allclose(found["model.mm_projector.0.bias"], torch.tensor(value), atol=1e-5)


def test_a_run_that_stops_leaves_the_model_of_its_last_round(fake, tmp_path, capfd):
    fake(out="whole")
    seen, fixed = tmp_path / "seen", tmp_path / "fixed"
    second = f"[ ! -e {seen} ] || [ -e {fixed} ] || exit 3; touch {seen}"
    with pytest.raises(InputError, match="client b.* ended with exit code 3"):
        fake(b=do(DO=second))
    assert "the model after round 1 is left" in capfd.readouterr().out
    left, whole = (tmp_path / out / "mm_projector.bin" for out in ("run", "whole"))
    server = RoundState.load(tmp_path / "run" / "fed")
    assert server.round == 1
    for name, tensor in state.load(left).items():
        assert torch.equal(tensor, server.shared[name])
    assert (tmp_path / "run" / "config.json").exists()
    fixed.touch()
    fake(b=do(DO=second))
    assert left.read_bytes() == whole.read_bytes()


def test_a_run_that_stops_in_its_first_round_leaves_no_model(fake, tmp_path):
    with pytest.raises(InputError, match="exit code 3"):
        fake(b=do(DO="exit 3"))
    assert not (tmp_path / "run" / "mm_projector.bin").exists()


def test_killed_and_started_again_ends_the_orphan_and_gives_the_same_bits(
    fake, flags, tiny, tmp_path
):
    fake(out="whole")
    orphan = do(DO=once(tmp_path, f"echo $$ > {tmp_path}/pid; sleep 1000"))
    argv = flags(
        fed_driver="script",
        fed_client_command=f"bash {tmp_path}/client.sh",
        fed_clients=tmp_path / "clients.yaml",
        fed_rounds=2,
        pretrain_mm_mlp_adapter=tmp_path / "start.bin",
        output_dir=tmp_path / "killed",
    )
    with pytest.raises(InputError, match="exit code 1"):  # writes clients.yaml
        fake(a=do(DO="exit 1"), b=orphan, out="unused")
    text = (tmp_path / "clients.yaml").read_text().replace("exit 1", log_of(tmp_path, "trained"))
    (tmp_path / "clients.yaml").write_text(text)
    parent = subprocess.Popen([sys.executable, "-m", "fed.train", *argv])
    pid = tmp_path / "pid"
    while not (pid.exists() and pid.read_text()) and parent.poll() is None:
        time.sleep(0.02)
    os.kill(parent.pid, signal.SIGKILL)
    parent.wait()
    assert is_at_work(tmp_path / "pid")
    train(argv)
    assert not is_at_work(tmp_path / "pid")
    assert history(tmp_path) == ["a trained"] * 2
    whole, killed = (tmp_path / name / "mm_projector.bin" for name in ("whole", "killed"))
    assert whole.read_bytes() == killed.read_bytes()


@pytest.mark.parametrize("who", ["another host", "a process with its number", "of this host"])
def test_only_a_process_that_this_host_has_left_is_ended(tmp_path, monkeypatch, who):
    from fed.drivers.process_groups import sole_use

    monkeypatch.setattr("fed.drivers.process_groups.GRACE", 0.5)
    code = (
        "import fcntl, sys; file = open(sys.argv[1], 'w'); fcntl.flock(file, fcntl.LOCK_EX); "
        "print(1, flush=True); sys.stdin.read()"
    )
    with subprocess.Popen([sys.executable, "-c", code, tmp_path / ".lock"], stdin=subprocess.PIPE,
                          stdout=subprocess.PIPE, start_new_session=True) as process:  # fmt: skip
        process.stdout.readline()
        where, pid, began = name_of(process.pid).split(".")
        if who == "another host":
            where = "another-host-123abc"
        elif who == "a process with its number":
            began = str(int(began) - 1)
        (tmp_path / "leader.pid").write_text(f"{where}.{pid}.{began}")
        if who == "of this host":
            with sole_use(tmp_path):
                assert process.wait() == -signal.SIGTERM
            return
        said = pytest.raises(InputError, match=rf"still at work there; end it \({where}\.{pid}\.")
        with said, sole_use(tmp_path):
            pass
        assert process.poll() is None
        process.stdin.close()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"fed_client_command": None}, "client a: it has no `command`"),
        ({"fed_client_command": "no-such-program x"}, "client a: .*no-such-program is no program"),
        ({"fed_client_command": "bash 'x"}, "--fed_client_command is .*quotation"),
        ({"fed_client_command": "bash none.sh"}, "none.sh: No such file"),
        ({"fed_client_command": "bash upstream.sh"}, r'upstream.sh .*end .* with "\$@"'),
        ({"fed_min_clients": 3}, "--fed_min_clients is 3, a round has 2"),
        ({"fed_parallel_clients": 0}, "--fed_parallel_clients is 0"),
        ({"fed_client_timeout": -1}, "--fed_client_timeout is -1"),
        ({"fed_lr_schedule": "never"}, "--fed_lr_schedule is 'never'"),
        ({"fed_driver": "resident"}, "--fed_client_command is for --fed_driver script"),
        ({"fed_pool": True}, "--fed_pool"),
        ({"deepspeed": "zero2.json"}, "--deepspeed belong"),
        ({"mm_projector_type": "linear"}, "start.bin: tensor .*mm_projector.weight is missing"),
    ],
)
def test_bad_flags(fake, tmp_path, monkeypatch, changes, message):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "upstream.sh").write_text("deepspeed llava/train/train_mem.py --version plain\n")
    with pytest.raises(InputError, match=message):
        fake(**changes)
    assert not (tmp_path / "run" / "logs").exists()


def test_a_clients_samples_that_teach_nothing_do_not_count(fake, tiny, tmp_path, capfd):
    records = json.loads((tiny / "a.json").read_text())
    for record in records[:3]:
        record["conversations"][1]["value"] = "\n"
    (tmp_path / "some.json").write_text(json.dumps(records))
    (line,) = fake(a={"data_path": f"{tmp_path}/some.json"}, fed_rounds=1)
    assert line["clients"]["a"]["samples"] == 9
    assert "client a: 9 samples, 3 left out" in capfd.readouterr().out
    found = state.load(tmp_path / "run" / "mm_projector.bin")
    assert torch.allclose(found["model.mm_projector.0.bias"], torch.tensor((9 + 27) / 18))
    (tmp_path / "none.json").write_text(json.dumps(records[:3]))
    with pytest.raises(InputError, match="client b: .*none.json: there is nothing to learn in it"):
        fake(b={"data_path": f"{tmp_path}/none.json"}, out="other")


@pytest.mark.parametrize(
    ("own", "message"),
    [
        ({"cwd": "no/such/folder"}, "client a: cwd .*no/such/folder does not exist"),
        ({"command": ["bash", "x.sh"]}, "client a: command is .*expected"),
        ({"gpus": "0,0"}, "client a: gpus is '0,0': one is named twice"),
        ({"gpus": {"0": 1}}, "client a: gpus is"),
        ({"env": {"A": True}}, "client a: env A is True"),
        ({"env": {"A": "${NO_SUCH_VARIABLE}"}}, "env A names the variable NO_SUCH_VARIABLE"),
        ({"comand": "x"}, r"unknown key 'comand' \(did you mean command"),
    ],
)
def test_bad_clients(fake, own, message):
    with pytest.raises(InputError, match=message):
        fake(a=own)


def test_processes_keys_are_refused_where_there_are_none(flags, tiny, tmp_path):
    (tmp_path / "c.yaml").write_text(f"clients: [{{name: a, data_path: {tiny}/a.json, gpus: 0}}]")
    with pytest.raises(InputError, match="client a has gpus, which is for --fed_driver script"):
        train(flags(fed_clients=tmp_path / "c.yaml"))


# An upstream-like script: all of LLaVA's flags are its own, and "$@" stands at its end.
SCRIPT = """
TUNE=${{TUNE:-True}}
{launcher} \\
    --model_name_or_path {tiny}/llm --vision_tower {tiny}/vision_tower --version plain \\
    --mm_projector_type mlp2x_gelu --mm_vision_select_layer -2 --mm_use_im_patch_token False \\
    --tune_mm_mlp_adapter $TUNE --num_train_epochs 1 --learning_rate 1e-2 \\
    --lr_scheduler_type cosine --logging_steps 1 --save_strategy no --report_to none \\
    --lazy_preprocess True --seed 1 --data_path nowhere.json {more} "$@"
"""


def compare_with_resident(
    flags, tiny, tmp_path, resident: dict, script: dict, files=("mm_projector.bin",), **common
) -> None:
    """The same run by both drivers: it goes the same way, with the same losses."""
    common = {"fed_rounds": 2, "fed_eval_data_path": [tiny / "heldout.json"], **common}
    script = {"fed_driver": "script", "fed_client_command": f"bash {tmp_path}/client.sh", **script}
    train(flags(**common, **resident, output_dir=tmp_path / "resident"))
    train(flags(**common, **script, output_dir=tmp_path / "script"))
    still = {"fed_rounds": 1, "learning_rate": 0, "output_dir": tmp_path / "start"}
    train(flags(**{**common, **resident, **still}))
    for file in files:
        runs = (read_tensors(tmp_path / n / file) for n in ("script", "resident", "start"))
        assert_moved_alike(*runs, 0.01)
    a, b = (
        [json.loads(line) for line in (tmp_path / n / "rounds.jsonl").read_text().splitlines()]
        for n in ("resident", "script")
    )
    for one, other in zip(a, b, strict=True):
        for client, facts in one["clients"].items():
            assert other["clients"][client]["loss"] == pytest.approx(facts["loss"], rel=1e-5)
            assert other["clients"][client]["steps"] == facts["steps"]
        one, other = (r["heldout"]["global"]["heldout"]["loss"] for r in (one, other))
        assert other == pytest.approx(one, rel=1e-5)


@pytest.mark.slow  # four processes; the scripts and the resident driver must not come apart
def test_scripts_give_what_the_resident_driver_gives(flags, tiny, tmp_path, monkeypatch):
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    launcher = f"{sys.executable} -m llava.train.train --per_device_train_batch_size 2"
    (tmp_path / "client.sh").write_text(SCRIPT.format(launcher=launcher, tiny=tiny, more=""))
    compare_with_resident(
        flags,
        tiny,
        tmp_path,
        resident={},
        script={"fed_parallel_clients": 2},
        fed_clients=tiny / "clients.yaml",
        fed_lr_schedule="run",
        fed_method="fedcmp",
    )


@pytest.mark.slow  # one process, and what no other test sees: LoRA on its way down and back
def test_lora_clients_give_what_the_resident_driver_gives(flags, tiny, tmp_path, monkeypatch):
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    monkeypatch.setenv("TUNE", "False")
    launcher = f"{sys.executable} -m llava.train.train --per_device_train_batch_size 2"
    more = "--lora_enable True --lora_dropout 0.1"
    (tmp_path / "client.sh").write_text(SCRIPT.format(launcher=launcher, tiny=tiny, more=more))
    client = {"name": "a", "data_path": f"{tiny}/a.json", "image_folder": f"{tiny}/images"}
    (tmp_path / "clients.yaml").write_text(json.dumps({"clients": [client]}))
    compare_with_resident(
        flags,
        tiny,
        tmp_path,
        resident={},
        script={},
        files=("adapter_model.safetensors", "non_lora_trainables.bin"),
        fed_clients=tmp_path / "clients.yaml",
        fed_rounds=1,
        tune_mm_mlp_adapter=False,
        lora_enable=True,
        lora_r=4,
        lora_dropout=0.1,
    )
    adapter = read_tensors(tmp_path / "script" / "adapter_model.safetensors")
    assert all(t.abs().max() > 1e-3 for name, t in adapter.items() if "lora_B" in name)


# Each rank; the shared-memory op only makes gloo faster, and would be compiled for minutes.
RANK = """
import deepspeed.comm.torch
deepspeed.comm.torch.build_shm_op = lambda: None
import llava.train.train
llava.train.train.train()
"""


@pytest.mark.slow
def test_deepspeed_clients_give_what_the_resident_driver_gives(flags, tiny, tmp_path, monkeypatch):
    """One client of two ranks under ZeRO-2, one under ZeRO-3."""
    pytest.importorskip("deepspeed")
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    monkeypatch.setenv("DS_ACCELERATOR", "cpu")
    (tmp_path / "rank.py").write_text(RANK)
    launcher = f"{sys.executable} -m torch.distributed.run --nproc-per-node 2 --standalone"
    launcher += f" {tmp_path}/rank.py --per_device_train_batch_size 1"
    (tmp_path / "client.sh").write_text(
        SCRIPT.format(launcher=launcher, tiny=tiny, more="--use_cpu True --deepspeed $ZERO.json")
    )
    scripts = Path(__file__).parents[3] / "scripts"
    entries = []
    for name, zero in (("a", "zero2"), ("b", "zero3")):
        # Even slices, or the ranks' last batch would be filled up with samples of the first.
        records = json.loads((tiny / f"{name}.json").read_text())[:8]
        (tmp_path / f"{name}.json").write_text(json.dumps(records))
        entry = {"name": name, "data_path": f"{name}.json", "image_folder": f"{tiny}/images"}
        entries.append({**entry, "cwd": str(scripts), "env": {"ZERO": zero}})
    (tmp_path / "script.yaml").write_text(json.dumps({"clients": entries}))
    entries = [{k: e[k] for k in ("name", "data_path", "image_folder")} for e in entries]
    (tmp_path / "resident.yaml").write_text(json.dumps({"clients": entries}))
    one_rank = {"per_device_train_batch_size": 1, "gradient_accumulation_steps": 2}
    compare_with_resident(
        flags,
        tiny,
        tmp_path,
        resident={"fed_clients": tmp_path / "resident.yaml", **one_rank},
        script={"fed_clients": tmp_path / "script.yaml"},
        fed_rounds=1,
    )
