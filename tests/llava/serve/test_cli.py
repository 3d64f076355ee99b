"""`python -m llava.serve.cli`: a real process that is talked to through its standard input."""

from __future__ import annotations

import ast
import io
import re
import signal
import subprocess
import sys

import numpy as np
import pytest
from PIL import Image
from transformers import TextStreamer

from llava.errors import InputError
from llava.eval.answer import Answerer
from llava.serve.cli import _streamer, arguments, main


@pytest.fixture(scope="module")
def model(tiny, tmp_path_factory):
    """A projector-only folder and flags that name it with its base."""
    import torch

    from llava.model.builder import from_pretrained
    from llava.model.checkpoint import projector_state, read_config, write_config
    from llava.model.checkpoint_names import PROJECTOR_FILE
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
    return subprocess.run(command, input=typed, capture_output=True, text=True, timeout=600)


def test_two_turns_about_two_pictures_and_an_empty_line_ends(model):
    second = ["--image-file", model[model.index("--image-file") + 1]]
    done = talk([*model, *second, "--debug"], "What is this?\nAre you sure?\n\nnot read\n")
    assert done.returncode == 0, done.stderr
    assert "conversation template: llava_v1 (by the model's name, llava-v1-tiny)" in done.stderr
    told = [ast.literal_eval(line) for line in re.findall(r"\{.*\}", done.stdout)]
    assert len(told) == 2
    assert done.stdout.endswith("USER: exit...\n")
    first, then = (turn["prompt"].split("USER: ", 1)[1] for turn in told)
    assert first == "<image>\n<image>\nWhat is this? ASSISTANT:"
    answer = told[0]["outputs"]
    assert answer
    assert then == f"{first} {answer}</s>USER: Are you sure? ASSISTANT:"
    assert f"USER: ASSISTANT: {answer}" in done.stdout  # it was streamed


def test_a_turn_that_goes_wrong_is_told_and_left_out(model):
    """A picture's mark, bytes that are no text, and more than the context holds."""
    lines = [b"<image> or?", b"word " * 300, b"x" * 9000, b"caf\xe9?", b"What is this?",
             b"<image> and this?", b"Are you sure?", b"", b"not read"]  # fmt: skip
    done = subprocess.run(
        [sys.executable, "-m", "llava.serve.cli", *model, "--debug"],
        input=b"\n".join(lines), capture_output=True, timeout=600,
    )  # fmt: skip
    out, err = done.stdout.decode(), done.stderr.decode()
    assert done.returncode == 0, err
    assert out.endswith("USER: exit...\n"), err
    reasons = re.findall("error: (.*); the talk goes on without this turn", err)
    assert [re.sub(r"\d[\d,]*\d|\d", "N", reason) for reason in reasons] == [
        "N pictures were given, the text has N image tokens",
        "the prompt has N tokens, pictures included; this model reads N tokens, answer included",
        "the prompt has N characters; this model reads N tokens, answer included",
        r"the text has half a character in '\ncaf\udceN? ASS', which no tokenizer takes",
        "N pictures were given, the text has N image tokens",
    ]
    told = [ast.literal_eval(line) for line in re.findall(r"\{.*\}", out)]
    first, then = (turn["prompt"].split("USER: ", 1)[1] for turn in told)
    assert first == "<image>\nWhat is this? ASSISTANT:"
    assert then == f"{first} {told[0]['outputs']}</s>USER: Are you sure? ASSISTANT:"


def test_ctrl_c_ends_an_answer_and_then_the_talk(model, monkeypatch, capsys):
    """Real signals: one in the middle of the first answer, one where a line is awaited."""
    typed = iter(["One?", "Two?"])

    def type_(prompt):
        for line in typed:
            return line
        signal.raise_signal(signal.SIGINT)
        return None

    def in_mid_answer(self, text, stream_end=False):
        if not interrupted:
            interrupted.append(True)
            signal.raise_signal(signal.SIGINT)

    interrupted, asked, answer = [], [], Answerer.answer
    monkeypatch.setattr("builtins.input", type_)
    monkeypatch.setattr(TextStreamer, "put", in_mid_answer)
    monkeypatch.setattr(Answerer, "answer", lambda s, p, *a: asked.extend(p) or answer(s, p, *a))
    main(arguments(model))
    out, err = capsys.readouterr()
    assert interrupted
    assert "interrupted; the talk goes on without this turn" in err
    assert "<image>\nOne?" in asked[0]
    assert "<image>\nTwo?" in asked[1]
    assert "One?" not in asked[1]
    assert out.endswith("\nexit...\n")


def test_the_end_of_input_ends_and_the_flag_names_the_template(model, monkeypatch, capsys):
    monkeypatch.setattr("sys.stdin", io.StringIO("Hi"))
    main(arguments([*model, "--conv-mode", "chatml_direct"]))
    out, err = capsys.readouterr()
    assert "conversation template: chatml_direct (--conv-mode)" in err
    assert out.startswith("user: assistant: ")
    assert out.endswith("\nuser: exit...\n")


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
    assert args.image_file == ["x.png"]
    assert args.temperature == 0.2
    assert args.max_new_tokens == 512
    assert args.conv_mode is None
    assert not (args.load_4bit)
    assert not (args.load_8bit)
    assert not (args.debug)


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
