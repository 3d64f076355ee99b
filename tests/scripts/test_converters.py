"""scripts/convert_*.py: answers into what benchmarks' servers read, ScienceQA into records."""

from __future__ import annotations

import importlib
import json
import sys
import zipfile
from pathlib import Path
from xml.etree import ElementTree

import pytest

from llava.errors import InputError

SCRIPTS = Path(__file__).parents[2] / "scripts"


@pytest.fixture
def convert(monkeypatch):
    """`convert(script, *flags)`: run one of the scripts in this process."""
    monkeypatch.syspath_prepend(str(SCRIPTS))

    def run(name: str, *flags) -> None:
        module = importlib.import_module(f"convert_{name}")
        module.main(module.arguments([str(flag) for flag in flags]))

    yield run
    for name in [name for name in sys.modules if name.startswith("convert_")]:
        del sys.modules[name]


def lines(path: Path, *records: dict) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return path


@pytest.fixture
def answers(tmp_path) -> Path:
    return lines(
        tmp_path / "answers.jsonl",
        {"question_id": 1, "text": "Two Dogs."},
        {"question_id": 2, "text": "A"},
    )


def test_gqa(convert, answers, tmp_path):
    convert("gqa_for_eval", "--src", answers, "--dst", tmp_path / "out.json")
    assert json.loads((tmp_path / "out.json").read_text()) == [
        {"questionId": 1, "prediction": "two dogs"},
        {"questionId": 2, "prediction": "a"},
    ]


def test_mmvet(convert, answers, tmp_path):
    convert("mmvet_for_eval", "--src", answers, "--dst", tmp_path / "new" / "out.json")
    found = json.loads((tmp_path / "new" / "out.json").read_text())
    assert found == {"v1_1": "Two Dogs.", "v1_2": "A"}


def test_vizwiz(convert, answers, tmp_path):
    questions = [{"question_id": i, "image": f"{i}.jpg"} for i in (2, 1)]
    flags = ["--annotation-file", lines(tmp_path / "q.jsonl", *questions), "--result-file", answers,
             "--result-upload-file", tmp_path / "out.json"]  # fmt: skip
    convert("vizwiz_for_submission", *flags)
    assert json.loads((tmp_path / "out.json").read_text()) == [
        {"image": "2.jpg", "answer": ""},  # an article
        {"image": "1.jpg", "answer": "2 dogs"},
    ]
    lines(tmp_path / "q.jsonl", *questions, {"question_id": 3, "image": "3.jpg"})
    with pytest.raises(InputError, match="question 3 has no answer"):
        convert("vizwiz_for_submission", *flags)


def test_vqav2(convert, answers, tmp_path):
    target = tmp_path / "answers" / "dev" / "mine" / "merge.jsonl"
    lines(target, *map(json.loads, answers.read_text().splitlines()))
    questions = [{"question_id": i} for i in (1, 2, 3)]
    lines(tmp_path / "llava_vqav2_mscoco_test2015.jsonl", *questions)
    convert("vqav2_for_submission", "--dir", tmp_path, "--split", "dev", "--ckpt", "mine")
    found = json.loads((tmp_path / "answers_upload" / "dev" / "mine.json").read_text())
    assert found == [
        {"question_id": 1, "answer": "2 dogs"},
        {"question_id": 2, "answer": ""},
        {"question_id": 3, "answer": ""},
    ]


def test_seed(convert, answers, tmp_path, capsys):
    kinds = {"question_type": {"Scene": 1, "Action": 2}}
    question = {"answer": "A", "data_type": "image", "question_type_id": 1}
    asked = [question | {"question_id": "1"}, question | {"question_id": "2"}]
    asked += [question | {"question_id": "v", "data_type": "video", "question_type_id": 2}]
    (tmp_path / "seed.json").write_text(json.dumps(kinds | {"questions": asked}))
    flags = ["--annotation-file", tmp_path / "seed.json", "--result-file", answers,
             "--result-upload-file", tmp_path / "out.jsonl"]  # fmt: skip
    with pytest.raises(InputError, match="question v has no answer"):
        convert("seed_for_submission", *flags)
    assert capsys.readouterr().out.splitlines() == [
        "Scene: 50.00%", "Action: 0.00%", "Total accuracy: 33.33%", "image accuracy: 50.00%",
        "video accuracy: 0.00%",
    ]  # fmt: skip
    with open(answers, "a") as file:
        file.write('{"question_id": "v", "text": "A"}\n')
    convert("seed_for_submission", *flags)
    predictions = [json.loads(line) for line in (tmp_path / "out.jsonl").read_text().splitlines()]
    assert predictions == [
        {"question_id": "1", "prediction": "Two Dogs."},
        {"question_id": "2", "prediction": "A"},
        {"question_id": "v", "prediction": "A"},
    ]


def test_mmbench_writes_an_excel_table(convert, answers, tmp_path):
    heading = ["index", "question", "hint", "A", "B", "C", "D", "answer", "category", "image",
               "source", "l2-category", "comment", "split"]  # fmt: skip
    rows = [
        ["1", "<q> & q", "h", "a", "b", "", "", "A", "c", "i", "s", "l", "c", "dev"],
        ["7", "r\x07", "h", "a", "b", "c", "d", "B", "c", "i", "s", "l", "c", "dev"],
    ]
    table = tmp_path / "mmbench.tsv"
    table.write_text("\n".join("\t".join(row) for row in [heading, *rows]) + "\n")
    convert("mmbench_for_submission", "--annotation-file", table, "--result-dir", tmp_path,
            "--upload-dir", tmp_path / "up", "--experiment", "answers")  # fmt: skip
    with zipfile.ZipFile(tmp_path / "up" / "answers.xlsx") as archive:
        assert archive.testzip() is None
        for name in archive.namelist():
            ElementTree.fromstring(archive.read(name))  # well-formed
        sheet = ElementTree.fromstring(archive.read("xl/sheet.xml"))
    cells = [
        ["".join(cell.itertext()) for cell in row]
        for row in sheet.iter()
        if row.tag.endswith("row")
    ]
    assert cells == [
        ["index", "question", "A", "B", "C", "D", "prediction", "answer", "split"],
        ["1", "<q> & q", "a", "b", "", "", "Two Dogs.", "A", "dev"],
        ["7", "r", "a", "b", "c", "d", "", "B", "dev"],
    ]


# -- ScienceQA -------------------------------------------------------------------------------------


@pytest.fixture
def scienceqa(tmp_path):
    problems = {
        "5": {"question": "Which?", "hint": "", "choices": ["x", "y"], "answer": 1,
              "lecture": "Know.\\nMore.", "solution": "So.", "image": "image.png"},
        "6": {"question": "Who?", "hint": "He  did.", "choices": ["x", "y", "z"], "answer": 0,
              "lecture": "", "solution": "", "image": None},
    }  # fmt: skip
    (tmp_path / "problems.json").write_text(json.dumps(problems))
    (tmp_path / "pid_splits.json").write_text(json.dumps({"test": ["5", "6"]}))
    return tmp_path


def test_scienceqa_becomes_conversations(convert, scienceqa):
    convert("sqa_to_llava", "convert_to_llava", "--base-dir", scienceqa, "--split", "test",
            "--prompt-format", "CQM-A")  # fmt: skip
    one, two = json.loads((scienceqa / "llava_test_CQM-A.json").read_text())
    assert one == {
        "id": "5", "image": "5/image.png", "conversations": [
            {"from": "human",
             "value": "Context: N/A\nQuestion: Which?\nOptions: (A) x (B) y\n<image>"},
            {"from": "gpt", "value": "The answer is B."},
        ],
    }  # fmt: skip
    assert "image" not in two
    asked = "Context: He did.\nQuestion: Who?\nOptions: (A) x (B) y (C) z"
    assert two["conversations"][0]["value"] == asked


def test_scienceqa_becomes_instructions(convert, scienceqa):
    convert("sqa_to_llava", "convert_to_jsonl", "--base_dir", scienceqa, "--split", "test")
    one, two = (scienceqa / "scienceqa_test_QCM-LEPA.jsonl").read_text().splitlines()
    assert json.loads(one) == {
        "id": "5", "image": "5/image.png",
        "instruction": "Which?\nContext: N/A\nOptions: (A) x (B) y\n<image>",
        "output": "LECTURE: Know.\nMore.\nSOLUTION: So.\n###\nANSWER: B.",
    }  # fmt: skip
    assert json.loads(two)["output"] == "###\nANSWER: A."


@pytest.mark.parametrize(
    ("form", "asked", "answered"),
    [
        ("QCML-A", "Question: Q\nContext: N/A\nOptions: (A) x\nBECAUSE: L", "The answer is A."),
        ("QCLEM-A", "Question: Q\nContext: N/A\nBECAUSE: L E\nOptions: (A) x", "The answer is A."),
        ("CQM-AL", "Context: N/A\nQuestion: Q\nOptions: (A) x", "The answer is A. BECAUSE: E"),
        ("CQM-AEL", "Context: N/A\nQuestion: Q\nOptions: (A) x", "The answer is A. BECAUSE: E L"),
        ("CQM-ELA", "Context: N/A\nQuestion: Q\nOptions: (A) x", "E L The answer is A."),
    ],
)
def test_formats_of_scienceqa(convert, form, asked, answered, monkeypatch):
    monkeypatch.syspath_prepend(str(SCRIPTS))
    from convert_sqa_to_llava_base_prompt import build_prompt_chatbot

    problem = {"question": "Q", "hint": "", "choices": ["x"], "answer": 0, "lecture": "L",
               "solution": "E"}  # fmt: skip
    assert build_prompt_chatbot({"1": problem}, ["1"], form) == {
        "1": (asked, f"Answer: {answered}")
    }
    nothing = problem | {"lecture": "", "solution": ""}
    for text in build_prompt_chatbot({"1": nothing}, ["1"], form)["1"]:
        assert not text.endswith("BECAUSE:")
    with pytest.raises(InputError, match="'QMC-A' is no prompt format"):
        build_prompt_chatbot({"1": problem}, ["1"], "QMC-A")
