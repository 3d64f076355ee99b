"""ScienceQA → LLaVA's records, for training and for `llava.eval.model_vqa_science`.

python scripts/convert_sqa_to_llava.py convert_to_llava --base-dir scienceqa --split test \
    --prompt-format CQM-A

Reads pid_splits.json and problems.json of the folder and writes into it
llava_SPLIT_FORMAT.json, or with convert_to_jsonl scienceqa_SPLIT_FORMAT.jsonl.
"""

from __future__ import annotations

import argparse
import json
import os
from collections.abc import Iterator
from pathlib import Path

from convert_sqa_to_llava_base_prompt import build_prompt_chatbot

from llava.atomic import write_text
from llava.errors import one_clear_error
from llava.eval.questions import check_keys
from llava.json_files import read_any_json


def convert_to_llava(base_dir: str, split: str, prompt_format: str = "QCM-LEA") -> None:
    """Write conversations."""
    records = []
    for head, asked, answered in _problems(base_dir, split, prompt_format):
        turns = [{"from": "human", "value": asked}, {"from": "gpt", "value": answered}]
        records.append(head | {"conversations": turns})
    print(f"Number of samples: {len(records)}")
    path = Path(base_dir) / f"llava_{split}_{prompt_format}.json"
    write_text(path, json.dumps(records, indent=2))


def convert_to_jsonl(base_dir: str, split: str, prompt_format: str = "QCM-LEPA") -> None:
    """Write lines with `instruction` and `output`."""
    lines = [
        json.dumps(head | {"instruction": asked, "output": answered}) + "\n"
        for head, asked, answered in _problems(base_dir, split, prompt_format)
    ]
    write_text(Path(base_dir) / f"scienceqa_{split}_{prompt_format}.jsonl", "".join(lines))


def _problems(base_dir: str, split: str, form: str) -> Iterator[tuple[dict, str, str]]:
    """Id and picture, what is asked, what is answered."""
    folder = Path(base_dir)
    splits = read_any_json(folder / "pid_splits.json")
    problems = read_any_json(folder / "problems.json")
    check_keys(splits, (split,), str(folder / "pid_splits.json"))
    for number, (asked, answered) in build_prompt_chatbot(problems, splits[split], form).items():
        if asked.startswith("Question: "):
            asked = asked.replace("Question: ", "")
        if answered.startswith("Answer: "):
            answered = answered.replace("Answer: ", "")
        head = {"id": number}
        if image := problems[number]["image"]:
            head["image"] = os.path.join(number, image)
            asked += "\n<image>"
        yield head, asked, answered


def arguments(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("task", choices=["convert_to_llava", "convert_to_jsonl"])
    parser.add_argument("--base-dir", "--base_dir", required=True)
    parser.add_argument("--split", required=True)
    parser.add_argument("--prompt-format", "--prompt_format", default=None)
    return parser.parse_args(argv)


def main(args: argparse.Namespace) -> None:
    form = {} if args.prompt_format is None else {"prompt_format": args.prompt_format}
    tasks = {"convert_to_llava": convert_to_llava, "convert_to_jsonl": convert_to_jsonl}
    tasks[args.task](args.base_dir, args.split, **form)


if __name__ == "__main__":
    with one_clear_error():
        main(arguments())
