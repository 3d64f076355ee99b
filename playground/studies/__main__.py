"""Run a study, as far as it gets in the time it is given, then write its page.

    python -m playground.studies playground/studies/fedcmp.yaml --hours 3

Finished jobs lie in --results, by default playground/results/NAME.jsonl, and are not run again: a
study that was stopped goes on. NAME.md and its pictures are written beside them.
"""

from __future__ import annotations

import argparse
import os
import time
from pathlib import Path

from llava.errors import one_clear_error
from playground import ROOT
from playground.studies.registry import read_plan, write_report
from playground.studies.results import UnfinishedError
from playground.studies.rows import read_rows
from playground.studies.runner import Workers, run_study


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m playground.studies", description=__doc__.split("\n")[0]
    )
    parser.add_argument("plan", type=Path, help="a YAML file, as those in playground/studies")
    parser.add_argument("--hours", type=float, default=1.0, help="begin no job after so long")
    parser.add_argument("--workers", type=int, default=os.cpu_count(), help="processes at a time")
    parser.add_argument("--results", type=Path, help="a file with a JSON object for each job")
    args = parser.parse_args()
    deadline = time.monotonic() + 3600 * args.hours
    with one_clear_error():
        plan = read_plan(args.plan)
        file = args.results or ROOT / f"playground/results/{args.plan.stem}.jsonl"
        file = file.resolve()
        with Workers(args.workers, deadline) as workers:
            run_study(plan, file, workers)
        rows = read_rows(file)
        try:
            write_report(plan, rows, file.parent, file.stem)
        except UnfinishedError as error:
            print(f"no page yet: {error}")
        else:
            print(f"wrote {file.with_suffix('.md')} from {len(rows)} rows")


if __name__ == "__main__":
    main()
