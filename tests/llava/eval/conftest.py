"""A whole LLaVA whose answers depend on the picture and the question."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

HYPHENS = {
    name.replace("-", "_"): name
    for name in ("conv-mode", "num-chunks", "chunk-idx", "question-file", "model-path",
                 "image-folder", "single-pred-prompt", "all-rounds")
}  # fmt: skip
"""The flags that upstream writes with hyphens."""


@pytest.fixture(scope="session")
def llava_folder(tiny, tmp_path_factory) -> Path:
    """A full checkpoint of the tiny parts, with weights large enough to tell inputs apart."""
    import torch

    from llava.model.builder import from_pretrained, load_tokenizer
    from llava.model.checkpoint import read_config, save_full

    folder = tmp_path_factory.mktemp("models") / "tiny-llava"
    torch.manual_seed(0)
    config = read_config(tiny / "llm")
    config.mm_hidden_size, config.mm_projector_type = 32, "mlp2x_gelu"
    config.mm_vision_tower, config.mm_vision_select_layer = str(tiny / "vision_tower"), -2
    config.mm_use_im_patch_token = config.mm_use_im_start_end = False
    config.image_aspect_ratio = "pad"
    model = from_pretrained(str(tiny / "llm"), config, dtype=torch.float32)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(8 if parameter.ndim == 2 else 1)
        for name in ("q_proj", "k_proj"):  # attend to little, so that a picture can matter
            for layer in model.model.layers:
                getattr(layer.self_attn, name).weight.mul_(4)
    save_full(model, load_tokenizer(str(tiny / "llm")), folder)
    return folder


@pytest.fixture(scope="session")
def pictures(tmp_path_factory) -> Path:
    """A folder with seven pictures of noise, `0.png` and so on, of different shapes."""
    import numpy as np
    from PIL import Image

    folder, rng = tmp_path_factory.mktemp("pictures"), np.random.default_rng(0)
    for i in range(7):
        noise = rng.integers(0, 256, (4 + i, 9 - i, 3)).astype(np.uint8)
        Image.fromarray(noise).resize((80, 60 + i), Image.NEAREST).save(folder / f"{i}.png")
    return folder


@pytest.fixture
def questions(tmp_path) -> Path:
    """Seven questions of different lengths about `pictures`."""
    path = tmp_path / "questions.jsonl"
    with open(path, "w") as file:
        for i in range(7):
            text = ("What is this?", "Name it in one word or a short phrase.", "Why?")[i % 3]
            question = {"question_id": 10 + i, "image": f"{i}.png", "text": text}
            file.write(json.dumps(question) + "\n")
    return path


@pytest.fixture
def ask(llava_folder, pictures, questions, tmp_path):
    """`ask(module, **flags)`: answer the questions with one of the programs, in this process."""

    def run(module, answers: str = "answers.jsonl", **flags) -> list[dict]:
        values = {
            "model-path": llava_folder,
            "image-folder": pictures,
            "question-file": questions,
            "answers-file": tmp_path / answers,
            "device": "cpu",
            "conv-mode": "v1",
            "temperature": 0,
            "max_new_tokens": 6,
        } | {HYPHENS.get(name, name): value for name, value in flags.items()}
        argv = []
        for name, value in values.items():
            argv += [f"--{name}"] if value is True else [f"--{name}", str(value)]
        module.eval_model(module.arguments(argv))
        return [json.loads(line) for line in (tmp_path / answers).read_text().splitlines()]

    return run
