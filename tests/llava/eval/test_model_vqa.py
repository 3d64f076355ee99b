"""The programs that answer question files: formats, batches, chunks, going on, bad input."""

from __future__ import annotations

import base64
import io
import json
import os
import signal
import string
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
from PIL import Image

from llava.conversation import get_template
from llava.errors import InputError
from llava.eval import (
    eval_loop,
    model_qa,
    model_vqa,
    model_vqa_loader,
    model_vqa_mmbench,
    model_vqa_science,
)
from llava.eval.answer import Answerer
from llava.eval.questions import get_chunk, read_jsonl, read_tsv
from llava.pictures import open_image

KEYS = ["question_id", "prompt", "text", "answer_id", "model_id", "metadata"]


def texts(answers: list[dict]) -> list[str]:
    return [answer["text"] for answer in answers]


@pytest.fixture
def one_by_one(ask):
    return ask(model_vqa, "one-by-one.jsonl")


def test_answers_have_upstreams_fields_and_depend_on_the_picture(one_by_one):
    assert [list(answer) for answer in one_by_one] == [KEYS] * 7
    assert [answer["question_id"] for answer in one_by_one] == list(range(10, 17))
    first = one_by_one[0]
    assert first["prompt"] == "What is this?"
    assert first["model_id"] == "tiny-llava"
    assert first["metadata"] == {}
    ids = {answer["answer_id"] for answer in one_by_one}
    assert len(ids) == 7
    assert all(len(i) == 22 and set(i) <= set(string.ascii_letters + string.digits) for i in ids)
    assert len(set(texts(one_by_one))) > 3  # else the tests below would prove little


@pytest.mark.parametrize("flags", [{"batch_size": 3}, {"batch_size": 7, "num_workers": 1}])
def test_a_batch_answers_as_one_by_one(ask, one_by_one, flags):
    assert texts(ask(model_vqa, **flags)) == texts(one_by_one)
    assert texts(ask(model_vqa_loader, **flags)) == texts(one_by_one)


def test_a_long_prompt_in_a_batch_does_not_shorten_others_answers(ask, questions):
    """It has room for few tokens, others want more than that."""
    rows = read_jsonl(questions)
    rows[2]["text"] = "word " * 64
    questions.write_text("".join(json.dumps(row) + "\n" for row in rows))
    alone = texts(ask(model_vqa, max_new_tokens=60))
    assert texts(ask(model_vqa, max_new_tokens=60, batch_size=4)) == alone
    few = texts(ask(model_vqa, max_new_tokens=30))
    assert few[2] == alone[2]
    assert few != alone, "no answer was cut, so this tests nothing"


@pytest.mark.parametrize("batch_size", [1, 4])
def test_prompts_that_do_not_fit_are_named_before_anything_is_asked(
    ask, questions, tmp_path, monkeypatch, batch_size
):
    rows = read_jsonl(questions)
    rows[4]["text"] = rows[6]["text"] = "word " * 240
    questions.write_text("".join(json.dumps(row) + "\n" for row in rows))
    asked = []
    monkeypatch.setattr(Answerer, "answer", lambda *args: asked.append(args))
    message = r"question 14: the prompt has \d+ tokens, pictures included; .* 256 .*\(2 such"
    with pytest.raises(InputError, match=message):
        ask(model_vqa, batch_size=batch_size)
    assert not asked
    assert not (tmp_path / "answers.jsonl").exists()


def test_beams_in_a_batch_answer_as_one_by_one(ask):
    alone = ask(model_vqa, num_beams=2)
    assert texts(ask(model_vqa, num_beams=2, batch_size=4)) == texts(alone)


def test_sampling_runs(ask):
    assert len(ask(model_vqa, temperature=1.5, top_p=0.9, batch_size=4)) == 7


def test_an_answer_ends_at_the_templates_mark(ask, one_by_one, monkeypatch):
    template = get_template("v1")
    long = one_by_one[0]["text"]
    template.sep2 = long[len(long) // 2 :][:3]
    monkeypatch.setattr(Answerer, "template", lambda *args: template)
    for answer, whole in zip(ask(model_vqa, batch_size=4), one_by_one, strict=True):
        # The mark also is in the prompt's text only after answers, so single turns are the same.
        assert answer["text"] == whole["text"].split(template.sep2)[0].strip()


@pytest.mark.parametrize("chunks", [1, 2, 5, 9])
def test_chunks_are_upstreams_slices_and_none_is_out_of_range(chunks):
    cut = [get_chunk(list(range(7)), chunks, i) for i in range(chunks)]
    assert [x for chunk in cut for x in chunk] == list(range(7))
    assert all(len(chunk) <= -(-7 // chunks) for chunk in cut)


def test_chunks_together_answer_everything_and_one_past_the_end_is_empty(ask, one_by_one):
    parts = [ask(model_vqa, f"{i}.jsonl", num_chunks=5, chunk_idx=i) for i in range(5)]
    assert [len(part) for part in parts] == [2, 2, 2, 1, 0]
    assert texts(sum(parts, [])) == texts(one_by_one)


@pytest.mark.parametrize("chunks", [(0, 0), (2, 2), (2, -1)])
def test_a_chunk_that_cannot_be_is_refused(ask, chunks):
    with pytest.raises(InputError, match="--num-chunks .* --chunk-idx"):
        ask(model_vqa, num_chunks=chunks[0], chunk_idx=chunks[1])


# -- cut short -------------------------------------------------------------------------------------


def test_an_evaluation_cut_short_goes_on_where_it_was(ask, one_by_one, tmp_path, monkeypatch):
    answer, asked = Answerer.answer, []

    def dies_in_the_third_batch(self, prompts, *args):
        if len(asked) == 4:
            raise RuntimeError("out of memory")
        asked.extend(prompts)
        return answer(self, prompts, *args)

    monkeypatch.setattr(Answerer, "answer", dies_in_the_third_batch)
    with pytest.raises(RuntimeError):
        ask(model_vqa, batch_size=2)
    assert not (tmp_path / "answers.jsonl").exists()
    with open(tmp_path / "answers.jsonl.part0", "a") as file:
        file.write('{"question_id": 14, "te')  # what a killed process leaves
    asked.clear()
    monkeypatch.setattr(Answerer, "answer", lambda s, p, *a: asked.extend(p) or answer(s, p, *a))
    assert texts(ask(model_vqa, batch_size=3)) == texts(one_by_one)
    assert len(asked) == 3  # of seven
    assert not list(tmp_path.glob("*part*"))


def test_other_settings_or_questions_start_anew(ask, questions, tmp_path, monkeypatch):
    def dies(self, prompts, *args):
        raise RuntimeError

    with monkeypatch.context() as patch:
        answer = Answerer.answer
        patch.setattr(
            Answerer, "answer", lambda s, p, *a: answer(s, p, *a) if "is this" in p[0] else dies(s)
        )
        with pytest.raises(TypeError):
            ask(model_vqa)
    part = tmp_path / "answers.jsonl.part0"
    left = part.read_text()
    assert len(left.splitlines()) == 2

    short = ask(model_vqa, max_new_tokens=2)
    assert texts(short) == texts(ask(model_vqa, "short.jsonl", max_new_tokens=2))

    part.write_text(left)
    questions.write_text(questions.read_text().replace("What is this?", "Where is this?"))
    assert ask(model_vqa)[0]["prompt"] == "Where is this?"


@pytest.mark.slow
def test_killed_and_started_again_and_then_on_two_processes(
    llava_folder, pictures, questions, one_by_one, tmp_path
):
    """Real processes: kill -9 between two answers; then torchrun."""
    command = ["-m", "llava.eval.model_vqa", "--model-path", llava_folder, "--image-folder",
               pictures, "--question-file", questions, "--conv-mode", "v1",
               "--temperature", "0", "--max_new_tokens", "6", "--device", "cpu"]  # fmt: skip
    env = os.environ | {"OMP_NUM_THREADS": "1"}
    killed = tmp_path / "killed.jsonl"
    part = tmp_path / "killed.jsonl.part0"
    run = [sys.executable, *map(str, command), "--answers-file", str(killed)]
    process = subprocess.Popen(run, env=env, stderr=subprocess.DEVNULL)
    while process.poll() is None and not (part.exists() and part.read_text().count("\n") > 1):
        time.sleep(0.005)
    process.send_signal(signal.SIGKILL)
    process.wait()
    subprocess.run(run, env=env, check=True, stderr=subprocess.DEVNULL)
    assert texts(read_jsonl(killed)) == texts(one_by_one)

    both = tmp_path / "both.jsonl"
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2",
                *map(str, command), "--answers-file", str(both), "--batch_size", "2"]  # fmt: skip
    subprocess.run(torchrun, env=env, check=True, capture_output=True)
    assert texts(read_jsonl(both)) == texts(one_by_one)
    assert not list(tmp_path.glob("*part*"))


# -- the other programs ----------------------------------------------------------------------------


@pytest.fixture
def mmbench(pictures, tmp_path):
    picture = base64.b64encode((pictures / "0.png").read_bytes()).decode()
    rows = [
        ["index", "question", "hint", "A", "B", "C", "D", "answer", "image"],
        ["241", "What colour?", "Look\nclosely.", "red", "green", "", "", "A", picture],
        ["300", "Which one?", "nan", "a", "b", "c", "d", "B", picture],
    ]
    path = tmp_path / "mmbench.tsv"
    lines = ["\t".join(f'"{c}"' if "\n" in c else c for c in row) for row in rows]
    path.write_text("\n".join(lines) + "\n")
    return path


def test_mmbench_asks_with_hint_and_options(ask, mmbench):
    one, two = ask(model_vqa_mmbench, question_file=mmbench, single_pred_prompt=True)
    assert list(one) == ["question_id", "round_id", "prompt", "text", "options", "option_char",
                         "answer_id", "model_id", "metadata"]  # fmt: skip
    assert one["question_id"] == 241
    assert one["round_id"] == 0
    assert one["prompt"] == "Look\nclosely.\nWhat colour?\nA. red\nB. green"
    assert one["options"] == ["red", "green"]
    assert one["option_char"] == ["A", "B"]
    assert two["prompt"] == "Which one?\nA. a\nB. b\nC. c\nD. d"


def test_mmbench_turns_the_options_round(ask, mmbench):
    answers = ask(model_vqa_mmbench, question_file=mmbench, all_rounds=True, batch_size=4)
    assert [(a["question_id"], a["round_id"]) for a in answers] == [
        (241, 0), (241, 1), (300, 0), (300, 1), (300, 2), (300, 3)
    ]  # fmt: skip
    assert answers[1]["prompt"].endswith("A. green\nB. red")
    assert answers[5]["options"] == ["d", "a", "b", "c"]
    assert answers[5]["option_char"] == ["D", "A", "B", "C"]


@pytest.mark.parametrize(("lang", "wanted"), [("en", "option's letter"), ("cn", "选项字母")])
def test_mmbench_asks_for_the_letter_in_the_language(mmbench, lang, wanted):
    args = model_vqa_mmbench.arguments(["--single-pred-prompt", "--lang", lang])
    [question] = model_vqa_mmbench.ask(args, read_tsv(mmbench)[0])
    assert wanted in question.text
    assert wanted not in question.record["prompt"]


def test_science_mixes_questions_with_and_without_pictures(ask, tmp_path):
    path = tmp_path / "science.json"
    turns = [{"from": "human", "value": "What is it?\n<image>"}, {"from": "gpt", "value": "A"}]
    rows = [
        {"id": "4", "image": "0.png", "conversations": turns},
        {"id": "7", "image": None, "conversations": [{"value": "Why is the sky blue?"}]},
        {"id": "8", "conversations": [{"from": "human", "value": "Why is the sky blue?"}]},
        {"id": "9", "image": "1.png", "conversations": turns},
    ]
    path.write_text(json.dumps(rows))
    alone = ask(model_vqa_science, question_file=path, single_pred_prompt=True)
    assert [list(answer) for answer in alone] == [KEYS] * 4
    assert texts(alone)[1] == texts(alone)[2]  # no picture, said in two ways
    letter = "\nAnswer with the option's letter from the given choices directly."
    assert alone[0]["prompt"] == "<image>\nWhat is it?" + letter
    assert alone[1]["prompt"] == "Why is the sky blue?" + letter
    flags = {"question_file": path, "single_pred_prompt": True, "batch_size": 4}
    assert texts(ask(model_vqa_science, **flags)) == texts(alone)


def test_a_plain_language_model_answers_text_and_gives_new_words_alone(ask, tiny, tmp_path):
    path = tmp_path / "text.jsonl"
    path.write_text('{"question_id": 1, "text": "Hi"}\n{"question_id": 2, "text": "Why is it?"}\n')
    flags = {"model_path": tiny / "llm", "question_file": path}
    answers = ask(model_qa, **flags)
    assert texts(ask(model_qa, batch_size=2, **flags)) == texts(answers)
    assert not any("USER" in answer["text"] for answer in answers)


# -- templates -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "asked", "in_config", "chosen"),
    [
        ("tiny-llava", None, None, "llava_v1"),
        ("tiny-llava", None, "mpt", "mpt"),
        ("tiny-llava", "v0", "mpt", "v0"),
        ("llava-plain", "v1", None, "v1_mmtag"),
        ("llava-plain", "v1_mmtag", None, "v1_mmtag"),
        ("llava-plain-finetune", "v1", None, "v1"),
    ],
)
def test_the_template_is_chosen_and_said(capsys, name, asked, in_config, chosen):
    class Model:
        config = SimpleNamespace(conversation_template=in_config)

    template = Answerer(None, Model, None, name).template(asked, "llava_v1", mmtag=True)
    assert template == get_template(chosen)
    assert f"conversation template: {chosen} (" in capsys.readouterr().err


def test_defaults_are_upstreams():
    common = {"conv_mode": None, "temperature": 0.2, "top_p": None, "num_beams": 1,
              "num_chunks": 1, "chunk_idx": 0, "image_folder": "", "model_base": None,
              "answers_file": "answer.jsonl", "model_path": "facebook/opt-350m"}  # fmt: skip
    for module, own in (
        (model_vqa, {"question_file": "tables/question.jsonl", "max_new_tokens": 1024}),
        (model_vqa_loader, {"question_file": "tables/question.jsonl", "max_new_tokens": 128}),
        (model_vqa_mmbench, {"all_rounds": False, "single_pred_prompt": False, "lang": "en"}),
        (model_vqa_science, {"question_file": "tables/question.json", "answer_prompter": False}),
    ):
        found = vars(module.arguments([]))
        assert found | common | own == found


def test_mmbench_pictures_are_set_upright(pictures):
    exif, file = Image.Exif(), io.BytesIO()
    exif[0x0112] = 6
    Image.open(pictures / "0.png").save(file, "JPEG", exif=exif)
    row = dict.fromkeys(["index", "question", "hint", *"ABCD"], "1")
    row["image"] = base64.b64encode(file.getvalue()).decode()
    (asked,) = model_vqa_mmbench.ask(model_vqa_mmbench.arguments([]), row)
    opened = asked.pictures[0]()
    assert opened.mode == "RGB"
    assert opened.tobytes() == open_image(file.getvalue()).tobytes()
    assert opened.size == Image.open(pictures / "0.png").size[::-1]


# -- bad input -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ('{"question_id": 1, "image": "0.png", "text": "x"}\n{"question_id"', "line 2: not JSON"),
        ('\n\n{"question_id": 1, "text": "x"}', "line 3: 'image' is missing"),
        ("[" * 100_000, "line 1: not JSON"),
        ("[1]", "line 1: expected an object, found list"),
        ('{"question_id": 1, "image": null, "text": "x"}', "line 1: 'image' is None, text is"),
        ('{"question_id": 1, "image": "0.png", "text": 5}', "line 1: 'text' is 5, text is"),
        ('{"question_id": 1, "image": "0.png", "text": "\\ud800"}', "'text' is '.ud800', text is"),
        ("\n", "the file is empty"),
        (None, "no such file"),
        ('{"question_id": 17, "image": "no.png", "text": "x"}', "question 17: picture .*no.png"),
        ('{"question_id": 8, "image": "bad.png", "text": "x"}', "question 8: picture .*bad.png"),
        (
            '{"question_id": 5, "image": "0.png", "text": "<image> and?"}',
            "question 5: 1 pictures were given, the text has 2",
        ),
    ],
)
def test_bad_questions_are_one_clear_error(ask, pictures, questions, tmp_path, content, message):
    (tmp_path / "0.png").write_bytes((pictures / "0.png").read_bytes())
    (tmp_path / "bad.png").write_bytes(b"no picture")
    questions.unlink() if content is None else questions.write_text(content)
    with pytest.raises(InputError, match=message):
        ask(model_vqa, image_folder=tmp_path)
    assert not (tmp_path / "answers.jsonl").exists()


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda text: text.replace("question\t", "text\t"), "heading: 'question' is missing"),
        (lambda text: text[: text.rindex("b\tc")], "line 4: expected 9 columns"),
        (lambda text: text[:-20] + "\n", "question 300: the base64 picture cannot be read"),
        (lambda text: text.split("\n")[0], "the file is empty"),
    ],
)
def test_bad_tables_are_one_clear_error(ask, mmbench, spoil, message):
    mmbench.write_text(spoil(mmbench.read_text()))
    with pytest.raises(InputError, match=message):
        ask(model_vqa_mmbench, question_file=mmbench)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", "bad.json: no readable JSON"),
        ("[" * 100_000, "bad.json: no readable JSON"),
        ("[]", "expected a list of questions"),
        ('[{"id": 3}]', "question 0: 'conversations' is missing"),
        ('[{"id": 3, "conversations": []}]', "'conversations' is not a list of turns"),
        ('[{"id": 3, "conversations": [{"from": "human"}]}]', "'value' is missing"),
        ('[{"id": 3, "conversations": [{"value": 7}]}]', "question 0: 'value' is 7, text is"),
        ('[{"id": 3, "image": [], "conversations": [{"value": "x"}]}]', "'image' is \\[\\], text"),
    ],
)
def test_bad_science_files_are_one_clear_error(ask, tmp_path, content, message):
    (tmp_path / "bad.json").write_text(content)
    with pytest.raises(InputError, match=message):
        ask(model_vqa_science, question_file=tmp_path / "bad.json")


def test_an_unknown_template_is_said_before_the_model_loads(ask):
    with pytest.raises(InputError, match="did you mean vicuna_v1"):
        ask(model_vqa, conv_mode="vicuna_v2", model_path="/no/such/model")


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ({"max_new_tokens": 0}, "--max_new_tokens 0: at least 1"),
        ({"num_beams": 0}, "--num_beams 0: at least 1"),
        ({"temperature": -1}, "--temperature -1.0: a number from 0 on"),
        ({"temperature": "nan"}, "--temperature nan: a number from 0 on"),
        ({"temperature": 1, "top_p": 0}, "--top_p 0.0: over 0 and at most 1"),
        ({"temperature": 1, "top_p": 2}, "--top_p 2.0: over 0 and at most 1"),
        ({"device": "gpu"}, "--device gpu: cuda, cuda:0, cpu or the like"),
        ({"device": "cuda:99"}, "--device cuda:99: this machine has "),
    ],
)
def test_flags_that_cannot_be_are_said_before_the_model_loads(ask, flags, message):
    with pytest.raises(InputError, match=message):
        ask(model_vqa, **{"model_path": "/no/such/model", **flags})


def test_a_folder_in_the_place_of_the_answers_is_refused(ask, tmp_path):
    with pytest.raises(InputError, match="--answers-file .*: a folder is there"):
        ask(model_vqa, tmp_path)
    assert not list(tmp_path.parent.glob(f"{tmp_path.name}.part*"))


def test_a_language_model_without_pictures_is_refused(ask, tiny):
    with pytest.raises(InputError, match="question 10: llm: a language model without pictures"):
        ask(model_vqa, model_path=tiny / "llm")


def test_the_answers_folder_is_made(ask, tmp_path):
    ask(model_vqa, "new/folder/answers.jsonl", max_new_tokens=1)
    assert (tmp_path / "new" / "folder" / "answers.jsonl").is_file()


def test_other_programs_may_pass_fewer_attributes(llava_folder, pictures, questions, tmp_path):
    args = type("Args", (), {
        "model_path": str(llava_folder), "model_base": None, "image_folder": str(pictures),
        "question_file": str(questions), "answers_file": str(tmp_path / "a.jsonl"),
        "conv_mode": "v1", "temperature": 0, "device": "cpu", "max_new_tokens": 1,
    })()  # fmt: skip
    model_vqa.eval_model(args)
    assert len(read_jsonl(tmp_path / "a.jsonl", *KEYS)) == 7


def test_help_does_not_wait_for_torch():
    code = "import sys; from llava.eval import model_vqa_loader as m, run_llava, eval_pope"
    code += ", eval_loop; m.arguments([]); assert not {'torch', 'transformers'} & set(sys.modules)"
    root = Path(eval_loop.__file__).parents[2]
    subprocess.run([sys.executable, "-c", code], check=True, cwd=root)
