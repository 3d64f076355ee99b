"""Questions about pictures, and the programs that answer them."""

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
