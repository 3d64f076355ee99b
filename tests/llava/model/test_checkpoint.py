"""A full folder: what is written beside the weights."""

from __future__ import annotations

import json

import torch
from transformers import GenerationConfig

from llava.model.builder import from_pretrained, load_pretrained_model
from llava.model.checkpoint import read_config, save_full
from llava.model.tokenizer import load_tokenizer


def test_a_generation_config_as_vicunas_is_saved_as_it_is(tiny, tmp_path):
    """A temperature without do_sample, and changed since it was read."""
    model = from_pretrained(str(tiny / "llm"), read_config(tiny / "llm"), dtype=torch.float32)
    asked = model.generation_config
    asked.temperature, asked.top_p, asked.pad_token_id = 0.9, 0.6, 0
    save_full(model, load_tokenizer(str(tiny / "llm")), tmp_path)
    values = json.loads((tmp_path / "generation_config.json").read_text())
    assert (values["temperature"], values["top_p"], values["pad_token_id"]) == (0.9, 0.6, 0)
    again = GenerationConfig.from_pretrained(tmp_path)
    assert (again.temperature, again.top_p) == (0.9, 0.6)
    _, model, _, _ = load_pretrained_model(str(tmp_path), None, "again", device="cpu")
    assert model.generation_config.temperature == 0.9


def test_a_tokenizer_is_written_whole_over_an_older_one(tiny, tmp_path):
    tokenizer = load_tokenizer(str(tiny / "llm"))
    model = from_pretrained(str(tiny / "llm"), read_config(tiny / "llm"), dtype=torch.float32)
    save_full(model, tokenizer, tmp_path)
    first = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    assert "tokenizer_config.json" in first
    assert not any(name.startswith(".") for name in first)
    save_full(model, load_tokenizer(str(tmp_path)), tmp_path)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()}.keys() == first.keys()
    assert (
        load_tokenizer(str(tmp_path))("a red square").input_ids
        == tokenizer("a red square").input_ids
    )
