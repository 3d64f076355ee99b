"""Score ScienceQA.

python -m llava.eval.eval_science_qa --base-dir scienceqa --result-file A.jsonl \
    --output-file output.json --output-result result.json
"""

from __future__ import annotations

import argparse
import json
import math
import re
from collections.abc import Sequence
from pathlib import Path

from llava.atomic import write_text
from llava.errors import InputError, one_clear_error
from llava.eval.questions import answers_by_id, check_keys
from llava.json_files import read_any_json

FAILED = "FAILED"


def parse_answer(text: str, options: Sequence[str]) -> str:
    """The letter that an answer gives: alone, as `A. …`, or in one `The answer is A.`"""
    if text in options:
        return text
    if len(text) >= 3 and text[0] in options and text[1:3] == ". ":
        return text[0]
    letters = re.findall(r"The answer is ([A-Z]).", text)
    return letters[0] if len(letters) == 1 else FAILED


def score(problems: dict[str, dict], answers: dict[str, dict], options: Sequence[str]) -> tuple:
    """(results, sqa_results) as upstream writes them to its two files.

    A problem without an answer counts as wrong. `problems` and `answers` are by problem id.
    """
    results: dict[str, list] = {"correct": [], "incorrect": []}
    indices, outputs = {}, {}
    for number, problem in problems.items():
        answer = answers.get(number, {"text": FAILED, "prompt": "Unknown"})
        letter = parse_answer(answer["text"], options)
        known = options[: len(problem["choices"])]
        indices[number] = known.index(letter) if letter in known else -1
        outputs[number] = answer["text"]
        right = indices[number] == problem["answer"]
        results["correct" if right else "incorrect"].append(
            {
                "question_id": number,
                "parsed_ans": letter,
                "ground_truth": options[problem["answer"]],
                "question": answer["prompt"],
                "pred": answer["text"],
                "is_multimodal": "<image>" in answer["prompt"],
            }
        )
    correct = len(results["correct"])
    summary = {"acc": correct / len(problems) * 100, "correct": correct, "count": len(problems)}
    return results, summary | {"results": indices, "outputs": outputs}


def main(args: argparse.Namespace) -> None:
    """Print the accuracies and write both files."""
    splits = read_any_json(Path(args.base_dir) / "pid_splits.json")
    check_keys(splits, (args.split,), str(Path(args.base_dir) / "pid_splits.json"))
    if not splits[args.split]:
        raise InputError(f"--split {args.split}: no problem in it")
    path = Path(args.base_dir) / "problems.json"
    all_problems = read_any_json(path)
    check_keys(all_problems, splits[args.split], str(path))
    problems = {number: all_problems[number] for number in splits[args.split]}
    for number, problem in problems.items():
        check_keys(problem, ("choices", "answer"), f"{path}: problem {number}")
    answers = answers_by_id(args.result_file, "prompt")
    results, summary = score(problems, answers, args.options)
    seen = {kind: sum(x["is_multimodal"] for x in results[kind]) for kind in results}
    pictured = seen["correct"] + seen["incorrect"]
    with_picture = 100 * seen["correct"] / pictured if pictured else math.nan
    print(
        f"Total: {summary['count']}, Correct: {summary['correct']}, "
        f"Accuracy: {summary['acc']:.2f}%, IMG-Accuracy: {with_picture:.2f}%"
    )
    write_text(args.output_file, json.dumps(results, indent=2))
    write_text(args.output_result, json.dumps(summary, indent=2))


def arguments(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--base-dir", required=True, help="has pid_splits.json and problems.json")
    parser.add_argument("--result-file", required=True)
    parser.add_argument("--output-file", required=True)
    parser.add_argument("--output-result", required=True)
    parser.add_argument("--split", default="test")
    parser.add_argument("--options", type=list, default=list("ABCDE"), help="letters, as ABCDE")
    return parser.parse_args(argv)


if __name__ == "__main__":
    with one_clear_error():
        main(arguments())
