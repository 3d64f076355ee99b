"""Answer a file of questions about pictures, in short (VQAv2, GQA, TextVQA, POPE, MME, …).

python -m llava.eval.model_vqa_loader --model-path … --question-file Q.jsonl --image-folder … \
    --answers-file A.jsonl --batch_size 16

The files are those of `llava.eval.model_vqa`; the flags too, but answers are at most 128 tokens.
"""

from __future__ import annotations

import argparse

from llava.errors import one_clear_error
from llava.eval import model_vqa
from llava.eval.eval_loop import parser


def eval_model(args) -> None:
    """As `model_vqa.eval_model`; a model that only was pre-trained gets its pictures tagged."""
    model_vqa.eval_model(args, arguments([]), mmtag=True)


def arguments(argv: list[str] | None = None) -> argparse.Namespace:
    flags = parser(__doc__)
    flags.set_defaults(max_new_tokens=128)
    return flags.parse_args(argv)


if __name__ == "__main__":
    with one_clear_error():
        eval_model(arguments())
