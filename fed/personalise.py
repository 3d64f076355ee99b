"""A new client after a finished run: only its private parameters are fitted.

    python -m fed.personalise --METHOD_run OUTPUT <the flags of llava.train>

for a method that knows newcomers (`Method.personalise`), which has further flags of its own.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence

import transformers

from fed import methods
from fed.server.round_state import RoundState
from llava.errors import InputError, one_clear_error
from llava.progress import progress_shown


@progress_shown()
def personalise(argv: Sequence[str] | None = None) -> None:
    """Fit a newcomer's private parameters. Bad input is found before anything trains."""
    argv = list(sys.argv[1:] if argv is None else argv)
    able = {n: m.personalise for n in methods.names() if (m := methods.get(n)).personalise}
    flags = {f"--{name}_run": fit for name, fit in able.items()}
    given = [flags[flag] for word in argv if (flag := word.partition("=")[0]) in flags]
    if not given and not {"-h", "--help"}.isdisjoint(argv):
        given = list(able.values())
    if not given:
        raise InputError(f"{' or '.join(flags)} is missing: the --output_dir of a finished run")
    given[0](argv, RoundState.load)


def main() -> None:
    with one_clear_error():
        transformers.logging.set_verbosity_error()
        personalise()


if __name__ == "__main__":
    main()
