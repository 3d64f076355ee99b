"""Tiled pictures and several pictures in a sample, from the JSON through training to an answer."""

from __future__ import annotations

import json
import shutil

import pytest
import torch
from PIL import Image

from llava.constants import IMAGE_TOKEN_INDEX
from llava.eval.run_llava import arguments, eval_model
from llava.model.builder import load_pretrained_model
from llava.state import load
from llava.train.arguments import parse
from llava.train.data import make_supervised_data_module
from llava.train.session import load_session
from llava.train.train import train

TILED = {"image_aspect_ratio": "anyres", "mm_patch_merge_type": "spatial_unpad"}


@pytest.fixture(scope="module")
def data(tiny, tmp_path_factory):
    """Pictures of several shapes; records with one, two and none of them."""
    folder = tmp_path_factory.mktemp("data")
    sizes = [(40, 20), (20, 40), (30, 30), (70, 20), (16, 16), (21, 33)]
    for i, size in enumerate(sizes):
        Image.effect_noise(size, 90).convert("RGB").save(folder / f"{i}.png")

    def turns(*texts):
        return [{"from": ("human", "gpt")[i % 2], "value": t} for i, t in enumerate(texts)]

    records = [
        {"image": f"{i}.png", "conversations": turns("<image>\nWhat?", f"a shape {i}")}
        for i in range(6)
    ]
    records += [
        {
            "image": ["0.png", "1.png"],
            "conversations": turns("<image> or <image>?", "the first", "And <image>?", "no"),
        },
        {"image": ["2.png", "3.png"], "conversations": turns("<image><image>\nBoth?", "yes")},
        {"conversations": turns("Who are you?", "nobody")},
    ]
    records[6]["image"] = ["0.png", "1.png", "5.png"]
    (folder / "data.json").write_text(json.dumps(records))
    return folder


@pytest.fixture
def run(flags, data):
    def make(**changes):
        return flags(
            data_path=data / "data.json",
            image_folder=data,
            version="v1",
            per_device_train_batch_size=3,
            model_max_length=512,
            **changes,
        )

    return make


def batch_of(argv):
    arguments_ = parse(argv)
    session = load_session(*arguments_)
    module = make_supervised_data_module(session.tokenizer, arguments_[1], session.sample_format)
    items = [module["train_dataset"][i] for i in range(len(module["train_dataset"]))]
    return session.model.eval(), items, module["data_collator"](items)


@pytest.mark.parametrize("merge", ["flat", "spatial", "spatial_unpad"])
def test_a_pictures_length_is_known_before_it_is_encoded(run, merge):
    model, _, batch = batch_of(run(image_aspect_ratio="anyres", mm_patch_merge_type=merge))
    sizes = batch["image_sizes"]
    expected = [len(tokens) for tokens in model.picture_tokens(batch["images"], sizes)]
    assert [model.picture_length(size) for size in sizes] == expected
    sizes = [(width, height) for width in range(1, 90, 7) for height in range(1, 90, 7)]
    found = {model.picture_length(size) for size in sizes}
    assert max(found) == model.most_picture_length


@pytest.mark.parametrize("merge", ["flat", "spatial", "spatial_unpad"])
def test_the_collators_places_are_those_that_the_model_finds_itself(run, merge):
    model, items, batch = batch_of(run(image_aspect_ratio="anyres", mm_patch_merge_type=merge))
    expected = model(**batch).loss
    # As upstream's collator gives it: one marker a picture.
    length = max(len(item["input_ids"]) for item in items)
    ids = torch.zeros(len(items), length, dtype=torch.long)
    labels, mask = torch.full_like(ids, -100), torch.zeros_like(ids)
    for i, item in enumerate(items):
        n = len(item["input_ids"])
        ids[i, :n], labels[i, :n], mask[i, :n] = item["input_ids"], item["labels"], 1
    assert (ids == IMAGE_TOKEN_INDEX).sum() == 11
    found = model(
        ids,
        attention_mask=mask,
        labels=labels,
        images=[image for item in items for image in item.get("images", ())],
        image_sizes=[size for item in items for size in item.get("image_sizes", ())],
    ).loss
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("kind", [{}, TILED], ids=["plain", "tiled"])
def test_training_resumes_to_the_bit_and_answers(run, data, tiny, tmp_path, kind):
    saving = {"save_strategy": "steps", "save_steps": 1, "num_train_epochs": 2}
    train(argv=run(**kind, **saving, output_dir=tmp_path / "whole"))
    shutil.copytree(tmp_path / "whole" / "checkpoint-4", tmp_path / "cut" / "checkpoint-4")
    train(argv=run(**kind, **saving, output_dir=tmp_path / "cut"))
    whole, cut = (load(tmp_path / name / "mm_projector.bin") for name in ("whole", "cut"))
    assert all(torch.equal(whole[name], cut[name]) for name in whole)
    assert ("model.image_newline" in whole) == bool(kind)
    if kind:  # it has learnt
        first = load(tmp_path / "whole" / "checkpoint-1" / "mm_projector.bin")
        assert not torch.equal(first["model.image_newline"], whole["model.image_newline"])
        _, model, _, _ = load_pretrained_model(
            str(tmp_path / "whole"), str(tiny / "llm"), "any", device="cpu"
        )
        assert torch.equal(model.get_model().image_newline, whole["model.image_newline"])
    files = f"{data / '0.png'},{data / '3.png'}"
    eval_model(
        arguments(["--model-path", str(tmp_path / "whole"), "--model-base", str(tiny / "llm"),
                   "--image-file", files, "--query", "Which?", "--conv-mode", "v1",
                   "--temperature", "0", "--max_new_tokens", "3"])
    )  # fmt: skip
