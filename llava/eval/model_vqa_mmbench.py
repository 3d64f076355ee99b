"""Answer MMBench's multiple choice questions.

python -m llava.eval.model_vqa_mmbench --model-path … --question-file mmbench.tsv \
    --answers-file A.jsonl --single-pred-prompt

The table has the columns index, question, hint, A, B, C, D and image (base64). An answer's line
also has `round_id`, and `options` with their letters in `option_char`.
"""

from __future__ import annotations

import argparse
import functools

from llava.errors import one_clear_error
from llava.eval.answer import filled
from llava.eval.eval_loop import Question, parser, run
from llava.eval.questions import read_tsv

LETTERS = "ABCD"
ANSWER_WITH_LETTER = {
    "en": "Answer with the option's letter from the given choices directly.",
    "cn": "请直接回答选项字母。",
}
NOTHING = {"", "nan", "none", "na", "n/a", "null", "<na>", "#n/a", "#na", "-nan"}
"""Fields without a value, in small letters: what pandas, and so upstream, takes for missing."""


def eval_model(args) -> None:
    """Answer `args.question_file`; `args` has the flags as attributes, missing ones are default."""
    args = filled(args, arguments([]))
    rows = read_tsv(args.question_file, "index", "question", "hint", "image", *LETTERS)
    run(args, rows, functools.partial(ask, args), mmtag=True)


def ask(args: argparse.Namespace, row: dict[str, str]) -> list[Question]:
    """A row's question; with `args.all_rounds` once for every rotation of its options."""
    from llava.mm_utils import load_image_from_base64

    opened = functools.partial(load_image_from_base64, row["image"])
    options = []
    for letter in LETTERS:
        if row[letter].lower() in NOTHING:
            break
        options.append(row[letter])
    index = int(row["index"]) if row["index"].isdecimal() else row["index"]
    hint = [] if row["hint"].lower() in NOTHING else [row["hint"]]
    questions = []
    for turn in range(len(options) if args.all_rounds else 1):
        turned = options[turn:] + options[:turn]
        letters = LETTERS[: len(options)]
        listed = [f"{letter}. {option}" for letter, option in zip(letters, turned, strict=True)]
        prompt = "\n".join([*hint, row["question"], *listed])
        record = {
            "question_id": index, "round_id": turn, "prompt": prompt, "text": None,
            "options": turned, "option_char": [*letters[turn:], *letters[:turn]],
        }  # fmt: skip
        text = prompt
        if args.single_pred_prompt:
            text += "\n" + ANSWER_WITH_LETTER["cn" if args.lang == "cn" else "en"]
        questions.append(Question(record, text, [opened]))
    return questions


def arguments(argv: list[str] | None = None) -> argparse.Namespace:
    flags = parser(__doc__)
    flags.add_argument("--all-rounds", action="store_true", help="ask with every rotation")
    flags.add_argument("--single-pred-prompt", action="store_true", help="ask for the letter alone")
    flags.add_argument("--lang", default="en", help="en or cn: the language of that request")
    return flags.parse_args(argv)


if __name__ == "__main__":
    with one_clear_error():
        eval_model(arguments())
