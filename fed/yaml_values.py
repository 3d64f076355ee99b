"""Values of clients.yaml as text: YAML makes a number, a date or a truth of what was meant as text.

`007` is 7 to YAML, `no` is False, `2024-05-01` a date and `~` nothing; what was typed is lost then,
and is asked for again in quotes.
"""

from __future__ import annotations

import datetime
import json

from llava.errors import InputError

_KINDS = {bool: "yes or no", int: "a number", float: "a number", datetime.date: "a date",
          datetime.datetime: "a date"}  # fmt: skip


def unquoted(key: str, value: object) -> str:
    """The end of a message on a value that should be text: that quotes make it one, or nothing."""
    kind = _KINDS.get(type(value))
    if kind is None:
        return ""
    example = "…" if isinstance(value, bool) else value
    return f' (YAML reads {kind} there: put it in quotes, {key}: "{example}")'


def text_of(key: str, value: object, where: str) -> str:
    """A text, as it is; `where` opens the message of an `InputError` on anything else."""
    if not isinstance(value, str) or not value:
        raise InputError(f"{where}: {key} is {value!r}, a text is expected{unquoted(key, value)}")
    return value


def flag_of(key: str, value: object, where: str) -> str:
    """A flag's value as the command line would have it: text, numbers, truths, or a mapping."""
    if isinstance(value, dict):
        return json.dumps(value)
    if isinstance(value, (str, int, float)) and value != "":
        return str(value)
    raise InputError(
        f"{where}: {key} is {value!r}, a value is expected; leave {key} out for that of the "
        f"command line{unquoted(key, value)}"
    )
