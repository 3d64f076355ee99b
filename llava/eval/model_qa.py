"""Answer a file of questions with a language model, without pictures.

python -m llava.eval.model_qa --model-name … --question-file Q.jsonl --answers-file A.jsonl

A question is a line `{"question_id", "text"}`; the answers are those of `llava.eval.model_vqa`.
"""

from __future__ import annotations

import argparse

from llava.errors import one_clear_error
from llava.eval.eval_loop import Question, parser, run
from llava.eval.questions import read_jsonl


def eval_model(args: argparse.Namespace) -> None:
    """Answer `args.question_file`."""
    run(args, read_jsonl(args.question_file, "question_id", "text"), ask)


def ask(row: dict) -> list[Question]:
    """The question of a line."""
    record = {"question_id": row["question_id"], "prompt": row["text"], "text": None}
    return [Question(record, row["text"])]


def arguments(argv: list[str] | None = None) -> argparse.Namespace:
    flags = parser(__doc__, conv_mode="vicuna_v1")
    flags.add_argument("--model-name", dest="model_path", help="the same as --model-path")
    flags.set_defaults(temperature=0.7)
    return flags.parse_args(argv)


if __name__ == "__main__":
    with one_clear_error():
        eval_model(arguments())
