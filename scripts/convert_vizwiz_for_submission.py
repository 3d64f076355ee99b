"""Answers → what VizWiz's server takes: [{"image", "answer"}, …], answers brought to VQA's form."""

from __future__ import annotations

import argparse
import json

from llava.atomic import write_text
from llava.errors import InputError, one_clear_error
from llava.eval.m4c_evaluator import EvalAIAnswerProcessor
from llava.eval.questions import answers_by_id, read_jsonl


def main(args: argparse.Namespace) -> None:
    answers = answers_by_id(args.result_file)
    questions = read_jsonl(args.annotation_file, "question_id", "image")
    print(f"total results: {len(answers)}, total split: {len(questions)}")
    if lost := [q["question_id"] for q in questions if q["question_id"] not in answers]:
        raise InputError(f"{args.result_file}: question {lost[0]} has no answer")
    processor = EvalAIAnswerProcessor()
    submission = [
        {"image": q["image"], "answer": processor(answers[q["question_id"]]["text"])}
        for q in questions
    ]
    write_text(args.result_upload_file, json.dumps(submission))


def arguments(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--annotation-file", required=True)
    parser.add_argument("--result-file", required=True)
    parser.add_argument("--result-upload-file", required=True)
    return parser.parse_args(argv)


if __name__ == "__main__":
    with one_clear_error():
        main(arguments())
