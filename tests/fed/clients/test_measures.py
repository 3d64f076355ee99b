"""The measures against a literal computation, and `exact` against real greedy generation."""

from __future__ import annotations

import copy
import dataclasses
import shutil

import pytest
import torch
from transformers import MixtralConfig, MixtralForCausalLM

from fed.clients.measures import EvaluationSet, evaluate, explained_share, other_pictures
from llava.conversation import get_template
from llava.mm_utils import tokenizer_image_token
from llava.train.arguments import parse
from llava.train.data import DataCollatorForSupervisedDataset, LazySupervisedDataset
from llava.train.train import load_session, train


@pytest.fixture(scope="module")
def trained(tiny, tmp_path_factory):
    """A model that has learnt something, its held-out set, and its collator."""
    out = tmp_path_factory.mktemp("trained")
    argv = ["--model_name_or_path", str(tiny / "llm"), "--vision_tower", str(tiny / "vision_tower"),
            "--version", "plain", "--mm_projector_type", "mlp2x_gelu", "--mm_use_im_patch_token",
            "False", "--mm_vision_select_layer", "-2", "--image_folder", str(tiny / "images"),
            "--output_dir", str(out), "--save_strategy", "no", "--report_to", "none"]  # fmt: skip
    # The language model too, or so small a one would name nothing.
    learn = ["--data_path", str(tiny / "a.json"), "--learning_rate", "5e-3",
             "--num_train_epochs", "12", "--per_device_train_batch_size", "4"]  # fmt: skip
    train(argv=argv + learn)
    argv[1] = str(out)
    model_args, data_args, training_args = parse(argv)
    session = load_session(model_args, data_args, training_args)
    session.model.eval()
    dataset = LazySupervisedDataset(
        str(tiny / "heldout.json"),
        session.tokenizer,
        data_args,
        sample_format=session.sample_format,
    )
    collator = DataCollatorForSupervisedDataset(session.tokenizer)
    return session, dataset, collator


def test_loss_is_the_mean_over_labelled_tokens(trained):
    session, dataset, collator = trained
    batch = collator([dataset[i] for i in range(len(dataset))])
    expected = float(session.model(**batch).loss)
    for batch_size in (1, 4, 64):
        measured = evaluate(session.model, EvaluationSet("x", dataset), collator, batch_size)
        assert measured["loss"] == pytest.approx(expected, rel=1e-4)
        assert measured["samples"] == 6
        assert measured["domains"] == {}


def test_exact_is_what_greedy_generation_says(trained):
    session, dataset, collator = trained
    domains = [record["conversations"][1]["value"] for record in dataset.records]
    measured = evaluate(session.model, EvaluationSet("x", dataset, domains), collator, 2)
    ids = tokenizer_image_token("<image>", session.tokenizer, return_tensors="pt")
    right = {}
    for i, record in enumerate(dataset.records):
        wanted = [t for t in dataset[i]["labels"].tolist() if t != -100]
        said = session.model.generate(
            ids[None],
            images=dataset[i]["images"],
            do_sample=False,
            max_new_tokens=len(wanted),
            pad_token_id=0,
            eos_token_id=-1,
        )[0].tolist()
        right.setdefault(record["conversations"][1]["value"], []).append(said == wanted)
    flat = [r for group in right.values() for r in group]
    assert sum(flat) > 0, "the model learnt nothing, so this would test nothing"
    assert measured["exact"] == pytest.approx(sum(flat) / len(flat))
    for name, group in right.items():
        assert measured["domains"][name]["exact"] == pytest.approx(sum(group) / len(group))
        assert measured["domains"][name]["samples"] == len(group)


def test_domains_add_up_to_the_whole(trained):
    session, dataset, collator = trained
    measured = evaluate(
        session.model, EvaluationSet("x", dataset, ["p", "", "p", "", "", "p"]), collator
    )
    parts = measured["domains"].values()
    assert measured["samples"] == sum(part["samples"] for part in parts) == 6
    assert torch.isfinite(torch.tensor([part["loss"] for part in parts])).all()


class Shown:
    """A data set of which the pictures' paths alone are asked for."""

    def __init__(self, *paths: tuple[str, ...]):
        self.all = paths

    def __len__(self):
        return len(self.all)

    def paths(self, index):
        return list(self.all[index])


@pytest.mark.parametrize(
    ("paths", "expected"),
    [
        ("a b c", {0: 1, 1: 2, 2: 0}),
        ("a a b b", {0: 2, 1: 2, 2: 0, 3: 0}),  # the same picture is not another one
        ("a - b", {0: 2, 2: 0}),  # text alone
        ("a b,c d e,f", {0: 2, 1: 3, 2: 0, 3: 1}),  # as many pictures
        ("a a", {}),
        ("a", {}),
        ("- -", {}),
    ],
)
def test_the_next_sample_with_other_pictures(paths, expected):
    shown = [() if word == "-" else tuple(word.split(",")) for word in paths.split()]
    assert other_pictures(Shown(*shown)) == expected


def test_explained_share_is_what_other_pictures_cost(trained):
    session, dataset, collator = trained
    taken = other_pictures(dataset)
    items = [dataset[i] for i in taken]
    swapped = [{**items[i], "images": dataset[j]["images"]} for i, j in enumerate(taken.values())]
    own, other = (float(session.model(**collator(rows)).loss) for rows in (items, swapped))
    assert len(taken) == 6
    for batch_size in (1, 4, 64):
        found = explained_share(session.model, dataset, collator, batch_size)
        assert found.share == pytest.approx((other - own) / other, rel=1e-3)
    assert (found.samples, found.own / found.tokens) == (6, pytest.approx(own, rel=1e-4))

    def nats(row):
        batch = collator([row])
        return float(session.model(**batch).loss) * batch["label_positions"].numel()

    singles = [(nats(a), nats(b)) for a, b in zip(items, swapped, strict=True)]
    ratio = 1 - found.share
    spread = sum((a - ratio * b) ** 2 for a, b in singles)
    assert found.spread == pytest.approx(spread, rel=1e-3)
    assert found.share > 0.1, "the model learnt nothing of pictures, so this would test little"
    measured = evaluate(session.model, EvaluationSet("x", dataset), collator, 4, explained=True)
    assert measured["explained"] == pytest.approx(found.share, rel=1e-3)
    assert measured["other_loss"] == pytest.approx(other, rel=1e-4)
    assert "explained" not in evaluate(session.model, EvaluationSet("x", dataset), collator, 4)


def test_pictures_that_tell_nothing_explain_nothing(trained):
    session, dataset, collator = trained
    blank = copy.copy(dataset)
    pixels = dataset[0]["images"][0]
    blank._picture = lambda path: pixels
    assert explained_share(session.model, blank, collator).share == 0
    told = [record["conversations"] for record in dataset.records]
    wrong = copy.copy(dataset)  # each sample has the caption of the one before the last
    wrong.records = [
        {**record, "conversations": told[i - 2]} for i, record in enumerate(dataset.records)
    ]
    assert explained_share(session.model, wrong, collator).share < 0.05


def test_a_part_of_the_samples_borrows_within_itself(trained):
    session, dataset, collator = trained
    part = explained_share(session.model, dataset, collator, 2, indices=[4, 0, 3])
    alone = explained_share(session.model, dataset.select([4, 0, 3]), collator, 2)
    assert part == alone
    assert part.samples == 3
    assert explained_share(session.model, dataset, collator, indices=[2]) == (0, 0, 0, 0, 0)


def test_text_alone_and_several_turns(trained):
    """Text alone lies in the same batches and counts for nothing; all answers of a talk count."""
    session, dataset, collator = trained
    talks = copy.copy(dataset)
    talks.sample_format = dataclasses.replace(dataset.sample_format, version="v1")
    talks.template = get_template("v1")
    more = [{"from": "human", "value": "And?"}, {"from": "gpt", "value": "green"}]
    talks.records = [{**r, "conversations": r["conversations"] + more} for r in dataset.records]
    texts = {"conversations": [{"from": "human", "value": "Hello"}, *more[1:]]}
    mixed = copy.copy(talks)
    mixed.records = [record for r in talks.records for record in (texts, r)]
    expected = explained_share(session.model, talks, collator, 2)
    found = explained_share(session.model, mixed, collator, 4)
    assert found.samples == 6
    assert (
        found.tokens
        == expected.tokens
        == sum(int((talks[i]["labels"] != -100).sum()) for i in range(6))
    )
    assert found[:2] == pytest.approx(expected[:2], rel=1e-4)
    measured = evaluate(session.model, EvaluationSet("x", mixed), collator, explained=True)
    assert measured["samples"] == 12
    assert measured["explained"] == pytest.approx(found.share, abs=1e-4)


def test_a_domain_without_a_name_is_one(trained):
    session, dataset, collator = trained
    measured = evaluate(session.model, EvaluationSet("x", dataset, ["", "p"] * 3), collator)
    assert measured["samples"] == 6
    assert [part["samples"] for part in measured["domains"].values()] == [3, 3]


def test_one_sample_has_no_other_picture(trained):
    session, dataset, collator = trained
    measured = evaluate(
        session.model, EvaluationSet("x", dataset.select([0])), collator, explained=True
    )
    assert measured["explained"] is None
    assert measured["loss"] > 0


def test_a_mixture_with_trained_routers_is_measured_as_without(tiny, tmp_path):
    """Its base gives the logits of all positions, and adds the routers' loss to its own."""
    shutil.copytree(tiny / "llm", tmp_path / "llm")
    (tmp_path / "llm/model.safetensors").unlink()
    torch.manual_seed(0)
    config = MixtralConfig(
        vocab_size=1200, hidden_size=48, intermediate_size=64, num_hidden_layers=2,
        num_attention_heads=2, num_key_value_heads=1, num_local_experts=4,
        max_position_embeddings=256, output_router_logits=True,
    )  # fmt: skip
    MixtralForCausalLM(config).save_pretrained(tmp_path / "llm")
    argv = ["--model_name_or_path", str(tmp_path / "llm"), "--version", "plain",
            "--vision_tower", str(tiny / "vision_tower"), "--mm_use_im_patch_token", "False",
            "--mm_vision_select_layer", "-2", "--image_folder", str(tiny / "images"),
            "--output_dir", str(tmp_path / "out"), "--save_strategy", "no",
            "--report_to", "none"]  # fmt: skip
    train(argv=[*argv, "--data_path", str(tiny / "a.json"), "--max_steps", "2"])
    model_args, data_args, training_args = parse([argv[0], str(tmp_path / "out"), *argv[2:]])
    session = load_session(model_args, data_args, training_args)
    model = session.model.eval()
    assert model.config.output_router_logits
    held_out = EvaluationSet(
        "x",
        LazySupervisedDataset(
            str(tiny / "heldout.json"),
            session.tokenizer,
            data_args,
            sample_format=session.sample_format,
        ),
    )
    collator = DataCollatorForSupervisedDataset(session.tokenizer)
    found = evaluate(model, held_out, collator, 4)
    model.config.output_router_logits = False
    expected = evaluate(model, held_out, collator, 4)
    assert found["loss"] == pytest.approx(expected["loss"], rel=1e-5)
    assert found["exact"] == expected["exact"]
    assert found["samples"] == 6
