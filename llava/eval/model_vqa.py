"""Answer a file of questions about pictures, at length (LLaVA-Bench, MM-Vet).

python -m llava.eval.model_vqa --model-path … --question-file Q.jsonl --image-folder … \
    --answers-file A.jsonl

A question is a line `{"question_id", "image", "text"}`, an answer a line `{"question_id", "prompt",
"text", "answer_id", "model_id", "metadata"}`.
"""

from __future__ import annotations

import argparse
import functools

from llava.errors import one_clear_error
from llava.eval.answer import filled
from llava.eval.eval_loop import Question, parser, run
from llava.eval.questions import picture_path, read_jsonl


def eval_model(args, defaults: argparse.Namespace | None = None, mmtag: bool = False) -> None:
    """Answer `args.question_file`; `args` has the flags as attributes, missing ones are default."""
    args = filled(args, defaults or arguments([]))
    rows = read_jsonl(args.question_file, "question_id", "image", "text")
    run(args, rows, functools.partial(ask, args.image_folder), mmtag)


def ask(image_folder: str, row: dict) -> list[Question]:
    """The question of a line."""
    from llava.mm_utils import open_image

    path = picture_path(image_folder, row["image"], row["question_id"])
    record = {"question_id": row["question_id"], "prompt": row["text"], "text": None}
    return [Question(record, row["text"], [functools.partial(open_image, path)])]


def arguments(argv: list[str] | None = None) -> argparse.Namespace:
    return parser(__doc__).parse_args(argv)


if __name__ == "__main__":
    with one_clear_error():
        eval_model(arguments())
