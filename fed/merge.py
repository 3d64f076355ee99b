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

from llava.errors import InputError, one_clear_error

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
    """Merge models; what the flags of the same names do.

    Args:
        experts: two or more paths.
        output: the folder to write; None writes nothing and gives the merged projector back.
        options: the method's, by name or as name=value.
        settings: as `fed.merging.config.Settings` has them: base, method, scope, …

    Raises:
        InputError: what the command line refuses with one sentence and exit code 2.
    """
    from fed.merging.config import Settings
    from fed.merging.recipe import pairs
    from fed.merging.run import run

    return run(
        Settings(
            tuple(map(str, experts)),
            None if output is None else str(output),
            options=pairs(options),
            weights=None if weights is None else tuple(map(float, weights)),
            calibration_data=tuple(map(str, calibration_data)),
            **settings,
        )
    )


def parser() -> argparse.ArgumentParser:
    """The command line; a flag that is not given is not in what it parses to."""
    made = argparse.ArgumentParser(
        prog="python -m fed.merge",
        description="Merge models that were aligned on different data into one, without training.",
        argument_default=argparse.SUPPRESS,
        allow_abbrev=False,
    )
    add = made.add_argument
    add("recipe", nargs="?", help="a YAML file with the flags below as keys")
    add("--method", help="how to merge; default pivotmerge (--methods lists all)")
    add("--experts", nargs="+", metavar="PATH", help="projector files, or folders of any form")
    add("--base", metavar="PATH", help="what the experts were trained from; else their mean")
    add("--output", metavar="OUT", help="the folder to write")
    add("--weights", nargs="+", type=float, metavar="W", help="one for each expert; default 1")
    add("--options", nargs="+", metavar="NAME=VALUE", help="the method's options")
    add("--scope", help="projector (default), or all that is trainable: LoRA, full weights")
    add("--lora", help="with --scope all: factors (default) merges A and B, product merges BA")
    add("--config", metavar="FILE", help="config.json for OUT, where projector files have none")
    add(
        "--dry-run",
        "--dry_run",
        action="store_true",
        help="say how the experts lie to each other; write nothing",
    )
    add(
        "--force", action="store_true", help="merge models of different backbones; the card says so"
    )
    add("--overwrite", action="store_true", help="replace OUT")
    add("--calibration_data", nargs="+", metavar="JSON", help="LLaVA data: one, or one an expert")
    add("--image_folder", metavar="DIR", help="the pictures of the calibration data")
    add("--model-base", "--model_base", metavar="LLM", help="language model to calibrate with")
    add("--calibration_samples", type=int, metavar="N", help="records of each file; default 256")
    add("--version", help="conversation template of the calibration; default plain")
    add("--device", help="where calibration computes; default cpu")
    add("--methods", action="store_true", help="list all methods with their options")
    return made


def list_methods() -> str:
    """The methods that can merge, each with its options, their defaults and their ranges."""
    from fed import methods

    found = []
    for name in methods.names():
        method = methods.get(name)
        if not method.merges:
            continue
        options = " ".join(f"{o}={str(v).lower()}" for o, v in method.defaults.items())
        notes = " (needs --calibration_data)" if method.needs_calibration else ""
        found.append(f"{name:16} {options}{notes}".rstrip())
        found += [f"    {option}: {known.allowed}" for option, known in method.options.items()]
    return "\n".join(found)


def main(argv: Sequence[str] | None = None) -> None:
    flags = vars(parser().parse_args(argv))
    if flags.pop("methods", False):
        print(list_methods())
        return
    from fed.merging.recipe import settings

    what = settings(flags.pop("recipe", None), flags)
    if what.output is None and not what.dry_run:
        raise InputError("--output is missing: the folder to write; or give --dry-run")
    from fed.merging.run import run

    for line in run(what).lines:
        print(line, flush=True)


if __name__ == "__main__":
    with one_clear_error():
        try:
            main()
        except KeyboardInterrupt:
            print("interrupted; nothing was written", file=sys.stderr)
            raise SystemExit(130) from None
