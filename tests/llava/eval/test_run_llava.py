"""`run_llava`: one question, as a command and as `eval_model(args)` of upstream's README."""

from __future__ import annotations

import socket
import subprocess
import sys

import pytest

from llava.errors import InputError
from llava.eval import run_llava
from llava.eval.answer import Answerer, conv_mode_of
from llava.model.llava_arch import LlavaMixin


@pytest.fixture
def args(llava_folder, pictures):
    """The namespace of upstream's README."""
    names = {
        "model_path": str(llava_folder), "model_base": None, "model_name": "tiny-llava",
        "query": "What is this?", "conv_mode": None, "image_file": str(pictures / "0.png"),
        "sep": ",", "temperature": 0, "top_p": None, "num_beams": 1, "max_new_tokens": 6,
    }  # fmt: skip
    return type("Args", (), names)()


def test_upstreams_readme_runs(args, capsys):
    answer = run_llava.eval_model(args)
    out, err = capsys.readouterr()
    assert out == answer + "\n"
    assert answer
    assert "conversation template: llava_v0 (by the model's name, tiny-llava)" in err


def test_attributes_that_are_missing_take_their_defaults(args):
    expected = run_llava.eval_model(args)
    for name in ("conv_mode", "sep", "top_p", "num_beams", "model_base", "model_name"):
        delattr(type(args), name)
    assert run_llava.eval_model(args) == expected


@pytest.mark.parametrize(
    ("query", "sep", "prompt"),
    [
        ("What?", ",", "USER: <image>\n<image>\nWhat? ASSISTANT:"),
        ("What?", "|", "USER: <image>\n<image>\nWhat? ASSISTANT:"),
        (
            "Is <image-placeholder> as <image-placeholder>?", ",",
            "USER: Is <image> as <image>? ASSISTANT:",
        ),
    ],
)  # fmt: skip
def test_several_pictures_each_have_a_place(args, pictures, monkeypatch, query, sep, prompt):
    seen = {}
    answer = Answerer.answer

    def note(self, prompts, pictures, *more):
        seen.update(prompt=prompts[0], pictures=len(pictures[0]))
        return answer(self, prompts, pictures, *more)

    monkeypatch.setattr(Answerer, "answer", note)
    args.query, args.sep, args.conv_mode = query, sep, "v1"
    args.image_file = sep.join(str(pictures / name) for name in ("0.png", "1.png"))
    assert run_llava.eval_model(args)
    assert seen["prompt"].endswith(prompt)
    assert seen["pictures"] == 2


def test_an_answer_ends_where_the_context_does(args, monkeypatch):
    """The picture's 4 tokens, the prompt's, and as many of the answer as there is room for."""
    made, generate = [], LlavaMixin.generate

    def note(self, inputs, **kwargs):
        output = generate(self, inputs, **kwargs | {"eos_token_id": -1, "stopping_criteria": None})
        made.append(inputs.shape[1] + 3 + output.shape[1])
        return output

    monkeypatch.setattr(LlavaMixin, "generate", note)
    args.max_new_tokens = 1000
    run_llava.eval_model(args)
    assert made == [256]


def test_the_order_of_pictures_counts(args, pictures):
    args.conv_mode, answers = "v1", set()
    for names in ("0.png", "1.png"), ("1.png", "0.png"), ("1.png", "2.png"), ("2.png", "0.png"):
        args.image_file = ",".join(str(pictures / name) for name in names)
        answers.add(run_llava.eval_model(args))
    assert len(answers) > 1


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"query": "<image-placeholder> or <image-placeholder>?"}, "1 pictures .* 2 image tokens"),
        ({"conv_mode": "vicuna"}, "no conversation template; did you mean"),
        (
            {"query": "word " * 240},
            r"prompt has \d+ tokens, pictures included; .* reads 256",
        ),
        ({"query": "word " * 6000}, "prompt has 30,.* characters; this model reads 256 tokens"),
        ({"query": "caf\udce9?"}, "half a character"),
        ({"image_file": "no.png"}, "picture no.png cannot be read: no such file"),
    ],
)
def test_bad_input_is_one_clear_error(args, change, message):
    vars(args).update(change)
    with pytest.raises(InputError, match=message):
        run_llava.eval_model(args)


def test_pictures_are_loaded_from_where_other_programs_import_it(pictures):
    from llava.eval.run_llava import load_image, load_images, process_images
    from llava.serve.cli import load_image as from_the_cli

    assert callable(process_images)
    assert from_the_cli is load_image
    one, two = load_images([str(pictures / "0.png"), str(pictures / "1.png")])
    assert (one.size, two.size) == ((80, 60), (80, 61))
    with pytest.raises(ImportError):
        from llava.eval.run_llava import nothing_of_the_kind  # noqa: F401


def test_an_address_that_does_not_answer_is_named(args):
    with socket.socket() as closed:
        closed.bind(("127.0.0.1", 0))
        address = f"http://127.0.0.1:{closed.getsockname()[1]}/x.png"
    args.image_file = address
    with pytest.raises(InputError, match=f"picture {address} cannot be read"):
        run_llava.eval_model(args)


def test_a_process_prints_one_line_of_error(llava_folder):
    command = ["-m", "llava.eval.run_llava", "--model-path", str(llava_folder), "--device", "cpu",
               "--image-file", "no.png", "--query", "What?"]  # fmt: skip
    done = subprocess.run([sys.executable, *command], capture_output=True, text=True)
    assert done.returncode == 2
    assert done.stdout == ""
    assert done.stderr == "error: picture no.png cannot be read: no such file\n"


@pytest.mark.parametrize(
    ("name", "mode"),
    [
        ("llava-llama-2-13b-chat", "llava_llama_2"),
        ("llava-v1.6-mistral-7b", "mistral_instruct"),
        ("llava-v1.6-34b", "chatml_direct"),
        ("LLaVA-v1.5-7b", "llava_v1"),
        ("llava-mpt-7b", "mpt"),
        ("mine", "llava_v0"),
    ],
)
def test_templates_by_name_are_upstreams(name, mode):
    assert conv_mode_of(name) == mode
