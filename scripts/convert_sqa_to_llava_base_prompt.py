"""ScienceQA's problems as text: one letter of a format for each part, as in `QCM-LEA`.

In front of the dash stands what is asked: Q question, C context, M options, L lecture, E solution.
Behind it what is answered: A answer, L, E, and LEPA, which names its parts.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence

from llava.errors import InputError

INPUTS = ("CQM", "QCM", "QCML", "QCME", "QCMLE", "QCLM", "QCEM", "QCLEM")
OUTPUTS = ("A", "AL", "AE", "ALE", "AEL", "LA", "EA", "LEA", "ELA", "LEPA")


def build_prompt_chatbot(
    problems: dict[str, dict],
    shot_qids: Iterable[str],
    prompt_format: str,
    use_caption: bool = False,
    options: Sequence[str] = "ABCDE",
    is_test: bool = False,
) -> dict[str, tuple[str, str]]:
    """(what is asked, what is answered) of each problem in `shot_qids`.

    Raises:
        InputError: a format that is not ScienceQA's.
    """
    return {
        number: create_one_example(problems[number], prompt_format, use_caption, options, is_test)
        for number in shot_qids
    }


def create_one_example(
    problem: dict, prompt_format: str, use_caption: bool, options: Sequence[str], is_test: bool
) -> tuple[str, str]:
    """The two texts of one problem; with `is_test` the answer is left open."""
    asked, _, answered = prompt_format.partition("-")
    if asked not in INPUTS or answered not in OUTPUTS:
        raise InputError(
            f"{prompt_format!r} is no prompt format; known are {', '.join(INPUTS)}, a dash, "
            f"and {', '.join(OUTPUTS)}"
        )
    caption = problem.get("caption") if use_caption else None
    context = f"{problem['hint']} {caption or ''}".strip()
    choices = zip(options, problem["choices"], strict=False)
    # In the data some line breaks are written as a backslash and an n.
    explained = {
        "L": problem["lecture"].replace("\\n", "\n"),
        "E": problem["solution"].replace("\\n", "\n"),
    }
    parts = {
        "Q": f"Question: {problem['question']}",
        "C": f"Context: {context or 'N/A'}",
        "M": f"Options: {' '.join(f'({letter}) {choice}' for letter, choice in choices)}",
    }
    lines = []
    for part in re.findall("[LE]+|.", asked):
        reasons = " ".join(explained[letter] for letter in part) if part not in parts else ""
        lines.append(parts.get(part) or f"BECAUSE: {reasons}")
    answer = options[problem["answer"]]
    output = "Answer:" if is_test else _answer(answered, answer, explained)
    return _tidy("\n".join(lines)), _tidy(output)


def _answer(form: str, answer: str, explained: dict[str, str]) -> str:
    if form == "LEPA":
        named = (("LECTURE", explained["L"]), ("SOLUTION", explained["E"]))
        told = "".join(f"{name}: {text}\n" for name, text in named if text.strip())
        return f"{told}###\nANSWER: {answer}."
    conclusion = f"The answer is {answer}."
    if form == "A":
        return f"Answer: {conclusion}"
    if form[0] == "A":
        # ScienceQA's own code has AL give the solution and AE the lecture.
        letters = {"L": "E", "E": "L"}.get(form[1:], form[1:])
        return f"Answer: {conclusion} BECAUSE: {' '.join(explained[one] for one in letters)}"
    return f"Answer: {' '.join(explained[one] for one in form[:-1])} {conclusion}"


def _tidy(text: str) -> str:
    """Double spaces become single ones, and a reason that is not there is not announced."""
    text = text.replace("  ", " ").strip()
    return text.replace("BECAUSE:", "").strip() if text.endswith("BECAUSE:") else text
