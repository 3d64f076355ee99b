"""Answers → what GQA's evaluation reads: [{"questionId", "prediction"}, …]."""

from __future__ import annotations

import argparse
import json

from llava.atomic import write_text
from llava.errors import one_clear_error
from llava.eval.questions import read_jsonl


def main(args: argparse.Namespace) -> None:
    answers = [
        {"questionId": answer["question_id"], "prediction": answer["text"].rstrip(".").lower()}
        for answer in read_jsonl(args.src, "question_id", "text")
    ]
    write_text(args.dst, json.dumps(answers))


def arguments(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--src", required=True)
    parser.add_argument("--dst", required=True)
    return parser.parse_args(argv)


if __name__ == "__main__":
    with one_clear_error():
        main(arguments())
