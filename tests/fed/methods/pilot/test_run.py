"""A Pilot run: stages, what stays with the clients, resume to the bit, what it leaves."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from fed import state as states
from fed.drivers.resident import ResidentDriver
from fed.merge import merge
from fed.train import train
from llava.errors import InputError
from llava.model import convert
from llava.model.builder import load_pretrained_model
from llava.model.checkpoint import load_projector
from tests.conftest import EVEN_ROUTER, assert_moved_alike, make_llm, tool
from tests.fed.drivers.test_script import SCRIPT
from tests.fed.test_train import StopError, stop_after

TASKS = {"a": "colour", "b": "colour", "c": "shape"}


@pytest.fixture
def pilot(flags, tiny, tmp_path):
    """`pilot(output, **changes)`: one Pilot run of three clients with two tasks."""
    entries = [
        f"  - {{name: {name}, task: {task}, data_path: {tiny}/{'a' if name == 'a' else 'b'}.json, "
        f"image_folder: {tiny}/images}}\n"
        for name, task in TASKS.items()
    ]
    clients = tmp_path / "pilot.yaml"
    clients.write_text("clients:\n" + "".join(entries))

    def run(output: Path, **changes) -> list[dict]:
        values = {
            "fed_clients": clients,
            "fed_method": "pilot",
            "fed_rounds": 2,
            "fed_one_pass": False,
            "mm_projector_type": "pilot",
            "tune_mm_mlp_adapter": False,
            "lora_enable": True,
            "lora_r": 2,
            "output_dir": output,
            **changes,
        }
        train(flags(**values))
        return [json.loads(line) for line in (output / "rounds.jsonl").read_text().splitlines()]

    return run


def files(folder: Path) -> dict[str, bytes]:
    """What a run has left, but for its clocks and curves."""
    kinds = ("*.bin", "*.safetensors", "adapter_config.json", "config.json")
    found = {f for kind in kinds for f in folder.rglob(kind) if f.parts[-2] != "fed"}
    return {str(f.relative_to(folder)): f.read_bytes() for f in found}


def test_stages_follow_each_other_and_each_client_gets_a_model_of_its_own(pilot, tiny, tmp_path):
    out = tmp_path / "run"
    records = pilot(out, fed_eval_data_path=tiny / "heldout.json")
    assert [r["round"] for r in records] == [1, 2, 3]  # the first round has two exchanges
    assert set(records[-1]["heldout"]) == set(TASKS)
    adapter, lora = 48 * 32 + 48 + 48 * 48 + 48, records[0]["clients"]["a"]["parameters"]["sent"]
    lora -= adapter
    router = 2 * 32 + 2
    assert lora > 0
    for record, trained, received in (
        (records[0], 2 * adapter, adapter),
        (records[1], 2 * adapter + router, 2 * adapter),
        (records[2], 2 * adapter + router, 2 * adapter),
    ):
        for client in record["clients"].values():
            assert client["parameters"] == {
                "trained": trained + lora,
                "received": received + lora,
                "sent": adapter + lora,
            }
    for name, task in TASKS.items():
        folder = out / "clients" / name
        config = json.loads((folder / "config.json").read_text())
        others = [t for t in ("colour", "shape") if t != task]
        assert config["mm_pilot"]["tasks"] == [task, *others]
        assert config["mm_pilot"]["stage"] == 2
        _, model, _, _ = load_pretrained_model(str(folder), str(tiny / "llm"), "x", device="cpu")
        parts = model.get_model().mm_projector.state_dict()
        task_adapter = torch.load(out / "tasks" / task / "mm_projector.bin", weights_only=True)
        other = torch.load(out / "tasks" / others[0] / "mm_projector.bin", weights_only=True)
        for key in ("0.weight", "0.bias", "2.weight", "2.bias"):
            assert torch.equal(parts[key], task_adapter[f"model.mm_projector.{key}"])
            received = parts[f"pilot.others.0.{key}"]
            assert torch.equal(received, other[f"model.mm_projector.{key}"])
        own = load_file(folder / "own" / "0003.safetensors")
        assert all(torch.equal(parts[key], tensor) for key, tensor in own.items())
    a, b = (load_file(out / f"clients/{n}/adapter_model.safetensors") for n in "ab")
    assert any(not torch.equal(a[key], b[key]) for key in a)  # personal


def test_stage_1_is_trained_with_the_client_adapter_and_its_rate(pilot, tmp_path):
    still = pilot(tmp_path / "still", pilot_stage1_learning_rate=0, learning_rate=1e-2)
    assert still[0]["norms"] == [0, 0, 0]
    assert min(still[1]["norms"]) > 0
    own = {
        n: load_file(tmp_path / f"still/clients/a/own/{n}.safetensors") for n in ("0002", "0003")
    }
    kept = [key for key in own["0003"] if torch.equal(own["0002"][key], own["0003"][key])]
    assert kept == [key for key in own["0003"] if key.startswith("pilot.client.")]


@pytest.mark.parametrize("turns", [1, 3, 4, 8])
def test_a_killed_run_goes_on_to_the_same_bits(pilot, tmp_path, monkeypatch, turns):
    saving = {"save_strategy": "steps", "save_steps": 2}
    pilot(tmp_path / "whole", **saving)
    with monkeypatch.context() as patch:
        stop_after(patch, turns)
        with pytest.raises(StopError):
            pilot(tmp_path / "cut", **saving)
    pilot(tmp_path / "cut", **saving)
    whole, cut = files(tmp_path / "whole"), files(tmp_path / "cut")
    assert whole.keys() == cut.keys()
    assert len(whole) > 12
    assert [name for name in whole if whole[name] != cut[name]] == []


def test_a_client_that_missed_rounds_gets_todays_adapters(pilot, tmp_path):
    records = pilot(tmp_path / "run", fed_rounds=5, fed_clients_per_round=2)
    there = [set(r["clients"]) for r in records]
    assert len(there) == 6
    assert any(s != there[0] for s in there)
    for record in records:
        for name, client in record["clients"].items():
            assert client["samples"] > 0
            assert name in record["facts"]["lora"]


def test_what_is_the_clients_own_is_in_nothing_sent_and_in_no_file_of_the_server(
    pilot, tiny, tmp_path, monkeypatch
):
    """Watches all that a driver is given and gives back, and every file as the server writes it."""
    out, passed, written = tmp_path / "run", [], []
    run = ResidentDriver.run

    def watched(self, turns, go_on):
        for turn, update in run(self, turns, go_on):
            passed.append(("down", turn.name, {**turn.state, **turn.extras, **turn.kept}, {}))
            up = {**update.state, **update.extras, **update.kept}
            passed.append(("up", turn.name, up, update.metrics))
            yield turn, update

    replace = os.replace

    def renamed(source, target, **kwargs):
        replace(source, target, **kwargs)
        if out / "clients" not in Path(target).parents:
            written.append((Path(target), Path(target).read_bytes()))

    monkeypatch.setattr(ResidentDriver, "run", watched)
    monkeypatch.setattr(os, "replace", renamed)
    pilot(out, save_strategy="steps", save_steps=2, report_to="tensorboard")

    private = {}  # by client and name: all values that were a client's own after a turn
    for name in TASKS:
        for file in (out / "clients" / name / "own").iterdir():
            for key, tensor in load_file(file).items():
                private[name, file.stem, key] = tensor
    assert len(private) == 3 * 2 * 10
    shapes = {"0.weight": (48, 32), "0.bias": (48,), "2.weight": (48, 48), "2.bias": (48,)}
    adapter = {f"model.mm_projector.{name}": shape for name, shape in shapes.items()}
    lora = {key for key in passed[0][2] if ".lora_" in key}
    assert len(passed) == 2 * 3 * 3
    assert len(lora) == 2 * 2 * 7
    for direction, client, tensors, metrics in passed:
        own = TASKS[client]
        allowed = {**adapter}
        if direction == "down":
            others = {"colour", "shape"} - {own}
            allowed |= {f"{task}/{n}": s for task in others for n, s in adapter.items()}
        assert tensors.keys() - lora <= allowed.keys()
        assert all(tuple(tensors[n].shape) == allowed[n] for n in tensors.keys() - lora)
        assert metrics.keys() <= {"loss", "steps", "seconds", "parameters"}
        assert not any(equal(t, mine) for t in tensors.values() for mine in private.values())

    server = [f for f in out.rglob("*") if f.is_file() and out / "clients" not in f.parents]
    assert {"state.safetensors", "rounds.jsonl", "mm_projector.bin"} <= {f.name for f in server}
    assert any("tfevents" in f.name for f in server)
    assert len(written) > 15
    kinds = {f.suffix for f, _ in written}
    assert kinds == {".safetensors", ".jsonl", ".bin", ".json"}
    needles = [t.numpy().tobytes() for t in private.values() if t.any()]
    for name, content in [*written, *((f, f.read_bytes()) for f in server)]:
        for word in (b"pilot.client", b"pilot.cross", b"pilot.router"):
            assert word not in content, name
        assert not any(needle in content for needle in needles), name
    for event in (f for f in server if "tfevents" in f.name):
        assert b"clients/a/loss" in event.read_bytes()  # means of a round
        assert b"clients/a/grad_norm" not in event.read_bytes()  # of single steps
    records = (out / "rounds.jsonl").read_text()
    assert "a picture" not in records
    assert "a-1.png" not in records


@pytest.mark.slow  # six processes: clients' own parameters go into them and come back
def test_scripts_give_what_the_resident_driver_gives(pilot, tiny, tmp_path, monkeypatch):
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    monkeypatch.setenv("TUNE", "False")
    launcher = f"{sys.executable} -m llava.train.train --per_device_train_batch_size 2"
    more = "--lora_enable True --mm_projector_type pilot --pilot_router_own 0"
    (tmp_path / "client.sh").write_text(SCRIPT.format(launcher=launcher, tiny=tiny, more=more))
    common = {"fed_rounds": 1, "pilot_stage1_learning_rate": 5e-3, "fed_clients": tmp_path / "two"}
    common |= EVEN_ROUTER
    entry = "{{name: {0}, task: {1}, data_path: {2}/{0}.json, image_folder: {2}/images}}"
    entries = [entry.format(name, task, tiny) for name, task in (("a", "colour"), ("b", "shape"))]
    (tmp_path / "two").write_text("clients:\n" + "".join(f"  - {e}\n" for e in entries))
    command = {"fed_driver": "script", "fed_client_command": f"bash {tmp_path}/client.sh"}
    records = {
        "resident": pilot(tmp_path / "resident", fed_lr_schedule="round", **common),
        "script": pilot(tmp_path / "script", **command, **common),
    }
    pilot(tmp_path / "start", **{**common, "pilot_stage1_learning_rate": 0, "learning_rate": 0})
    assert len(records["script"]) == 2
    for one, other in zip(*records.values(), strict=True):
        for client, facts in one["clients"].items():
            assert other["clients"][client]["loss"] == pytest.approx(facts["loss"], rel=1e-5)
    for file in (
        *("tasks/colour/mm_projector.bin", "tasks/shape/mm_projector.bin"),
        *("clients/a/non_lora_trainables.bin", "clients/b/adapter_model.safetensors"),
        *("clients/a/own/0002.safetensors", "clients/b/own/0002.safetensors"),
    ):
        runs = (states.read_tensors(tmp_path / n / file) for n in ("script", "resident", "start"))
        assert_moved_alike(*runs, 0.01)


def equal(a: torch.Tensor, b: torch.Tensor) -> bool:
    return a.shape == b.shape and bool(b.any()) and torch.equal(a.float(), b.float())


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"mm_projector_type": "mlp2x_gelu"}, "--mm_projector_type pilot go together"),
        ({"fed_method": "fedavg"}, "--mm_projector_type pilot go together"),
        ({"fed_pool": True}, "no place with --fed_pool"),
        ({"pilot_stage": 1}, "--pilot_stage has no place"),
        ({"pilot_init": "half"}, "pilot_init is 'half'"),
        ({"pilot_top_k": 3}, r"pilot_top_k is 3, expected 0 \(all\) to 2"),
        ({"fed_options": "neighbours=-1"}, "neighbours"),
        ({"fed_options": "weighting=near"}, "weighting"),
    ],
)
def test_bad_flags(pilot, tmp_path, changes, message):
    with pytest.raises(InputError, match=message):
        pilot(tmp_path / "run", **changes)
    assert not (tmp_path / "run" / "fed").exists()


def test_a_client_without_a_task_is_named(pilot, tiny, tmp_path):
    (tmp_path / "other.yaml").write_text(
        f"clients:\n  - {{name: north, data_path: {tiny}/a.json, image_folder: {tiny}/images}}\n"
    )
    with pytest.raises(InputError, match="client north of .*other.yaml has no `task`"):
        pilot(tmp_path / "run", fed_clients=tmp_path / "other.yaml")


def test_a_client_may_join_later_with_the_others_adapters(pilot, tiny, tmp_path):
    text = (tmp_path / "pilot.yaml").read_text()
    (tmp_path / "late.yaml").write_text(text.replace("task: shape", "task: shape, from_round: 3"))
    records = pilot(tmp_path / "run", fed_clients=tmp_path / "late.yaml")
    assert [r["clients"]["c"]["samples"] for r in records] == [0, 0, 9]
    assert [list(r["facts"]["tasks"]) for r in records] == [
        ["colour"],
        ["colour"],
        ["colour", "shape"],
    ]
    assert (tmp_path / "run/clients/c/config.json").exists()
    (tmp_path / "none.yaml").write_text(text.replace("task:", "from_round: 2, task:"))
    with pytest.raises(InputError, match="no client has from_round 1"):
        pilot(tmp_path / "never", fed_clients=tmp_path / "none.yaml")


def test_other_tools_take_what_it_leaves_or_say_why_not(pilot, tiny, tmp_path):
    """Merging LoRA in, extracting a connector, merging experts, other layouts."""
    pilot(tmp_path / "run", fed_rounds=1)
    clients, base = tmp_path / "run/clients", str(tiny / "llm")
    a, full = str(clients / "a"), str(tmp_path / "full")
    tool("merge_lora_weights")(["--model-path", a, "--model-base", base, "--save-model-path", full])
    _, whole, _, _ = load_pretrained_model(full, None, "x", device="cpu")
    _, apart, _, _ = load_pretrained_model(a, base, "x", device="cpu")
    pixels = torch.randn(1, 3, 16, 16)
    torch.testing.assert_close(whole.encode_images(pixels), apart.encode_images(pixels))
    tool("extract_mm_projector")(
        ["--model-path", full, "--output", str(tmp_path / "connector.bin")]
    )
    load_projector(apart, states.load(tmp_path / "connector.bin"), "connector.bin")
    torch.testing.assert_close(whole.encode_images(pixels), apart.encode_images(pixels))

    with pytest.raises(InputError, match="c has mm_pilot tasks .'shape', 'colour'., .*a has"):
        merge([a, str(clients / "c")], str(tmp_path / "merged"), method="linear", scope="all")
    merge([a, str(clients / "b")], str(tmp_path / "merged"), method="linear", scope="all")
    load_pretrained_model(str(tmp_path / "merged"), base, "x", device="cpu")
    with pytest.raises(InputError, match="mm_projector_type is 'pilot', which the other layout"):
        convert.main(["--to", "hf", "--model-path", full, "--output", str(tmp_path / "hf")])


@pytest.mark.parametrize("bits", [4, 8])
def test_qlora_learns_beside_quantised_weights_after_an_evaluation_too(pilot, tiny, tmp_path, bits):
    pytest.importorskip("bitsandbytes")
    llm = tmp_path / "llm"  # of a width that bitsandbytes could repack
    make_llm(llm, hidden_size=64)
    out, unmeasured = tmp_path / "measured", tmp_path / "unmeasured"
    common = {"model_name_or_path": llm, "fed_rounds": 1, "bits": bits}
    pilot(out, **common, fed_eval_data_path=tiny / "heldout.json", fed_eval_every=1)
    pilot(unmeasured, **common)
    drift = load_file(out / "clients/a/adapter_model.safetensors")
    assert any(t.abs().max() > 0 for n, t in drift.items() if "lora_B" in n)
    for name, tensor in load_file(unmeasured / "clients/a/adapter_model.safetensors").items():
        torch.testing.assert_close(drift[name], tensor, rtol=0, atol=0)
    model = load_pretrained_model(
        str(out / "clients/a"), str(llm), "a", device="cpu", **{f"load_{bits}bit": True}
    )[1]
    kinds = {p.dtype for n, p in model.named_parameters() if "q_proj" in n and "lora" not in n}
    assert kinds == {torch.uint8 if bits == 4 else torch.int8}
    assert {p.dtype for n, p in model.named_parameters() if "mm_projector" in n} == {torch.float32}
