"""JSON may hold what is no text: half of a surrogate pair, as a caption cut inside an emoji has."""

from __future__ import annotations

from typing import Any


def half_character(value: Any) -> str | None:
    """A text of a JSON value (its keys too) that no UTF-8 can hold, cut to the place; else None."""
    left = [value]
    while left:
        found = left.pop()
        if isinstance(found, dict):
            left += [*found.values(), *found]
        elif isinstance(found, list):
            left += found
        elif isinstance(found, str) and not found.isascii():
            try:
                found.encode()
            except UnicodeEncodeError as error:
                return found[max(0, error.start - 20) : error.end + 5]
    return None
