"""A newcomer after a Pilot run fits its own parts, and nothing else."""

from __future__ import annotations

import pytest
import torch
from safetensors.torch import load_file

from fed.personalise import personalise
from llava.errors import InputError
from llava.model.builder import load_pretrained_model
from tests.fed.methods.pilot.test_run import pilot as pilot


@pytest.fixture
def newcomer(flags, tiny, tmp_path):
    def run(**changes):
        values = {
            "pilot_run": tmp_path / "run",
            "pilot_task": "shape",
            "data_path": tiny / "a.json",
            "mm_projector_type": "pilot",
            "tune_mm_mlp_adapter": False,
            "lora_enable": True,
            "lora_r": 2,
            "output_dir": tmp_path / "new",
            **changes,
        }
        personalise(flags(**values))
        out = values["output_dir"]
        connector = torch.load(out / "non_lora_trainables.bin", weights_only=True)
        prefix = "base_model.model.model.mm_projector."
        connector = {name.removeprefix(prefix): tensor for name, tensor in connector.items()}
        return connector, load_file(out / "adapter_model.safetensors")

    return run


def adapter(folder) -> dict[str, torch.Tensor]:
    state = torch.load(folder / "mm_projector.bin", weights_only=True)
    return {name.removeprefix("model.mm_projector."): tensor for name, tensor in state.items()}


@pytest.mark.parametrize("task", ["shape", "size"])
def test_only_its_own_parts_move(pilot, newcomer, tiny, tmp_path, task):
    pilot(tmp_path / "run")
    before = {f: f.read_bytes() for f in (tmp_path / "run").rglob("*") if f.is_file()}
    still, _ = newcomer(pilot_task=task, learning_rate=0, output_dir=tmp_path / "still")
    moved, lora = newcomer(pilot_task=task)
    assert before == {f: f.read_bytes() for f in (tmp_path / "run").rglob("*") if f.is_file()}
    with pytest.raises(InputError, match=f"--pilot_task = '{task}', now it is 'colour'"):
        newcomer(pilot_task="colour")

    tasks = {name: adapter(tmp_path / "run/tasks" / name) for name in ("colour", "shape")}
    others = ["colour"] if task == "shape" else ["colour", "shape"]
    for i, other in enumerate(others):
        for name, tensor in tasks[other].items():
            assert torch.equal(moved[f"pilot.others.{i}.{name}"], tensor)
    if task == "shape":
        assert all(torch.equal(moved[name], tensor) for name, tensor in tasks["shape"].items())
    changed = {name for name in moved if not torch.equal(moved[name], still[name])}
    expected = {n for n in moved if n.startswith(("pilot.cross.", "pilot.router."))}
    if task == "size":
        expected |= set(tasks["shape"])
    assert changed == expected
    parts = [load_file(tmp_path / f"run/clients/{n}/adapter_model.safetensors") for n in "abc"]
    for name, tensor in lora.items():
        torch.testing.assert_close(tensor, sum(part[name] for part in parts) / 3)
    _, model, _, _ = load_pretrained_model(
        str(tmp_path / "new"), str(tiny / "llm"), "x", device="cpu"
    )
    assert model.config.mm_pilot["tasks"] == [task, *others]


def test_killed_it_goes_on_to_the_same_bits(pilot, newcomer, tmp_path):
    pilot(tmp_path / "run")
    saving = {"save_strategy": "steps", "save_steps": 2}
    whole, _ = newcomer(**saving, output_dir=tmp_path / "whole")
    (tmp_path / "cut").mkdir()
    (tmp_path / "whole/checkpoint-4").rename(tmp_path / "cut/checkpoint-4")
    cut, _ = newcomer(**saving, output_dir=tmp_path / "cut")
    assert all(torch.equal(cut[name], whole[name]) for name in whole)


def test_bad_input(pilot, newcomer, tmp_path):
    with pytest.raises(InputError, match="there is no fed/state.safetensors"):
        newcomer()
    with pytest.raises(InputError, match="--pilot_task is missing"):
        newcomer(pilot_task="")
    pilot(tmp_path / "run", fed_rounds=1)
    with pytest.raises(InputError, match="`pilot` is expected here"):
        newcomer(mm_projector_type="mlp2x_gelu")
    with pytest.raises(InputError, match="run: tensor .*lora_A.* has shape"):
        newcomer(lora_r=3)
    pilot(tmp_path / "other", fed_method="local", mm_projector_type="mlp2x_gelu")
    with pytest.raises(InputError, match="a Pilot run with a finished round is expected"):
        newcomer(pilot_run=tmp_path / "other")
    with pytest.raises(InputError, match="--pilot_stage has no place with fed.personalise"):
        newcomer(pilot_stage=1)
    with pytest.raises(InputError, match="--pilot_mixture is False, so there is nothing to fit"):
        newcomer(pilot_mixture=False)
    assert not (tmp_path / "new" / "config.json").exists()
