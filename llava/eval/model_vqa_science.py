"""Answer ScienceQA's questions, with and without pictures.

python -m llava.eval.model_vqa_science --model-path … --question-file llava_test_CQM-A.json \
    --image-folder … --answers-file A.jsonl --single-pred-prompt

The questions are LLaVA records `{"id", "image" (or none), "conversations"}`, whose first turn asks.
"""

from __future__ import annotations

import argparse
import functools

from llava.constants import DEFAULT_IMAGE_TOKEN
from llava.errors import InputError, one_clear_error
from llava.eval.answer import filled
from llava.eval.eval_loop import Question, parser, run
from llava.eval.model_vqa_mmbench import ANSWER_WITH_LETTER
from llava.eval.questions import check_keys, picture_path
from llava.json_files import read_any_json


def eval_model(args) -> None:
    """Answer `args.question_file`; `args` has the flags as attributes, missing ones are default."""
    args = filled(args, arguments([]))
    rows = read_any_json(args.question_file)
    if not isinstance(rows, list) or not rows:
        raise InputError(f"{args.question_file}: expected a list of questions")
    for number, row in enumerate(rows):
        where = f"{args.question_file} question {number}"
        check_keys(row, ("id", "conversations"), where)
        if not isinstance(row["conversations"], list) or not row["conversations"]:
            raise InputError(f"{where}: 'conversations' is not a list of turns")
        check_keys(row["conversations"][0], ("value",), where)
        if row.get("image") is not None:
            check_keys(row, ("image",), where)
    run(args, rows, functools.partial(ask, args))


def ask(args: argparse.Namespace, row: dict) -> list[Question]:
    """The question of a record."""
    from llava.mm_utils import open_image

    text = row["conversations"][0]["value"].replace(DEFAULT_IMAGE_TOKEN, "").strip()
    if args.single_pred_prompt:
        text += "\n" + ANSWER_WITH_LETTER["en"]
    prompt, pictures = text, []
    if row.get("image") is not None:
        path = picture_path(args.image_folder, row["image"], row["id"])
        prompt, pictures = f"{DEFAULT_IMAGE_TOKEN}\n{text}", [functools.partial(open_image, path)]
    record = {"question_id": row["id"], "prompt": prompt, "text": None}
    return [Question(record, text, pictures)]


def arguments(argv: list[str] | None = None) -> argparse.Namespace:
    flags = parser(__doc__, conv_mode="llava_v0")
    flags.set_defaults(question_file="tables/question.json")
    flags.add_argument("--answer-prompter", action="store_true", help="nothing, as upstream")
    flags.add_argument("--single-pred-prompt", action="store_true", help="ask for the letter alone")
    return flags.parse_args(argv)


if __name__ == "__main__":
    with one_clear_error():
        eval_model(arguments())
