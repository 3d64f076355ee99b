"""The one exception that means: the user's input is at fault, and the message says how."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterator


class InputError(ValueError):
    """Bad input. The message names file, flag, sample or tensor, what is there and should be."""


@contextlib.contextmanager
def one_clear_error() -> Iterator[None]:
    """For entry points: an `InputError` becomes one line on stderr and exit code 2."""
    try:
        yield
    except InputError as error:
        print(f"error: {error}", file=sys.stderr, flush=True)
        raise SystemExit(2) from None
