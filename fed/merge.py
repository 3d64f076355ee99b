"""Merge aligned models once: `python -m fed.merge`.

    python -m fed.merge --method ties --experts A B C --base BASE --output OUT
    python -m fed.merge merge.yaml --options density=0.5

An expert is a projector's file, or a folder: projector-only, LoRA, full, or in transformers' own
llava layout. OUT is a checkpoint that loads as the experts do, with a model card. `fed.merging`
has the parts; `fed.merging.recipe` says what a YAML file holds.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from fed.merging.config import MergeConfig
from fed.merging.recipe import add_flags, options_of, read_config
from llava.errors import InputError, one_clear_error
from llava.flags import FlagParser

if TYPE_CHECKING:
    from fed.merging.run import Result


def merge(
    experts: Sequence[str],
    output: str | None = None,
    *,
    options: Mapping[str, Any] | Sequence[str] | None = None,
    weights: Sequence[float] | None = None,
    calibration_data: Sequence[str] = (),
    **settings: Any,
) -> Result:
    """Merge models, as the flags of the same names do.

    Args:
        experts: two or more paths.
        output: the folder to write; None writes nothing and gives the merged projector back.
        options: the method's, by name or as name=value.
        settings: as `fed.merging.config.MergeConfig` has them: base, method, scope, …

    Raises:
        InputError: what the command line refuses with one sentence and exit code 2.
    """
    from fed.merging.run import run

    return run(
        MergeConfig(
            tuple(map(str, experts)),
            None if output is None else str(output),
            options=options_of(options),
            weights=None if weights is None else tuple(map(float, weights)),
            calibration_data=tuple(map(str, calibration_data)),
            **settings,
        )
    )


def parser() -> argparse.ArgumentParser:
    """The command line; a flag that is not given is not in what it parses to."""
    top = FlagParser(
        prog="python -m fed.merge",
        description="Merge models that were aligned on different data into one, without training.",
        epilog="Flags may be written with dashes, too: --dry-run.",
        argument_default=argparse.SUPPRESS,
        allow_abbrev=False,
    )
    top.add_argument("recipe", nargs="?", help="a YAML file with the flags below as keys")
    add_flags(top)
    top.add_argument("--methods", action="store_true", help="list all methods with their options")
    return top


def list_methods() -> str:
    """The methods that can merge, each with its options, their defaults and their ranges."""
    from fed import methods

    lines = []
    for name in methods.names():
        method = methods.get(name)
        if not method.merges:
            continue
        options = " ".join(f"{o}={str(v).lower()}" for o, v in method.defaults.items())
        notes = " (needs --calibration_data)" if method.needs_calibration else ""
        lines.append(f"{name:16} {options}{notes}".rstrip())
        lines += [f"    {option}: {known.allowed}" for option, known in method.options.items()]
    return "\n".join(lines)


def main(argv: Sequence[str] | None = None) -> None:
    flags = vars(parser().parse_args(argv))
    if flags.pop("methods", False):
        print(list_methods())
        return
    config = read_config(flags.pop("recipe", None), flags)
    if config.output is None and not config.dry_run:
        raise InputError("--output is missing: the folder to write; or give --dry_run")
    from fed.merging.run import run

    for line in run(config).lines:
        print(line, flush=True)


if __name__ == "__main__":
    with one_clear_error():
        try:
            main()
        except KeyboardInterrupt:
            print("interrupted; nothing was written", file=sys.stderr)
            raise SystemExit(130) from None
