"""The one exception that means: the user's input is at fault, and the message says how."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterator


class InputError(ValueError):
    """Bad input. The message names file, flag, sample or tensor, what is there and should be."""


def reason(error: Exception) -> str:
    """The text of a library's error on one line, shortened, to end a message of ours."""
    text = " ".join(str(error).split()) or type(error).__name__
    return text if len(text) <= 300 else f"{text[:300]} …"


@contextlib.contextmanager
def one_clear_error() -> Iterator[None]:
    """For entry points: an `InputError`, or a refusal of the disk, is one line and exit code 2."""
    try:
        yield
    except (InputError, OSError) as error:
        if not isinstance(error, InputError) and error.errno is None:
            raise
        print(f"error: {' '.join(str(error).split())}", file=sys.stderr, flush=True)
        raise SystemExit(2) from None
    except KeyboardInterrupt:
        print("interrupted; the same command goes on from here", file=sys.stderr, flush=True)
        raise SystemExit(130) from None
