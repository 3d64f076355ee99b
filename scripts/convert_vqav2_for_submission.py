"""Answers → what VQAv2's server takes: [{"question_id", "answer"}, …], in VQA's form.

Reads DIR/answers/SPLIT/CKPT/merge.jsonl and writes DIR/answers_upload/SPLIT/CKPT.json. The server
wants all questions of the test set; those that the split does not ask get an empty answer.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from llava.atomic import write_text
from llava.errors import one_clear_error
from llava.eval.m4c_evaluator import EvalAIAnswerProcessor
from llava.eval.questions import answers_by_id, read_jsonl


def main(args: argparse.Namespace) -> None:
    folder = Path(args.dir)
    answers = answers_by_id(folder / "answers" / args.split / args.ckpt / "merge.jsonl")
    questions = read_jsonl(folder / "llava_vqav2_mscoco_test2015.jsonl", "question_id")
    print(f"total results: {len(answers)}, total split: {len(questions)}")
    processor, nothing = EvalAIAnswerProcessor(), {"text": ""}
    submission = [
        {"question_id": number, "answer": processor(answers.get(number, nothing)["text"])}
        for number in (question["question_id"] for question in questions)
    ]
    target = folder / "answers_upload" / args.split / f"{args.ckpt}.json"
    write_text(target, json.dumps(submission))


def arguments(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--dir", default="./playground/data/eval/vqav2")
    parser.add_argument("--ckpt", required=True)
    parser.add_argument("--split", required=True)
    return parser.parse_args(argv)


if __name__ == "__main__":
    with one_clear_error():
        main(arguments())
