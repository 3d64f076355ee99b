"""The same --output_dir once more: the same run goes on, another one is refused by its flag."""

from __future__ import annotations

import json
import shutil

import pytest
import torch

from llava.errors import InputError
from llava.state import load
from llava.train.resume import RUN_FILE
from llava.train.train import train

SAVING = {"save_strategy": "steps", "save_steps": 2}


@pytest.fixture
def run(flags, tiny):
    def run(output_dir, **changes):
        train(argv=flags(**{"data_path": tiny / "a.json", **SAVING, **changes},
                         output_dir=output_dir))  # fmt: skip
        return (output_dir / "mm_projector.bin").read_bytes()

    return run


@pytest.fixture(scope="module")
def module_folder(tmp_path_factory):
    return tmp_path_factory.mktemp("module")


@pytest.fixture
def begun(run, module_folder, tmp_path):
    """A run of 6 steps that was ended after its fourth, and the projector of its end."""
    whole, cut = module_folder / "whole", tmp_path / "cut"
    if not whole.exists():
        run(whole)
    result = (whole / "mm_projector.bin").read_bytes()
    shutil.copytree(whole / "checkpoint-4", cut / "checkpoint-4")
    shutil.copy(whole / RUN_FILE, cut)
    return cut, result


LORA = {"tune_mm_mlp_adapter": False, "lora_enable": True, "version": "v1"}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"data_path": "b.json"}, r"the content of --data_path = '\w{16}', now it is '\w{16}'"),
        ({"data_path": "changed.json"}, "the content of --data_path"),
        ({"seed": 8}, "--seed = '7', now it is '8'"),
        ({"learning_rate": 1e-3}, "--learning_rate = '0.01', now it is '0.001'"),
        ({"optim": "sgd"}, "--optim = 'adamw_torch', now it is 'sgd'"),
        ({"lora_enable": True, "tune_mm_mlp_adapter": False}, "--lora_enable = 'False'"),
        ({"tune_mm_mlp_adapter": False}, "--tune_mm_mlp_adapter = 'True', now it is 'False'"),
        ({"num_train_epochs": 2}, "num_train_epochs = '1.0', now it is '2.0'.*; or go on under "
         "this one with --resume_from_checkpoint .*/checkpoint-4"),
        ({"learning_rate": 1e-3, "resume_from_checkpoint": True}, "--learning_rate"),
    ],
)  # fmt: skip
def test_another_run_is_refused_by_flag_and_nothing_is_touched(
    run, begun, tiny, tmp_path, change, message
):
    cut, _ = begun
    before = sorted(p.name for p in cut.iterdir())
    changed = json.loads((tiny / "a.json").read_text())
    changed[3]["conversations"][1]["value"] = "a picture of another colour"
    (tmp_path / "changed.json").write_text(json.dumps(changed))
    if "data_path" in change:
        folder = tmp_path if "changed" in change["data_path"] else tiny
        change = {"data_path": folder / change["data_path"]}
    with pytest.raises(InputError, match=f"--output_dir .*cut holds a run with .*{message}"):
        run(cut, **change)
    assert sorted(p.name for p in cut.iterdir()) == before


def test_what_does_not_decide_may_change_and_data_may_move(
    run, begun, module_folder, tiny, tmp_path, capsys
):
    cut, _ = begun
    moved = shutil.copy(tiny / "a.json", tmp_path / "moved.json")
    changes = {"save_steps": 3, "logging_steps": 2, "dataloader_num_workers": 1, "run_name": "x",
               "report_to": "tensorboard", "data_path": moved, "feature_cache": "off",
               "gradient_checkpointing": True}  # fmt: skip
    run(cut, **changes)
    assert "continuing after step 4 of 6" in capsys.readouterr().out
    a, b = (load(folder / "mm_projector.bin") for folder in (cut, module_folder / "whole"))
    for name in a:  # without the cache features come of other batches
        torch.testing.assert_close(a[name], b[name], rtol=1e-3, atol=1e-5)


def test_a_finished_run_says_that_nothing_is_left(run, tmp_path, capsys):
    result = run(tmp_path / "x")
    assert "already" not in capsys.readouterr().out
    assert run(tmp_path / "x") == result
    said = capsys.readouterr().out
    assert f"{tmp_path / 'x'}: already trained to step 6, nothing to do" in said
    assert "step 6/6" not in said


def test_a_named_checkpoint_goes_on_for_longer_and_the_same_command_continues_that(
    run, begun, tmp_path, capsys
):
    cut, _ = begun
    longer = {"num_train_epochs": 2}
    run(cut, **longer, resume_from_checkpoint=cut / "checkpoint-4")
    said = capsys.readouterr().out
    assert "continuing after step 4 of 12" in said
    assert "step 5/12" in said
    state = json.loads((cut / "trainer_state.json").read_text())
    assert state["global_step"] == 12
    rates = {e["step"]: e["learning_rate"] for e in state["log_history"] if "learning_rate" in e}
    assert rates[7] == pytest.approx(0.01 * 0.5, rel=1e-6)  # half of a cosine over 12 steps
    result = (cut / "mm_projector.bin").read_bytes()
    shutil.rmtree(cut / "checkpoint-12")
    assert run(cut, **longer) == result


def test_a_checkpoint_of_another_folder_may_be_named(run, begun, tmp_path):
    cut, result = begun
    assert run(tmp_path / "new", resume_from_checkpoint=cut / "checkpoint-4") == result
    with pytest.raises(InputError, match="cut holds a run with --seed = '7', now it is '8'"):
        run(tmp_path / "other", resume_from_checkpoint=cut / "checkpoint-4", seed=8)


@pytest.mark.parametrize(
    ("given", "message"),
    [("none", "none: not a whole checkpoint"), ("False", "False: .*checkpoint-4 is there")],
)
def test_a_named_checkpoint_that_is_none(run, begun, given, message):
    with pytest.raises(InputError, match=f"--resume_from_checkpoint {message}"):
        run(begun[0], resume_from_checkpoint=given)


def test_true_names_the_newest_and_there_must_be_one(run, begun, tmp_path):
    cut, result = begun
    with pytest.raises(InputError, match="--resume_from_checkpoint True: .*no whole checkpoint"):
        run(tmp_path / "new", resume_from_checkpoint=True)
    assert run(cut, resume_from_checkpoint=True) == result


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"optim": "sgd"}, "optimizer's state is not one of --optim sgd"),
        ({"learning_rate": 1e-3}, "checkpoint-4 was trained with learning_rate 0.01, now .* 0.001"),
        ({"mm_projector_lr": 1e-3}, "checkpoint-4 was trained with learning_rate 0.01"),
        ({"lora_enable": True, "tune_mm_mlp_adapter": False},
         "of a run that trains the projector alone, now LoRA would train"),
        ({"tune_mm_mlp_adapter": False}, "the projector alone, now the whole model"),
    ],
)  # fmt: skip
def test_a_folder_without_a_record_is_refused_where_its_checkpoint_shows_another_run(
    run, begun, change, message
):
    cut, _ = begun
    (cut / RUN_FILE).unlink()
    with pytest.raises(InputError, match=message):
        run(cut, **change)


def test_a_folder_without_a_record_goes_on_with_a_word(run, begun, capsys):
    cut, result = begun
    (cut / RUN_FILE).unlink()
    assert run(cut) == result
    assert (
        "checkpoint-4: which flags it was trained with is not recorded" in capsys.readouterr().out
    )
    with pytest.raises(InputError, match="--seed"):
        run(cut, seed=8)


def test_a_folder_in_which_nothing_was_trained_yet_is_free(run, begun, tmp_path):
    cut, _ = begun
    shutil.rmtree(cut / "checkpoint-4")  # killed before the first checkpoint
    assert run(cut, seed=8) == run(tmp_path / "other", seed=8)


def test_a_finished_result_without_checkpoints_is_not_overwritten_by_another_run(
    run, flags, tiny, tmp_path
):
    run(tmp_path / "x", save_strategy="no")
    before = {p.name: p.read_bytes() for p in (tmp_path / "x").iterdir() if p.is_file()}
    with pytest.raises(InputError, match="--lora_enable = 'False', now it is 'True'"):
        train(argv=flags(data_path=tiny / "a.json", output_dir=tmp_path / "x", **LORA))
    assert before == {p.name: p.read_bytes() for p in (tmp_path / "x").iterdir() if p.is_file()}


def test_a_spoilt_record_is_named(run, begun):
    cut, _ = begun
    (cut / RUN_FILE).write_text('{"settings": ')
    with pytest.raises(InputError, match=f"{RUN_FILE}: not the settings of a run"):
        run(cut)
