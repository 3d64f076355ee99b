"""The ranks of names, against the score of every name by itself."""

from __future__ import annotations

import json

import pytest
import torch

from llava.errors import InputError
from llava.eval.name_ranking import names_of, rank_names
from llava.train.arguments import parse
from llava.train.data import DataCollatorForSupervisedDataset, LazySupervisedDataset
from llava.train.session import load_session

NAMES = [f"{colour} {shape}" for colour in ("red", "blue", "green", "white", "black")
         for shape in ("circle", "square", "big square", "star", "circle on a star")]  # fmt: skip


@pytest.fixture(scope="module")
def session(tiny):
    argv = ["--model_name_or_path", str(tiny / "llm"), "--vision_tower", str(tiny / "vision_tower"),
            "--version", "plain", "--mm_projector_type", "mlp2x_gelu", "--mm_use_im_patch_token",
            "False", "--mm_vision_select_layer", "-2", "--image_folder", str(tiny / "images"),
            "--output_dir", "unused", "--report_to", "none"]  # fmt: skip
    session = load_session(*parse(argv))
    with torch.no_grad():  # large weights, or all names would be nearly alike
        for parameter in session.model.parameters():
            parameter.mul_(4 if parameter.ndim == 2 else 1)
    session.model.eval()
    return session


@pytest.fixture
def data(session, tiny):
    """`data(conversation, …)`: the pictures of heldout.json with these, in turn."""
    pictures = [r["image"] for r in json.loads((tiny / "heldout.json").read_text())]

    class Args:
        image_folder = str(tiny / "images")
        skip_bad_images = False

    def make(*conversations, version="plain"):
        records = []
        for i, turns in enumerate(conversations):
            speakers = ("human", "gpt") * len(turns)
            shown = sum(turn.count("<image>") for turn in turns)
            records.append({
                "conversations": [
                    {"from": who, "value": said} for who, said in zip(speakers, turns, strict=False)
                ],
                **({"image": [pictures[(i + j) % 6] for j in range(shown)]} if shown else {}),
            })  # fmt: skip
        sample_format = session.sample_format
        sample_format = type(sample_format)(**{**vars(sample_format), "version": version})
        return LazySupervisedDataset(records, session.tokenizer, Args, sample_format=sample_format)

    return make


def every_score(session, dataset, index, names) -> list[float]:
    """The log-probability of each name as the last answer of a sample."""
    collate, found = DataCollatorForSupervisedDataset(session.tokenizer), []
    record = dataset.records[index]
    *before, last = record["conversations"]
    earlier = dataset.select([index])
    for name in names:
        earlier.records = [{**record, "conversations": [*before, {**last, "value": name}]}]
        item = earlier[0]
        learnt = item["labels"] != -100
        item["labels"][: int((~learnt).nonzero()[-1]) + 1] = -100  # earlier answers are given
        batch = collate([item])
        with torch.no_grad():
            found.append(-float(session.model(**batch).loss) * len(batch["label_positions"]))
    return found


def assert_right(session, dataset, names, best=5, batch_size=4):
    collate = DataCollatorForSupervisedDataset(session.tokenizer)
    ranked = rank_names(session.model, dataset, collate, names, batch_size, best)
    for i, found in enumerate(ranked):
        scores = every_score(session, dataset, i, names)
        order = sorted(range(len(names)), key=lambda n: -scores[n])
        own = names.index(dataset.records[i]["conversations"][-1]["value"])
        rank = order.index(own) + 1
        assert found.rank == (rank if rank <= best else None)
        assert found.names == [names[n] for n in order[: min(rank, best)]]
        expected = [scores[n] for n in order[: min(rank, best)]]
        assert found.scores == pytest.approx(expected, rel=1e-4)
    return ranked


def test_the_best_names_are_those_of_every_name_by_itself(session, data):
    captions = data(*(["<image>\nWhat is this?", name] for name in NAMES[::5]))
    ranked = assert_right(session, captions, NAMES)
    assert len({tuple(found.names[:1]) for found in ranked}) > 1, "the picture decides nothing"
    assert_right(session, captions, NAMES[::-1], best=25, batch_size=64)


def test_questions_of_any_length_and_several_turns(session, data):
    asked = data(
        ["<image>\nWhat is this?", "red star"],
        ["<image>\nWhat is it?", "red star"],
        ["<image>\nIs it red?", "yes", "And what is it in all?", "blue square"],
        ["<image>\nand <image>\nWhat do they show?", "green circle on a star"],
        version="v1",
    )
    names = [*NAMES, "yes"]
    assert_right(session, asked, names, best=26)
    together = rank_names(
        session.model, asked, DataCollatorForSupervisedDataset(session.tokenizer), names, best=26
    )
    assert all(found.rank for found in together)


def test_text_alone_is_not_ranked(session, data):
    asked = data(["Hello", "a word"], ["<image>\nWhat?", "star"], version="v1")
    assert names_of(asked) == ["star"]
    collate = DataCollatorForSupervisedDataset(session.tokenizer)
    none, one = rank_names(session.model, asked, collate, ["star"])
    assert none is None
    assert one.rank == 1


def test_pictures_of_one_name_share_a_candidate(session, data):
    captions = data(*(["<image>", name] for name in ("star", "star", "big star")))
    assert names_of(captions) == ["star", "big star"]


def test_a_name_that_is_no_candidate_is_told(session, data):
    collate = DataCollatorForSupervisedDataset(session.tokenizer)
    with pytest.raises(InputError, match="record 0: 'star' is not among the candidate names"):
        rank_names(session.model, data(["<image>", "star"]), collate, ["circle"])


def test_a_candidate_that_does_not_fit_is_told(session, data, monkeypatch):
    collate = DataCollatorForSupervisedDataset(session.tokenizer)
    monkeypatch.setattr(session.tokenizer, "model_max_length", 10)
    with pytest.raises(InputError, match="a candidate name makes .* model_max_length is 10"):
        rank_names(session.model, data(["<image>", "star"]), collate, ["star", "red " * 20])
