"""ZeRO-2 and ZeRO-3 on two gloo ranks give what one process gives."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from fed import state
from fed.train import train as fed_train
from llava.train.train import train as llava_train
from tests.conftest import EVEN_ROUTER, assert_moved_alike

pytest.importorskip("deepspeed")
ROOT = Path(__file__).parents[3]
NEAR = 0.01  # of the way that a tensor went: measured 2e-5, and one whole step of a value is 0.003

# What each rank runs: one job after the other. The shared-memory op only makes gloo faster, and
# would be compiled for minutes on a fresh machine.
RANK = """
import json, os, shutil, sys
import deepspeed.comm.torch
deepspeed.comm.torch.build_shm_op = lambda: None
import torch.distributed
import fed.train, llava.train.train

def copy(argv):
    if os.environ["RANK"] == "0":
        shutil.copytree(*argv)
    torch.distributed.barrier()

entries = {"fed": fed.train.train, "llava": llava.train.train.train, "copy": copy}
for entry, argv in json.loads(sys.argv[1]):
    entries[entry](argv=argv)
"""


def on_two_ranks(jobs: list[tuple[str, list[str]]]) -> str:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    common = {
        **os.environ,
        "DS_ACCELERATOR": "cpu",
        "OMP_NUM_THREADS": "1",
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "WORLD_SIZE": "2",
        "LOCAL_WORLD_SIZE": "2",
    }
    ranks = [
        subprocess.Popen(
            [sys.executable, "-c", RANK, json.dumps(jobs)],
            env={**common, "RANK": str(rank), "LOCAL_RANK": str(rank)},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for rank in (0, 1)
    ]
    outputs = [rank.communicate()[0] for rank in ranks]
    assert [rank.returncode for rank in ranks] == [0, 0], "\n".join(o[-3000:] for o in outputs)
    return outputs[0]


def lora_parts(folder: Path) -> state.State:
    others = state.load(folder / "non_lora_trainables.bin")
    return {**load_file(folder / "adapter_model.safetensors"), **others}


@pytest.mark.slow
@pytest.mark.parametrize("stage", [2, 3])
def test_two_ranks_equal_one_process(flags, tiny, tmp_path, stage):
    llava_train(argv=flags(data_path=tiny / "b.json", max_steps=1, output_dir=tmp_path / "start"))
    common = {"pretrain_mm_mlp_adapter": tmp_path / "start" / "mm_projector.bin"}
    plain = {**common, "data_path": tiny / "a.json"}
    # Even slices, or the ranks' last batch would be filled up with samples of the first.
    even = json.loads((tiny / "b.json").read_text())[:8]
    (tmp_path / "even.json").write_text(json.dumps(even))
    (tmp_path / "clients.yaml").write_text(
        f"clients:\n  - {{name: a, data_path: {tiny}/a.json}}\n"
        "  - {name: b, data_path: even.json}\n"
    )
    federated = {
        **common,
        "fed_clients": tmp_path / "clients.yaml",
        "fed_rounds": 2,
        "fed_method": "fedcmp",
        "fed_eval_data_path": [tiny / "heldout.json"],
    }
    # Two ranks of one sample a step are one process that accumulates two.
    one = {"per_device_train_batch_size": 1, "gradient_accumulation_steps": 2}
    llava_train(argv=flags(**plain, **one, output_dir=tmp_path / "plain-1"))
    fed_train(flags(**federated, **one, output_dir=tmp_path / "fed-1"))
    lora = {"data_path": tiny / "a.json", "tune_mm_mlp_adapter": False, "lora_enable": True}
    begin = {
        "output_dir": tmp_path / "lora-start",
        "lora_dropout": 0.0,
        "lora_r": 4,
        "max_steps": 2,
    }
    llava_train(argv=flags(**lora, **common, **begin))
    lora["lora_weight_path"] = tmp_path / "lora-start"
    llava_train(argv=flags(**lora, **one, output_dir=tmp_path / "lora-1"))

    # Pictures beside text alone: at the same step one rank has a picture and the other has none.
    mixed = json.loads((tiny / "a.json").read_text())
    for i in range(6):
        said = [{"from": "human", "value": "Say it"}, {"from": "gpt", "value": "again " * (i + 1)}]
        mixed.insert(2 * i, {"id": f"text-{i}", "conversations": said})
    (tmp_path / "mixed.json").write_text(json.dumps(mixed))
    full = {**common, "data_path": tmp_path / "mixed.json", "version": "v1"}
    full |= {"tune_mm_mlp_adapter": False, "learning_rate": 1e-4}
    llava_train(argv=flags(**full, **one, output_dir=tmp_path / "full-1"))

    two = {
        "per_device_train_batch_size": 1,
        "gradient_checkpointing": True,
        "deepspeed": ROOT / "scripts" / f"zero{stage}.json",
        "use_cpu": True,
    }
    steps = {"save_strategy": "steps", "save_steps": 2}
    last = {**steps, "save_total_limit": 1}
    whole, cut = tmp_path / "lora-2", tmp_path / "lora-cut"
    printed = on_two_ranks(
        [
            ("llava", flags(**plain, **two, **last, output_dir=tmp_path / "plain-2")),
            ("fed", flags(**federated, **two, output_dir=tmp_path / "fed-2")),
            ("llava", flags(**lora, **two, **steps, output_dir=whole)),
            ("copy", [str(whole / "checkpoint-4"), str(cut / "checkpoint-4")]),
            ("llava", flags(**lora, **two, **steps, output_dir=cut)),
            ("llava", flags(**full, **two, output_dir=tmp_path / "full-2")),
        ]
    )
    assert "Warning" not in printed
    assert "mismatch" not in printed
    a, b = (load_file(tmp_path / f"full-{n}" / "model.safetensors") for n in (1, 2))
    projector = state.load(common["pretrain_mm_mlp_adapter"])
    start = {**load_file(tiny / "llm" / "model.safetensors"), **projector}
    moving = {n: t for n, t in a.items() if "vision_tower" not in n}
    assert all(torch.equal(a[n], b[n]) for n in a.keys() - moving.keys())
    assert_moved_alike({n: b[n] for n in moving}, moving, {n: start[n] for n in moving}, NEAR)
    for name in ("plain", "fed"):
        a, b = (state.load(tmp_path / f"{name}-{n}" / "mm_projector.bin") for n in (1, 2))
        assert_moved_alike(b, a, projector, NEAR)

    start, a, b, resumed = map(
        lora_parts, (tmp_path / "lora-start", tmp_path / "lora-1", whole, cut)
    )
    assert_moved_alike(b, a, start, NEAR)
    assert b.keys() == resumed.keys()
    assert all(torch.equal(b[key], resumed[key]) for key in b)

    # The frozen language model (230 thousand parameters) is in no checkpoint.
    assert [c.name for c in (tmp_path / "plain-2").glob("checkpoint-*")] == ["checkpoint-6"]
    for checkpoint in (tmp_path / "plain-2" / "checkpoint-6", whole / "checkpoint-6"):
        size = sum(f.stat().st_size for f in checkpoint.rglob("*") if f.is_file())
        assert size < 400_000

    heldout = [
        json.loads((tmp_path / f"fed-{n}" / "rounds.jsonl").read_text().splitlines()[-1])["heldout"]
        for n in (1, 2)
    ]
    assert heldout[0]["global"]["heldout"]["loss"] == pytest.approx(
        heldout[1]["global"]["heldout"]["loss"], abs=1e-4
    )


@pytest.mark.slow
def test_pilot_on_two_ranks_with_zero_3_equals_one_process(flags, tiny, tmp_path):
    records = json.loads((tiny / "b.json").read_text())[:8]
    (tmp_path / "even.json").write_text(json.dumps(records))
    (tmp_path / "clients.yaml").write_text(
        f"clients:\n  - {{name: a, task: x, data_path: {tiny}/a.json}}\n"
        "  - {name: b, task: y, data_path: even.json}\n"
    )
    lora = {"tune_mm_mlp_adapter": False, "lora_enable": True, "mm_projector_type": "pilot"}
    lora |= EVEN_ROUTER
    begin = {"lora_dropout": 0.0, "lora_r": 4, "max_steps": 2, "output_dir": tmp_path / "start"}
    tasks = ["--pilot_tasks", "x", "y"]
    llava_train(argv=[*flags(data_path=tiny / "a.json", **lora, **begin), *tasks])
    lora |= {"fed_method": "pilot", "fed_rounds": 2, "fed_clients": tmp_path / "clients.yaml",
             "lora_weight_path": tmp_path / "start", "per_device_train_batch_size": 1,
             "fed_one_pass": False, "fed_eval_data_path": [tiny / "heldout.json"]}  # fmt: skip
    fed_train(flags(**lora, gradient_accumulation_steps=2, output_dir=tmp_path / "one"))
    two = {"deepspeed": ROOT / "scripts" / "zero3.json", "use_cpu": True}
    on_two_ranks([("fed", flags(**lora, **two, output_dir=tmp_path / "two"))])
    counts = [
        [client["parameters"] for client in json.loads(line)["clients"].values()]
        for run in ("one", "two")
        for line in (tmp_path / run / "rounds.jsonl").read_text().splitlines()
    ]
    assert counts[:3] == counts[3:]
    for name in "ab":
        places = (
            tmp_path / "start",
            *(tmp_path / run / "clients" / name for run in ("one", "two")),
        )
        start, one, both = map(lora_parts, places)
        assert any("router" in key for key in one)
        assert_moved_alike(both, one, start, 0.02)
        for key, tensor in one.items():
            assert (tensor - start[key]).norm() > 0.01 or "pilot.client" in key, key


@pytest.mark.slow
@pytest.mark.parametrize("stage", [2, 3])
def test_rows_of_start_and_end_token_on_two_ranks(flags, tiny, tmp_path, stage):
    """They train, are saved whole, and a run goes on from its checkpoint, as in one process."""
    same = {"data_path": tiny / "a.json", "version": "v1", "mm_use_im_start_end": True}
    llava_train(argv=flags(**same, max_steps=1, output_dir=tmp_path / "start"))
    start = tmp_path / "start" / "mm_projector.bin"
    same |= {"per_device_train_batch_size": 1, "pretrain_mm_mlp_adapter": start}
    llava_train(argv=flags(**same, gradient_accumulation_steps=2, output_dir=tmp_path / "one"))
    two = {"deepspeed": ROOT / "scripts" / f"zero{stage}.json", "use_cpu": True}
    two |= {"save_strategy": "steps", "save_steps": 2}
    cut = str(tmp_path / "cut" / "checkpoint-4")
    on_two_ranks(
        [
            ("llava", flags(**same, **two, output_dir=tmp_path / "two")),
            ("copy", [str(tmp_path / "two" / "checkpoint-4"), cut]),
            ("llava", flags(**same, **two, output_dir=tmp_path / "cut")),
        ]
    )
    runs = (tmp_path / name / "mm_projector.bin" for name in ("start", "one", "two", "cut"))
    begun, one, both, resumed = (state.load(file)["model.embed_tokens.weight"] for file in runs)
    assert both.shape == (2, 48)
    assert torch.equal(both, resumed)
    moved = (one - begun).norm()
    assert moved > 0.01
    assert (both - one).norm() < 0.02 * moved


@pytest.mark.slow
def test_in_bf16_a_state_is_the_optimizers_own_float32(flags, tiny, tmp_path):
    """Steps of a millionth, which bf16 cannot hold beside a weight, add up over clients' turns."""
    rate, steps, rounds = 1e-6, 6, 2
    (tmp_path / "clients.yaml").write_text(f"clients:\n  - {{name: a, data_path: {tiny}/a.json}}\n")
    common = {
        "fed_clients": tmp_path / "clients.yaml",
        "fed_rounds": rounds,
        "fed_one_pass": False,
        "fed_lr_schedule": "round",
        "lr_scheduler_type": "constant",
        "per_device_train_batch_size": 1,
        "bf16": True,
        "use_cpu": True,
    }
    config = json.loads((ROOT / "scripts" / "zero2.json").read_text())
    config["zero_optimization"]["stage"] = 1
    (tmp_path / "zero1.json").write_text(json.dumps(config))
    zero = [tmp_path / "zero1.json", *(ROOT / "scripts" / f"zero{n}.json" for n in (2, 3))]
    jobs = {"start": {"learning_rate": 0.0, "deepspeed": zero[1]}}
    jobs |= {str(n): {"learning_rate": rate, "deepspeed": file} for n, file in enumerate(zero, 1)}
    on_two_ranks(
        [("fed", flags(**common, **job, output_dir=tmp_path / name)) for name, job in jobs.items()]
    )
    start, *ends = (state.load(tmp_path / name / "mm_projector.bin") for name in jobs)
    for stage, end in enumerate(ends, start=1):
        lines = (tmp_path / str(stage) / "rounds.jsonl").read_text().splitlines()
        first = json.loads(lines[0])["norms"][0]
        way = {name: end[name] - begun for name, begun in start.items()}
        # Adam's step is 3.2 times the rate at most; of a weight of 0.1 bf16 knows 5e-4.
        assert max(t.abs().max() for t in way.values()) < 3.2 * rounds * steps * rate
        assert sum(t.square().sum() for t in way.values()).sqrt() > 1.2 * first > 0, stage
