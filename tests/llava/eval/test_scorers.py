"""POPE, TextVQA and ScienceQA: scores worked out by hand."""

from __future__ import annotations

import json

import pytest

from llava.errors import InputError
from llava.eval import eval_pope, eval_science_qa, eval_textvqa
from llava.eval.m4c_evaluator import CONTRACTIONS, EvalAIAnswerProcessor, TextVQAAccuracyEvaluator


def lines(path, records) -> str:
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return str(path)


# -- answers in VQA's form -------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("answer", "form"),
    [
        ("Yes", "yes"),
        ("  The Two dogs! ", "2 dogs"),
        ("an apple, a pear", "apple pear"),
        ("none", "0"),
        ("ten\nmen\ton", "10 men on"),
        ("1,000", "1000"),
        ("3.5 stars.", "3.5 stars"),
        ("U.S.A.", "usa"),
        ("black/white", "black white"),
        ("black / white", "black white"),
        ("t-shirt", "t shirt"),
        ("t- shirt", "t shirt"),
        ("dont", "don't"),
        ("couldntve", "couldntve"),
        ("couldnt've", "couldn't've"),
        ("John's", "john 's"),
        ("what?", "what"),
        ("somebody'd", "somebodyd"),
        ("", ""),
    ],
)
def test_answers_are_brought_to_one_form(answer, form):
    assert EvalAIAnswerProcessor()(answer) == form


def test_contractions_are_words_that_lost_one_apostrophe():
    assert CONTRACTIONS["wont"] == "won't"
    assert CONTRACTIONS["twas"] == "'twas"
    assert {k for k, v in CONTRACTIONS.items() if v == "y'all'd've"} == {
        "yall'd've", "y'alld've", "y'all'dve"
    }  # fmt: skip
    assert "its" not in CONTRACTIONS
    assert "shed" not in CONTRACTIONS


@pytest.mark.parametrize(
    ("agree", "expected"),
    # Leaving each of the ten out in turn: n leave-outs lose one, 10 − n lose none.
    [(0, 0), (1, 9 * (1 / 3) / 10), (2, (2 / 3 + 8 * 2 / 3) / 10), (3, (3 * 2 / 3 + 7) / 10),
     (4, 1), (10, 1)],
)  # fmt: skip
def test_textvqa_accuracy_counts_the_other_people(agree, expected):
    people = ["Two!"] * agree + [f"other {i}" for i in range(10 - agree)]
    assert TextVQAAccuracyEvaluator().score("2", people) == pytest.approx(expected)


def test_textvqa_takes_ten_people():
    with pytest.raises(InputError, match="10 people's answers, found 9"):
        TextVQAAccuracyEvaluator().score("x", ["x"] * 9)


# -- TextVQA ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "prompt",
    [
        "What is IT?\nAnswer the question using a single word or phrase.",
        "What is it?\nReference OCR token: a, b\nAnswer the question.",
        "Reference OCR token: a, b\nWhat is it?\nAnswer the question.",
        "OCR tokens: a, b. Question: What is it? Short answer:",
    ],
)
def test_the_question_is_found_in_every_form_of_prompt(prompt):
    assert eval_textvqa.prompt_processor(prompt) == "what is it?"


@pytest.fixture
def textvqa(tmp_path):
    data = [
        {"image_id": "i", "question": "What Is it?", "answers": ["stop"] * 10},
        {"image_id": "j", "question": "Where?", "answers": ["here"] * 2 + ["there"] * 8},
    ]
    (tmp_path / "annotations.json").write_text(json.dumps({"data": data}))
    results = [
        {"question_id": "i", "prompt": "What is it?\nShort.", "text": "Stop."},
        {"question_id": "j", "prompt": "Where?\nShort.", "text": "here"},
    ]
    return str(tmp_path / "annotations.json"), lines(tmp_path / "run.jsonl", results), tmp_path


def test_textvqa_prints_as_upstream(textvqa, capsys):
    annotations, results, folder = textvqa
    (folder / "notes.txt").write_text("")
    args = eval_textvqa.arguments(
        ["--annotation-file", annotations, "--result-file", results, "--result-dir", str(folder)]
    )
    eval_textvqa.main(args)
    accuracy = 100 * (1 + (2 / 3 * 8 + 2 / 3) / 10) / 2
    assert capsys.readouterr().out == f"run\nSamples: 2\nAccuracy: {accuracy:.2f}%\n\n" * 2


def test_textvqa_names_an_answer_without_annotation(textvqa):
    annotations, _, folder = textvqa
    other = [{"question_id": "k", "prompt": "Who?\nShort.", "text": "x"}]
    with pytest.raises(InputError, match="has no 'who\\?' of image k"):
        eval_textvqa.eval_single(annotations, lines(folder / "other.jsonl", other))
    with pytest.raises(InputError, match="no question is found"):
        eval_textvqa.prompt_processor("Who?")


# -- POPE ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "yes"),
    [("Yes", True), ("No", False), ("no, there is none", False), ("There is not.", False),
     ("Yes. No dog", True), ("nothing", True), ("NO", True), ("", True)],
)  # fmt: skip
def test_pope_reads_the_first_sentence(text, yes):
    assert eval_pope.says_yes(text) is yes


@pytest.fixture
def pope(tmp_path):
    """Five questions, the answers in another order, one category scored 1 TP, 1 FP, 1 TN, 0 FN."""
    folder = tmp_path / "coco"
    folder.mkdir()
    kinds = ["random", "adversarial", "random", "random", "adversarial"]
    lines(folder / "coco_pope_random.json", [{"label": x} for x in ("yes", "no", "no")])
    lines(folder / "coco_pope_adversarial.json", [{"label": x} for x in ("no", "no")])
    questions = [{"question_id": i, "category": kind} for i, kind in enumerate(kinds)]
    answers = [
        {"question_id": i, "text": t} for i, t in enumerate(["Yes", "No", "Yes", "No", "no"])
    ]
    return [
        "--annotation-dir", str(folder),
        "--question-file", lines(tmp_path / "questions.jsonl", questions),
        "--result-file", lines(tmp_path / "answers.jsonl", answers[::-1]),
    ]  # fmt: skip


def test_pope_prints_as_upstream_and_survives_no_yes(pope, capsys):
    eval_pope.main(eval_pope.arguments(pope))
    adversarial, random, _ = capsys.readouterr().out.split("=" * 36 + "\n")
    assert adversarial.splitlines() == [
        "Category: adversarial, # samples: 2", "TP\tFP\tTN\tFN\t", "0\t0\t2\t0", "Accuracy: 1.0",
        "Precision: 0.0", "Recall: 0.0", "F1 score: 0.0", "Yes ratio: 0.0",
        "0.000, 1.000, 0.000, 0.000, 0.000",
    ]  # fmt: skip
    assert random.splitlines()[2:] == [
        "1\t1\t1\t0", f"Accuracy: {2 / 3}", "Precision: 0.5", "Recall: 1.0", f"F1 score: {2 / 3}",
        f"Yes ratio: {2 / 3}", "0.667, 0.667, 0.500, 1.000, 0.667",
    ]  # fmt: skip


def test_pope_refuses_what_would_shift_labels(pope, tmp_path):
    answers = tmp_path / "answers.jsonl"
    answers.write_text("".join(answers.read_text().splitlines(keepends=True)[:-1]))
    with pytest.raises(InputError, match="question 0 has no answer"):
        eval_pope.main(eval_pope.arguments(pope))
    lines(tmp_path / "coco" / "coco_pope_adversarial.json", [{"label": "no"}])
    with pytest.raises(InputError, match="1 labels, .* 2 questions of the category adversarial"):
        eval_pope.main(eval_pope.arguments(pope))
    (tmp_path / "empty").mkdir()
    with pytest.raises(InputError, match="no coco_pope"):
        eval_pope.main(eval_pope.arguments([*pope, "--annotation-dir", str(tmp_path / "empty")]))


# -- ScienceQA -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "letter"),
    [("B", "B"), ("C. because", "C"), ("I think. The answer is A.", "A"), ("b", "FAILED"),
     ("The answer is A. The answer is B.", "FAILED"), ("F", "FAILED"), ("", "FAILED")],
)  # fmt: skip
def test_science_answers_are_read_as_upstream(text, letter):
    assert eval_science_qa.parse_answer(text, list("ABCDE")) == letter


@pytest.fixture
def science(tmp_path):
    problem = {"choices": ["x", "y"], "answer": 1}
    (tmp_path / "problems.json").write_text(json.dumps({str(i): problem for i in range(5)}))
    (tmp_path / "pid_splits.json").write_text(json.dumps({"test": ["0", "1", "2", "3"]}))
    answers = [
        {"question_id": "0", "prompt": "<image>\nq", "text": "B"},
        {"question_id": "1", "prompt": "<image>\nq", "text": "A"},
        {"question_id": "2", "prompt": "q", "text": "D"},  # no such choice
    ]
    return [
        "--base-dir", str(tmp_path), "--result-file", lines(tmp_path / "a.jsonl", answers),
        "--output-file", str(tmp_path / "new/output.json"),
        "--output-result", str(tmp_path / "new/result.json"),
    ]  # fmt: skip


def test_science_counts_what_is_not_answered_as_wrong(science, tmp_path, capsys):
    eval_science_qa.main(eval_science_qa.arguments(science))
    out = capsys.readouterr().out
    assert out == "Total: 4, Correct: 1, Accuracy: 25.00%, IMG-Accuracy: 50.00%\n"
    result = json.loads((tmp_path / "new/result.json").read_text())
    assert result == {
        "acc": 25.0, "correct": 1, "count": 4, "results": {"0": 1, "1": 0, "2": -1, "3": -1},
        "outputs": {"0": "B", "1": "A", "2": "D", "3": "FAILED"},
    }  # fmt: skip
    output = json.loads((tmp_path / "new/output.json").read_text())
    assert output["correct"] == [
        {"question_id": "0", "parsed_ans": "B", "ground_truth": "B", "question": "<image>\nq",
         "pred": "B", "is_multimodal": True}
    ]  # fmt: skip
    assert [x["question_id"] for x in output["incorrect"]] == ["1", "2", "3"]


def test_science_names_what_is_missing(science, tmp_path):
    args = eval_science_qa.arguments(science)
    (tmp_path / "problems.json").write_text('{"1": {"choices": []}}')
    (tmp_path / "pid_splits.json").write_text('{"test": ["1"]}')
    with pytest.raises(InputError, match="problem 1: 'answer' is missing"):
        eval_science_qa.main(args)
    (tmp_path / "pid_splits.json").write_text('{"test": ["2"]}')
    with pytest.raises(InputError, match="problems.json: '2' is missing"):
        eval_science_qa.main(args)
    (tmp_path / "problems.json").unlink()
    with pytest.raises(InputError, match="^[^(]*problems.json: no such file$"):
        eval_science_qa.main(args)


def test_science_names_a_split_that_does_not_exist(science):
    with pytest.raises(InputError, match="pid_splits.json: 'minitest' is missing"):
        eval_science_qa.main(eval_science_qa.arguments([*science, "--split", "minitest"]))
