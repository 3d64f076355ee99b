"""Answers → what MM-Vet's evaluation reads: {"v1_<question id>": text, …}."""

from __future__ import annotations

import argparse
import json

from llava.atomic import write_text
from llava.errors import one_clear_error
from llava.eval.questions import answers_by_id


def main(args: argparse.Namespace) -> None:
    answers = {f"v1_{number}": a["text"] for number, a in answers_by_id(args.src).items()}
    write_text(args.dst, json.dumps(answers, indent=2))


def arguments(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--src", required=True)
    parser.add_argument("--dst", required=True)
    return parser.parse_args(argv)


if __name__ == "__main__":
    with one_clear_error():
        main(arguments())
