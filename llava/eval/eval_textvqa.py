"""Score TextVQA.

python -m llava.eval.eval_textvqa --annotation-file TextVQA_0.5.1_val.json --result-file A.jsonl
"""

from __future__ import annotations

import argparse
import re
from pathlib import Path

from llava.errors import InputError, one_clear_error
from llava.eval.m4c_evaluator import TextVQAAccuracyEvaluator
from llava.eval.questions import check_keys, read_jsonl
from llava.json_files import read_any_json


def prompt_processor(prompt: str) -> str:
    """The bare question, in small letters, of a prompt as LLaVA's question files have them.

    Raises:
        InputError: a prompt of none of their forms.
    """
    lines = prompt.split("\n")
    question = None
    if prompt.startswith("OCR tokens: "):
        if match := re.search("Question: (.*?) Short answer:", prompt, re.DOTALL):
            question = match[1]
    elif "Reference OCR token: " in prompt and len(lines) == 3:
        question = lines[1] if prompt.startswith("Reference OCR token:") else lines[0]
    elif len(lines) == 2:
        question = lines[0]
    if question is None:
        raise InputError(f"no question is found in the prompt {prompt!r}")
    return question.lower()


def eval_single(annotation_file: str, result_file: str) -> float:
    """Print and return the accuracy (0 to 1) of one answers file."""
    annotations = read_any_json(annotation_file)
    check_keys(annotations, ("data",), annotation_file)
    people = {(a["image_id"], a["question"].lower()): a["answers"] for a in annotations["data"]}
    entries = []
    for result in read_jsonl(result_file, "question_id", "prompt", "text"):
        key = result["question_id"], prompt_processor(result["prompt"])
        if key not in people:
            raise InputError(
                f"{result_file}: {annotation_file} has no {key[1]!r} of image {key[0]}"
            )
        entries.append({"pred_answer": result["text"], "gt_answers": people[key]})
    accuracy = TextVQAAccuracyEvaluator().eval_pred_list(entries)
    print(Path(result_file).stem)
    print(f"Samples: {len(entries)}\nAccuracy: {100 * accuracy:.2f}%\n")
    return accuracy


def main(args: argparse.Namespace) -> None:
    """Score the file, the folder's files, or both."""
    if args.result_file is None and args.result_dir is None:
        raise InputError("--result-file or --result-dir is needed")
    if args.result_file is not None:
        eval_single(args.annotation_file, args.result_file)
    if args.result_dir is not None:
        for file in sorted(Path(args.result_dir).glob("*.jsonl")):
            eval_single(args.annotation_file, str(file))


def arguments(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--annotation-file", required=True)
    parser.add_argument("--result-file")
    parser.add_argument("--result-dir", help="score every .jsonl in it")
    return parser.parse_args(argv)


if __name__ == "__main__":
    with one_clear_error():
        main(arguments())
