"""Run Pilot's study: what pilot_study.yaml asks for and is not there yet.

    bash scripts/fed/pilot_study.sh --hours 3

First the projector that all begin with is aligned, once, in runs/pilot-study. Then it goes as in
study.py: every setting on the development part, each method's best on the part `report`, variants
of Pilot there too. Killed, it goes on.
"""

from __future__ import annotations

import os
import shlex
import shutil
import subprocess
import sys
import time
from pathlib import Path

from pilot_plan import PLAN, PilotPlan, summary
from study import add_line, arguments, rounds_of, study
from study_plan import RESULTS, ROOT, Job

from llava.atomic import own_name
from llava.errors import InputError, one_clear_error


def make_start(plan: PilotPlan) -> None:
    """Align the projector that all runs begin with, unless it is there."""
    if plan.start.exists():
        return
    temporary, log_file = own_name(plan.start), plan.work / "start.log"
    shutil.rmtree(temporary, ignore_errors=True)
    plan.work.mkdir(parents=True, exist_ok=True)
    print("the projector to start from", flush=True)
    command = [sys.executable, "-m", "llava.train.train", *plan.start_flags()]
    with open(log_file, "w") as log:
        made = subprocess.run(
            [*command, "--output_dir", temporary], cwd=ROOT, stdout=log, stderr=subprocess.STDOUT
        )
    if made.returncode:
        raise InputError(f"the projector to start from was not made; {log_file} says why")
    os.replace(temporary, plan.start)


def run(job: Job, plan_file: Path, results: Path) -> None:
    """Make one run in this process, and add its line to the results."""
    plan = PilotPlan(plan_file)
    flags = plan.flags(job)
    records, seconds = rounds_of(flags, plan.work)
    line = summary(job, plan, records) | {"seconds": seconds, "flags": shlex.join(flags)}
    add_line(results, line)


def main() -> None:
    args = arguments(__doc__, PLAN, RESULTS / "pilot.jsonl")
    deadline = time.monotonic() + 3600 * args.hours
    with one_clear_error():
        plan = PilotPlan(args.plan)
        if args.hours > 0:
            make_start(plan)
        study(plan, args, deadline, run)


if __name__ == "__main__":
    main()
