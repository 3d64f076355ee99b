"""Score POPE: does the model see what is not there?

python -m llava.eval.eval_pope --annotation-dir coco --question-file Q.jsonl --result-file A.jsonl

The folder has a `coco_pope_<category>.json` for each category, with one JSON object a line, whose
`label` (yes or no) belongs to that category's question of the same place in the question file.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from llava.errors import InputError, one_clear_error
from llava.eval.questions import answers_by_id, read_jsonl


def says_yes(text: str) -> bool:
    """Whether an answer is a yes: its first sentence has none of the words No, no and not."""
    words = text.split(".")[0].replace(",", "").split(" ")
    return not {"No", "no", "not"} & set(words)


def score(answers: Sequence[bool], labels: Sequence[bool]) -> dict[str, float]:
    """Counts (TP, FP, TN, FN) and rates of yes-answers; a rate over nothing is 0."""
    pairs = list(zip(answers, labels, strict=True))
    tp, fp = pairs.count((True, True)), pairs.count((True, False))
    tn, fn = pairs.count((False, False)), pairs.count((False, True))
    precision, recall = _rate(tp, tp + fp), _rate(tp, tp + fn)
    return {
        "TP": tp,
        "FP": fp,
        "TN": tn,
        "FN": fn,
        "Accuracy": _rate(tp + tn, len(pairs)),
        "Precision": precision,
        "Recall": recall,
        "F1 score": _rate(2 * precision * recall, precision + recall),
        "Yes ratio": _rate(tp + fp, len(pairs)),
    }


def _rate(part: float, whole: float) -> float:
    return part / whole if whole else 0.0


def main(args: argparse.Namespace) -> None:
    """Print the scores of every category."""
    questions = read_jsonl(args.question_file, "question_id", "category")
    answers = answers_by_id(args.result_file)
    files = sorted(Path(args.annotation_dir).glob("coco_pope_*.json"))
    if not files:
        raise InputError(f"--annotation-dir {args.annotation_dir}: no coco_pope_*.json there")
    for file in files:
        category = file.stem.removeprefix("coco_pope_")
        labels = [label["label"] != "no" for label in read_jsonl(file, "label")]
        ids = [q["question_id"] for q in questions if q["category"] == category]
        if len(ids) != len(labels):
            raise InputError(
                f"{file} has {len(labels)} labels, {args.question_file} has {len(ids)} questions "
                f"of the category {category}"
            )
        if lost := [number for number in ids if number not in answers]:
            raise InputError(f"{args.result_file}: question {lost[0]} has no answer")
        print(f"Category: {category}, # samples: {len(ids)}")
        show(score([says_yes(answers[number]["text"]) for number in ids], labels))
        print("====================================")


def show(scores: dict[str, float]) -> None:
    """Print `score`'s result as upstream does."""
    print("TP\tFP\tTN\tFN\t")
    print("\t".join(str(scores[name]) for name in ("TP", "FP", "TN", "FN")))
    for name in ("Accuracy", "Precision", "Recall", "F1 score", "Yes ratio"):
        print(f"{name}: {scores[name]}")
    row = ("F1 score", "Accuracy", "Precision", "Recall", "Yes ratio")
    print(", ".join(f"{scores[name]:.3f}" for name in row))


def arguments(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--annotation-dir", required=True)
    parser.add_argument("--question-file", required=True)
    parser.add_argument("--result-file", required=True)
    return parser.parse_args(argv)


if __name__ == "__main__":
    with one_clear_error():
        main(arguments())
