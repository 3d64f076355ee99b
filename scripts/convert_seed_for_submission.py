"""Answers → accuracies of SEED-Bench, and {"question_id", "prediction"} lines for its server."""

from __future__ import annotations

import argparse
import json
from collections import Counter

from llava.atomic import write_text
from llava.errors import InputError, one_clear_error
from llava.eval.questions import answers_by_id, check_keys
from llava.json_files import read_any_json


def answer_of(question_id, answers: dict) -> dict | None:
    """The answer to a question whose id may be a number written as text."""
    if question_id not in answers and str(question_id).isdecimal():
        question_id = int(question_id)
    return answers.get(question_id)


def show(annotations: dict, answers: dict, only: str | None = None) -> None:
    """Print the accuracy of each type of question, or that of all with the data type `only`."""
    asked, right = Counter(), Counter()
    for question in annotations["questions"]:
        if only in (None, question["data_type"]):
            kind, answer = question["question_type_id"], answer_of(question["question_id"], answers)
            asked[kind] += 1
            right[kind] += answer is not None and answer["text"] == question["answer"]
    if only is None:
        names = {number: name for name, number in annotations["question_type"].items()}
        for kind in sorted(asked):
            print(f"{names[kind]}: {right[kind] / asked[kind] * 100:.2f}%")
    if asked:
        total = right.total() / asked.total() * 100
        print(f"{only or 'Total'} accuracy: {total:.2f}%")


def main(args: argparse.Namespace) -> None:
    annotations, answers = read_any_json(args.annotation_file), answers_by_id(args.result_file)
    check_keys(annotations, ("questions", "question_type"), args.annotation_file)
    for only in (None, "image", "video"):
        show(annotations, answers, only)
    lines = []
    for question in annotations["questions"]:
        number = question["question_id"]
        if (answer := answer_of(number, answers)) is None:
            raise InputError(f"{args.result_file}: question {number} has no answer")
        lines.append(json.dumps({"question_id": number, "prediction": answer["text"]}) + "\n")
    write_text(args.result_upload_file, "".join(lines))


def arguments(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--annotation-file", required=True)
    parser.add_argument("--result-file", required=True)
    parser.add_argument("--result-upload-file", required=True)
    return parser.parse_args(argv)


if __name__ == "__main__":
    with one_clear_error():
        main(arguments())
