"""Programs written for upstream's `llava.train.train`: its names, with its arguments."""

from __future__ import annotations

import copy
from types import SimpleNamespace

import pytest
import torch

from llava import conversation
from llava.constants import IMAGE_TOKEN_INDEX
from llava.errors import InputError
from llava.train import train as upstream
from llava.train.arguments import parse

TURNS = [
    {"from": "human", "value": "What is this? <image>"},
    {"from": "gpt", "value": "A red square."},
]


@pytest.fixture
def session(flags, tiny):
    return upstream.load_session(*parse(flags(data_path=tiny / "a.json")))


@pytest.fixture
def as_plain(monkeypatch):
    """What upstream's train() and such programs do with `--version plain`."""
    monkeypatch.setattr(conversation, "default_conversation", conversation.conv_templates["plain"])


def test_their_data_give_the_loss_that_ours_give(session, tiny, as_plain):
    tower = session.model.get_vision_tower()
    theirs = SimpleNamespace(  # all that upstream's training sets
        data_path=str(tiny / "a.json"),
        image_folder=str(tiny / "images"),
        lazy_preprocess=True,
        is_multimodal=True,
        image_aspect_ratio="square",
        image_processor=tower.image_processor,
        mm_use_im_start_end=False,
    )
    module = upstream.make_supervised_data_module(session.tokenizer, theirs)
    assert module["eval_dataset"] is None
    dataset = module["train_dataset"]
    batch = module["data_collator"]([dataset[i] for i in range(3)])
    assert (batch["input_ids"] == IMAGE_TOKEN_INDEX).sum(1).tolist() == [1, 1, 1]
    ours = upstream.LazySupervisedDataset(
        str(tiny / "a.json"), session.tokenizer, theirs, sample_format=session.sample_format
    )
    expanded = module["data_collator"]([ours[i] for i in range(3)])
    assert (expanded["input_ids"] == IMAGE_TOKEN_INDEX).sum() > 3
    model = session.model.eval()
    with torch.no_grad():
        torch.testing.assert_close(model(**batch).loss, model(**expanded).loss)


def test_conversations_become_ids_and_labels(session):
    sources = [copy.deepcopy(TURNS), [{**t, "value": t["value"][-8:]} for t in TURNS]]
    args = SimpleNamespace(is_multimodal=True, mm_use_im_start_end=False)
    placed = upstream.preprocess_multimodal(sources, args)
    assert placed is sources
    assert sources[0][0]["value"] == "<image>\nWhat is this?"
    found = upstream.preprocess(sources, session.tokenizer, has_image=True)
    for ids, labels in zip(found["input_ids"], found["labels"], strict=True):
        assert ids.shape == labels.shape
        assert (ids == IMAGE_TOKEN_INDEX).sum() == 1
        assert 0 < (labels == ids).sum() < len(ids)
    text = copy.deepcopy(sources)
    assert upstream.preprocess_multimodal(text, SimpleNamespace(is_multimodal=False)) == sources


def test_a_template_that_is_none_of_the_known(session, monkeypatch):
    monkeypatch.setattr(conversation, "default_conversation", "v1")
    with pytest.raises(InputError, match="default_conversation is none of conv_templates"):
        upstream.preprocess([TURNS], session.tokenizer)


def test_the_first_process_prints(monkeypatch, capsys):
    upstream.rank0_print("one", 2)
    monkeypatch.setenv("RANK", "1")
    upstream.rank0_print("three")
    assert capsys.readouterr().out == "one 2\n"
