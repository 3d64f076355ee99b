"""A parser of flags in both spellings of a name, and words NAME=VALUE.

The flags of training are in `llava/train/arguments.py`.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterable
from typing import Any

from llava.errors import InputError


class FlagParser(argparse.ArgumentParser):
    """A parser whose flags may be written with dashes or underscores: --dry_run is --dry-run.

    Help and messages have the spelling that the flag was added with.
    """

    def add_argument(self, *names: Any, **options: Any) -> argparse.Action:
        twins = [other_spelling(name) for name in names if name.startswith("--")]
        action = super().add_argument(*names, *(t for t in twins if t not in names), **options)
        action.option_strings = [name for name in names if name.startswith("-")]
        return action


def other_spelling(flag: str) -> str:
    """`--dry-run` of `--dry_run`, and the other way round."""
    name = flag.removeprefix("--")
    return "--" + (name.replace("_", "-") if "_" in name else name.replace("-", "_"))


def pairs(what: str, words: Iterable[str], form: str = "name=value") -> dict[str, str]:
    """`["tau=0.3", …]` as a mapping; `what` opens messages, `form` is what they say is expected.

    Raises:
        InputError: a word without `=`, or a name that is given twice.
    """
    values: dict[str, str] = {}
    for word in words:
        name, equals, value = word.partition("=")
        if not equals:
            raise InputError(f"{what} {word}: expected {form}")
        if name in values:
            raise InputError(f"{what}: {name} is given twice")
        values[name] = value
    return values
