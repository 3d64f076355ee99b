"""Private training from the command line: its steps, what it leaves, and what it refuses."""

from __future__ import annotations

import json
import secrets
import shutil

import pytest
import torch

from llava.errors import InputError
from llava.state import load
from llava.train.arguments import DataArguments, ModelArguments, TrainingArguments, parse
from llava.train.data import DataCollatorForSupervisedDataset, LazySupervisedDataset
from llava.train.private_arguments import PrivacyArguments, check_goes_with, check_privacy
from llava.train.private_noise import NoiseSecret
from llava.train.private_run import passes
from llava.train.private_trainer import PrivateSteps, PrivateTrainer
from llava.train.session import load_session
from llava.train.train import make_trainer, train

PRIVATE = {"fed_dp_epsilon": 8, "fed_dp_delta": 1e-6, "fed_dp_clip": 0.5}
LORA = {"tune_mm_mlp_adapter": False, "lora_enable": True, "lora_r": 2, "lora_dropout": 0.0,
        "version": "v1"}  # fmt: skip
PLAIN = {"optim": "sgd", "lr_scheduler_type": "constant", "learning_rate": 1.0, "max_grad_norm": 0}


@pytest.fixture
def moved(flags, tiny, tmp_path):
    """`moved(noise, clip, …)`: how far a run of SGD with rate 1 has moved each tensor."""

    def run(noise, clip, samples=12, **changes):
        args = parse(flags(**PLAIN, **changes))
        session = load_session(*args)
        data = LazySupervisedDataset(
            str(tiny / "a.json"), session.tokenizer, args[1], sample_format=session.sample_format
        )
        trainer = make_trainer(
            session,
            args[2],
            kind=PrivateTrainer,
            private=PrivateSteps(clip, noise, NoiseSecret(tmp_path / "secret.json"), "x"),
            train_dataset=data.select(range(samples)),
            data_collator=DataCollatorForSupervisedDataset(session.tokenizer),
            progress=False,
        )
        own = {n: p for n, p in session.model.named_parameters() if p.requires_grad}
        before = {n: p.detach().clone() for n, p in own.items()}
        trainer.train()
        return {n: (p.detach() - before[n]).double() for n, p in own.items()}, (session, data)

    return run


def flat(tensors) -> torch.Tensor:
    return torch.cat([tensors[name].flatten() for name in sorted(tensors)])


def test_a_step_is_the_clipped_sum_over_a_fixed_number_of_samples(moved):
    # 5 samples in batches of 2, 4 to a step: one step of 4 and one of 1, each divided by 4.
    more = {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 2}
    found, (session, data) = moved(0.0, 0.01, samples=5, **more)
    assert flat(found).norm() <= (4 + 1) * 0.01 / 4 * (1 + 1e-4)
    one, _ = moved(0.0, 0.01, samples=4, **more)
    two, _ = moved(0.0, 0.01, samples=4, per_device_train_batch_size=4)
    torch.testing.assert_close(flat(one), flat(two), rtol=1e-3, atol=1e-7)
    collate = DataCollatorForSupervisedDataset(session.tokenizer)
    fresh, (session, data) = moved(0.0, 0.01, samples=4, per_device_train_batch_size=4)
    model, total = session.model, 0.0
    with torch.no_grad():  # back to where the run began
        for name, parameter in model.named_parameters():
            if name in fresh:
                parameter -= fresh[name].float()
    for i in range(4):
        model.zero_grad()
        model(**collate([data[i]])).loss.backward()
        own = flat({n: p.grad.double() for n, p in model.named_parameters() if n in fresh})
        total = total + own * min(1, 0.01 / float(own.norm()))
    torch.testing.assert_close(flat(fresh), -total / 4, rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize("accumulated", [1, 3])
def test_noise_is_added_once_a_step_to_every_tensor(moved, accumulated):
    more = {"per_device_train_batch_size": 12 // accumulated,
            "gradient_accumulation_steps": accumulated}  # fmt: skip
    without, _ = moved(0.0, 0.01, **more)
    noisy, _ = moved(2.0, 0.01, **more)
    for name, tensor in noisy.items():
        noise = (tensor - without[name]).flatten()
        expected = 2.0 * 0.01 / 12
        bound = 6 / (2 * noise.numel()) ** 0.5
        assert noise.std().item() == pytest.approx(expected, rel=bound), name
    assert abs(flat(noisy).mean().item()) < 6 * expected / flat(noisy).numel() ** 0.5


@pytest.mark.parametrize(
    "changes",
    [{}, {"bf16": True, "gradient_accumulation_steps": 2}, {**LORA, "bf16": True},
     {**LORA, "gradient_checkpointing": True}, {"num_train_epochs": 2}],
)  # fmt: skip
def test_a_run_states_its_guarantee_and_leaves_it_beside_the_checkpoint(
    flags, tiny, tmp_path, capsys, changes
):
    train(argv=flags(data_path=tiny / "a.json", **PRIVATE, **changes))
    out, entries = tmp_path / "out", changes.get("num_train_epochs", 1)
    found = json.loads((out / "privacy.json").read_text())
    stated = found["guarantees"]["run"]
    assert found["finished"] is True
    assert stated["epsilon"] == pytest.approx(8, abs=1e-6)
    assert (stated["entries"], stated["records"]) == (entries, 12)
    assert stated["noise"] == pytest.approx(0.652935385 * entries**0.5, rel=1e-6)
    card = (out / "README.md").read_text()
    assert f"| run | 8 | 1e-06 | 18.651 | 12 | {entries} |" in card
    for text in found["assumptions"]:
        assert f"- {text}" in card
    often = "one step" if entries == 1 else "2 steps"
    said = capsys.readouterr().out
    assert f"this run is private: epsilon 8 at delta 1e-06 for a record of 12, which enters {often}" in said  # fmt: skip # noqa: E501
    assert not (out / "noise").exists()
    train(argv=flags(data_path=tiny / "a.json", **PRIVATE, **changes))
    assert "already trained, nothing to do" in capsys.readouterr().out


def test_a_language_model_alone_learns_texts_in_private(flags, tiny, tmp_path):
    turns = [{"from": "human", "value": "Say."}, {"from": "gpt", "value": "red and blue"}]
    records = [{"id": str(i), "conversations": turns} for i in range(6)]
    (tmp_path / "texts.json").write_text(json.dumps(records))
    train(argv=flags(data_path=tmp_path / "texts.json", vision_tower=None, **LORA, **PRIVATE))
    assert (tmp_path / "out/privacy.json").exists()


@pytest.mark.parametrize("changes", [{}, {"num_train_epochs": 2}])
def test_killed_and_started_again_it_ends_in_the_same_bits(
    flags, tiny, tmp_path, monkeypatch, changes
):
    monkeypatch.setattr(secrets, "token_hex", lambda count: "5a" * count)
    saving = {"data_path": tiny / "a.json", "save_strategy": "steps", "save_steps": 2, **changes}
    train(argv=flags(**saving, **PRIVATE, output_dir=tmp_path / "whole"))

    class Killed(Exception):  # noqa: N818
        pass

    steps, step = [], PrivateTrainer.training_step

    def until(self, *args):
        steps.append(1)
        if len(steps) == 4:
            raise Killed
        return step(self, *args)

    cut = tmp_path / "cut"
    with monkeypatch.context() as patch:
        patch.setattr(PrivateTrainer, "training_step", until)
        with pytest.raises(Killed):
            train(argv=flags(**saving, **PRIVATE, output_dir=cut))
    assert [p.name for p in cut.glob("checkpoint-*")] == ["checkpoint-2"]
    assert json.loads((cut / "privacy.json").read_text())["finished"] is False
    with monkeypatch.context() as patch:  # what is drawn now is not what was drawn then
        patch.setattr(secrets, "token_hex", lambda count: "a5" * count)
        train(argv=flags(**saving, **PRIVATE, output_dir=cut))
    a, b = ((tmp_path / n / "mm_projector.bin").read_bytes() for n in ("whole", "cut"))
    assert a == b


def test_another_secret_ends_elsewhere(flags, tiny, tmp_path):
    for name in ("a", "b"):
        train(argv=flags(data_path=tiny / "a.json", **PRIVATE, output_dir=tmp_path / name))
    a, b = (load(tmp_path / name / "mm_projector.bin") for name in ("a", "b"))
    assert all(not torch.equal(a[name], b[name]) for name in a)


def test_a_run_of_other_flags_is_not_gone_on_with(flags, tiny, tmp_path):
    saving = {"data_path": tiny / "a.json", "save_strategy": "steps", "save_steps": 2}
    train(argv=flags(**saving))
    with pytest.raises(InputError, match="holds a run with --fed_dp_clip = 'None', now it is"):
        train(argv=flags(**saving, **PRIVATE))
    # A folder of which all but the noise was lost: its records' privacy is partly spent.
    out = tmp_path / "out"
    shutil.rmtree(out)
    NoiseSecret(out / "noise" / "run.json").begin("the run", "of other flags")
    with pytest.raises(InputError, match="the run has begun before from another state"):
        train(argv=flags(**saving, **PRIVATE))


REFUSED = [
    ({"fed_dp_epsilon": 0}, "--fed_dp_epsilon is 0, more than 0 and at most 500 is expected"),
    ({"fed_dp_epsilon": -1}, "--fed_dp_epsilon is -1, more than 0"),
    ({"fed_dp_epsilon": "nan"}, "--fed_dp_epsilon is nan, more than 0"),
    ({"fed_dp_epsilon": 501}, "--fed_dp_epsilon is 501, more than 0 and at most 500"),
    ({"fed_dp_epsilon": None, "fed_dp_noise": 0}, "--fed_dp_noise is 0, more than 0 is expected"),
    ({"fed_dp_epsilon": None, "fed_dp_noise": "inf"}, "--fed_dp_noise is inf, more than 0"),
    ({"fed_dp_noise": 1}, "one of --fed_dp_epsilon or --fed_dp_noise is expected, found both"),
    ({"fed_dp_clip": 0}, "--fed_dp_clip is 0, more than 0 is expected"),
    ({"fed_dp_clip": None}, "private training needs --fed_dp_clip"),
    ({"fed_dp_delta": None}, "private training needs --fed_dp_delta"),
    ({"fed_dp_delta": 0}, "--fed_dp_delta is 0, more than 0 and at most 1 is expected"),
    ({"fed_dp_epsilon": None}, "--fed_dp_clip is for private training: --fed_dp_epsilon or"),
    ({"fed_dp_metrics": "on"}, "--fed_dp_metrics is 'on'; known is off"),
    ({"per_device_train_batch_size": 1}, "a step of one sample has no place"),
    ({"bits": 8, **LORA}, "--bits 8 has no place in private training"),
    ({"lora_dropout": 0.05, "lora_enable": True, "tune_mm_mlp_adapter": False},
     "--lora_dropout 0.05 has no place"),
    ({"group_by_modality_length": True}, "--group_by_modality_length True has no place"),
    ({"train_sampling_strategy": "group_by_length"}, "group_by_length has no place"),
    ({"label_smoothing_factor": 0.1}, "--label_smoothing_factor 0.1 has no place"),
    ({"optim": "lomo"}, "--optim lomo has no place"),
    ({"lr_scheduler_type": "reduce_lr_on_plateau", "eval_strategy": "epoch"},
     "--lr_scheduler_type reduce_lr_on_plateau has no place"),
    ({"auto_find_batch_size": True}, "--auto_find_batch_size True has no place"),
    ({"ignore_data_skip": True}, "--ignore_data_skip True has no place"),
    ({"neftune_noise_alpha": 5}, "--neftune_noise_alpha 5.0 has no place"),
    ({"resume_from_checkpoint": "True"}, "--resume_from_checkpoint True has no place"),
    ({"push_to_hub": True}, "--push_to_hub True has no place"),
    ({"torch_compile": True}, "--torch_compile True has no place"),
]  # fmt: skip


@pytest.mark.parametrize(("changes", "message"), REFUSED)
def test_flags_that_do_not_fit_are_refused(flags, changes, message):
    kinds = (ModelArguments, DataArguments, TrainingArguments, PrivacyArguments)
    *_, args, privacy = parse(flags(**{**PRIVATE, **changes}), *kinds)
    with pytest.raises(InputError, match=message):
        check_privacy(privacy) or check_goes_with(args)


def test_what_the_data_or_the_model_do_not_fit_is_refused_before_anything_is_written(
    flags, tiny, tmp_path
):
    records = json.loads((tiny / "a.json").read_text())
    records[3]["image"] = [records[3]["image"], records[4]["image"]]
    records[3]["conversations"][0]["value"] = "<image><image>\nWhat are these?"
    two = tmp_path / "two.json"
    two.write_text(json.dumps(records))
    for changes, message in (
        ({"data_path": two}, "two.json: record 3 .* has 2 pictures; private training takes one"),
        ({"fed_dp_delta": 0.1}, "--data_path: --fed_dp_delta is 0.1, at most 1 / 12 is expected"),
        ({"mm_use_im_start_end": True}, "picture_rows trains in a Embedding; private training"),
        ({"tune_mm_mlp_adapter": False}, "embed_tokens.weight trains in a Embedding"),
        ({"mm_projector_type": "pilot"}, "PilotConnector adds a loss over the pictures"),
        ({"fed_dp_epsilon": None, "fed_dp_noise": 0.01}, "an epsilon above 500"),
    ):
        with pytest.raises(InputError, match=message):
            train(argv=flags(**{"data_path": tiny / "a.json", **PRIVATE, **changes}))
        assert list((tmp_path / "out").iterdir()) == []


@pytest.mark.parametrize(
    ("changes", "samples", "expected"),
    [
        ({}, 12, 1),
        ({"num_train_epochs": 3}, 12, 3),
        ({"num_train_epochs": 1.5}, 12, 2),
        ({"max_steps": 6}, 12, 1),
        ({"max_steps": 7}, 12, 2),
        ({"max_steps": 6}, 0, 0),
        ({"max_steps": 6, "gradient_accumulation_steps": 4}, 12, 3),
        ({"max_steps": 6, "dataloader_drop_last": True}, 11, 2),
    ],
)
def test_how_often_a_record_is_seen(flags, changes, samples, expected):
    assert passes(parse(flags(**changes))[2], samples) == expected


@pytest.mark.parametrize("changes", [{"num_train_epochs": 1.5}, {"max_steps": 9},
                                     {"max_steps": 5, "dataloader_drop_last": True}])  # fmt: skip
def test_no_record_is_seen_more_often_than_is_stated(moved, flags, monkeypatch, changes):
    seen = []
    get = LazySupervisedDataset.__getitem__
    monkeypatch.setattr(
        LazySupervisedDataset, "__getitem__", lambda self, i: (seen.append(i), get(self, i))[1]
    )
    moved(0.0, 1.0, samples=11, **changes)
    stated = passes(parse(flags(**changes))[2], 11)
    assert max(seen.count(i) for i in range(11)) <= stated
    assert stated == 2 or changes.get("dataloader_drop_last")


@pytest.mark.parametrize("changes", [{}, {"train_sampling_strategy": "sequential"}])
def test_the_order_of_samples_follows_from_the_seed_alone(moved, monkeypatch, changes):
    """Whatever a step has drawn: how much that is may follow from how long samples are."""
    step, get, orders = PrivateTrainer.training_step, LazySupervisedDataset.__getitem__, []
    monkeypatch.setattr(
        LazySupervisedDataset,
        "__getitem__",
        lambda self, i: (orders[-1].append(self.records[i]["id"]), get(self, i))[1],
    )
    for draws in (0, 3):

        def drawing(self, *args, draws=draws):
            torch.rand(draws)
            return step(self, *args)

        monkeypatch.setattr(PrivateTrainer, "training_step", drawing)
        orders.append([])
        moved(0.0, 1.0, num_train_epochs=3, **changes)
    assert orders[0] == orders[1]
    assert len(orders[0]) == 36
