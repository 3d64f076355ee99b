"""`python -m llava.serve.cli`: a real process that is talked to through its standard input."""

from __future__ import annotations

import ast
import io
import re
import subprocess
import sys

import numpy as np
import pytest
from PIL import Image

from llava.errors import InputError
from llava.serve.cli import _streamer, arguments, main


@pytest.fixture(scope="module")
def model(tiny, tmp_path_factory):
    """A projector-only folder and flags that name it with its base."""
    import torch

    from llava.model.builder import from_pretrained
    from llava.model.checkpoint import PROJECTOR_FILE, projector_state, read_config, write_config
    from llava.state import save

    folder = tmp_path_factory.mktemp("models") / "llava-v1-tiny"
    torch.manual_seed(0)
    config = read_config(tiny / "llm")
    config.mm_hidden_size, config.mm_projector_type = 32, "mlp2x_gelu"
    config.mm_vision_tower, config.mm_vision_select_layer = str(tiny / "vision_tower"), -2
    config.mm_use_im_patch_token = False
    model = from_pretrained(str(tiny / "llm"), config, dtype=torch.float32)
    save(projector_state(model), folder / PROJECTOR_FILE)
    write_config(model.config, folder, full=False)
    noise = np.random.default_rng(0).integers(0, 256, (20, 20, 3)).astype(np.uint8)
    Image.fromarray(noise).save(folder / "picture.png")
    return ["--model-path", str(folder), "--model-base", str(tiny / "llm"), "--device", "cpu",
            "--image-file", str(folder / "picture.png"), "--max-new-tokens", "4",
            "--temperature", "0"]  # fmt: skip


def talk(flags: list[str], typed: str) -> subprocess.CompletedProcess:
    command = [sys.executable, "-m", "llava.serve.cli", *flags]
    return subprocess.run(command, input=typed, capture_output=True, text=True, timeout=120)


def test_two_turns_about_two_pictures_and_an_empty_line_ends(model):
    second = ["--image-file", model[model.index("--image-file") + 1]]
    done = talk([*model, *second, "--debug"], "What is this?\nAre you sure?\n\nnot read\n")
    assert done.returncode == 0, done.stderr
    assert "conversation template: llava_v1 (by the model's name, llava-v1-tiny)" in done.stderr
    told = [ast.literal_eval(line) for line in re.findall(r"\{.*\}", done.stdout)]
    assert len(told) == 2 and done.stdout.endswith("USER: exit...\n")
    first, then = (turn["prompt"].split("USER: ", 1)[1] for turn in told)
    assert first == "<image>\n<image>\nWhat is this? ASSISTANT:"
    answer = told[0]["outputs"]
    assert answer and then == f"{first} {answer}</s>USER: Are you sure? ASSISTANT:"
    assert f"USER: ASSISTANT: {answer}" in done.stdout  # it was streamed


def test_the_end_of_input_ends_and_the_flag_names_the_template(model, monkeypatch, capsys):
    monkeypatch.setattr("sys.stdin", io.StringIO("Hi"))
    main(arguments([*model, "--conv-mode", "chatml_direct"]))
    out, err = capsys.readouterr()
    assert "conversation template: chatml_direct (--conv-mode)" in err
    assert out.startswith("user: assistant: ") and out.endswith("\nuser: exit...\n")


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--conv-mode", "chatml"], "'chatml' is no conversation template"),
        (["--image-file", "no.png"], "picture no.png cannot be read"),
        (["--model-base", "/no/such/folder"], "/no/such/folder"),
    ],
)
def test_bad_input_is_one_clear_error(model, flags, message):
    with pytest.raises(InputError, match=message):
        main(arguments([*model, *flags]))


def test_flags_are_upstreams():
    args = arguments(["--image-file", "x.png"])
    assert args.image_file == ["x.png"] and args.temperature == 0.2 and args.max_new_tokens == 512
    assert args.conv_mode is None and not (args.load_4bit or args.load_8bit or args.debug)


@pytest.mark.parametrize(
    ("pieces", "shown"),
    [
        (["a dog", "###", " Human: more"], "a dog\n"),
        (["a #", "1 dog", " #", "#"], "a #1 dog ##\n"),
        (["one #", "#", "# two"], "one \n"),
        (["", "plain"], "plain\n"),
    ],
)
def test_the_mark_that_ends_an_answer_is_not_shown(capsys, pieces, shown):
    streamer = _streamer(None, "###")
    for piece in pieces:
        streamer.on_finalized_text(piece)
    streamer.on_finalized_text("", stream_end=True)
    assert capsys.readouterr().out == shown
