"""The five best names, against the score of every name by itself."""

from __future__ import annotations

import json

import pytest
import torch

from fed.server.ranking import AMONG, best_names, prefix_tree, rank
from llava.errors import InputError
from llava.train.arguments import parse
from llava.train.data import DataCollatorForSupervisedDataset, LazySupervisedDataset
from llava.train.session import load_session


@pytest.fixture(scope="module")
def session(tiny):
    argv = ["--model_name_or_path", str(tiny / "llm"), "--vision_tower", str(tiny / "vision_tower"),
            "--version", "plain", "--mm_projector_type", "mlp2x_gelu", "--mm_use_im_patch_token",
            "False", "--mm_vision_select_layer", "-2", "--output_dir", "unused",
            "--report_to", "none"]  # fmt: skip
    session = load_session(*parse(argv))
    session.model.eval()
    with torch.no_grad():  # large weights, or all names would be nearly alike
        for parameter in session.model.parameters():
            parameter.mul_(4 if parameter.ndim == 2 else 1)
    return session


@pytest.fixture
def held_out(session, tiny):
    """`held_out(captions)`: the pictures of heldout.json with these captions, in turn."""
    from types import SimpleNamespace

    records = json.loads((tiny / "heldout.json").read_text())

    def make(captions):
        rows = []
        for i, caption in enumerate(captions):
            record = records[i % len(records)]
            question, answer = record["conversations"]
            rows.append({**record, "conversations": [question, {**answer, "value": caption}]})
        args = SimpleNamespace(image_folder=str(tiny / "images"), skip_bad_images=False)
        return LazySupervisedDataset(
            rows, session.tokenizer, args, sample_format=session.sample_format
        )

    return make


NAMES = [f"{colour} {shape}" for colour in ("red", "blue", "green", "white", "black")
         for shape in ("circle", "square", "big square", "star", "circle on a star")]  # fmt: skip


def scores(session, dataset, collate, index) -> list[float]:
    """The log-probability of every sample's answer with the picture of one."""
    found = []
    for i in range(len(dataset)):
        item = {**dataset[i], "images": dataset[index]["images"]}
        batch = collate([item])
        loss = session.model(**batch).loss
        found.append(-float(loss) * len(batch["label_positions"]))
    return found


def test_the_five_best_are_those_of_every_name_by_itself(session, held_out):
    dataset, collate = held_out(NAMES), DataCollatorForSupervisedDataset(session.tokenizer)
    answers = [dataset[i]["labels"][dataset[i]["labels"] != -100].tolist() for i in range(25)]
    tree = prefix_tree(answers)
    for index in range(0, 25, 4):
        with torch.no_grad():
            by_score = scores(session, dataset, collate, index)
        expected = sorted(range(25), key=lambda i: -by_score[i])[:AMONG]
        found = best_names(session.model, collate([dataset[index]]), tree, "cpu")
        assert [by_score[i] for i in found] == pytest.approx(
            [by_score[i] for i in expected], rel=1e-4
        )
    measured = rank(session.model, dataset.select([0, 4, 8]), collate, "x")
    assert measured["candidates"] == 3
    assert measured["among_five"] == 1
    assert 0 <= measured["first"] <= 1


def test_pictures_of_one_name_share_a_candidate(session, held_out):
    dataset, collate = (
        held_out(["red star"] * 4),
        DataCollatorForSupervisedDataset(session.tokenizer),
    )
    assert rank(session.model, dataset, collate, "x") == {
        "first": 1, "among_five": 1, "candidates": 1,
    }  # fmt: skip


def test_several_answers_cannot_be_ranked(session, held_out, tiny):
    dataset = held_out(["red star"])
    item = dataset[0]
    item["labels"][-1] = -100

    class Odd:
        def __len__(self):
            return 1

        def __getitem__(self, index):
            return item

    with pytest.raises(InputError, match="x, sample 0: expected one answer"):
        rank(session.model, Odd(), DataCollatorForSupervisedDataset(session.tokenizer), "x")
