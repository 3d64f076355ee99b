"""Run a study: what study.yaml asks for and is not there yet, for as long as it is given.

    bash scripts/fed/study.sh --hours 3

Every run is one of fed.train, with the flags of scripts/fed/pretrain_playground.sh and those that
make the cell; a line of the results names them. First settings are tried on the development part,
then each method's best is run on the part `report`, then the ablations. Killed, it goes on.
"""

from __future__ import annotations

import argparse
import contextlib
import fcntl
import json
import multiprocessing
import os
import shlex
import shutil
import time
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

from study_plan import PLAN, RESULTS, ROOT, Job, Plan, read_rows

from llava.errors import one_clear_error
from llava.processes import name_of

WORK = ROOT / "runs/study"
SCRIPT = ROOT / "scripts/fed/pretrain_playground.sh"


def playground_flags() -> list[str]:
    """The flags of pretrain_playground.sh, as its text has them."""
    text = SCRIPT.read_text().replace("\\\n", " ")
    (command,) = [line for line in text.splitlines() if "-m fed.train" in line]
    return [word for word in shlex.split(command)[3:] if word != "$@"]


def run(job: Job, plan_file: Path, results: Path) -> None:
    """Make one run in this process, and add its line to the results."""
    plan = Plan(plan_file)
    flags = plan.flags(job)
    records, seconds = rounds_of([*playground_flags(), *flags], WORK)
    line = summary(job, plan, records) | {"seconds": seconds, "flags": shlex.join(flags)}
    add_line(results, line)


def rounds_of(flags: Sequence[str], work: Path) -> tuple[list[dict], float]:
    """Make one run of fed.train in this process: the records of its rounds, and its seconds.

    Its files are written under `work` and removed; a log and cached features stay there.
    """
    import transformers

    from fed.train import train

    transformers.logging.set_verbosity_error()
    os.chdir(ROOT)
    folder = work / name_of()
    shutil.rmtree(folder, ignore_errors=True)
    common = ["--feature_cache", str(work / "features"), "--report_to", "none"]
    began = time.perf_counter()
    (work / "logs").mkdir(parents=True, exist_ok=True)
    with open(work / f"logs/{name_of()}.log", "a") as log, contextlib.redirect_stdout(log):
        print(f"$ {shlex.join(flags)}", flush=True)
        train([*flags, *common, "--output_dir", str(folder)])
    records = [json.loads(line) for line in (folder / "rounds.jsonl").read_text().splitlines()]
    shutil.rmtree(folder)
    return records, round(time.perf_counter() - began, 1)


def add_line(results: Path, line: dict) -> None:
    """Add a finished run to the results, whoever else does so at the same time."""
    results.parent.mkdir(parents=True, exist_ok=True)
    with open(results, "a") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        file.write(json.dumps(line) + "\n")
        file.flush()


def summary(job: Job, plan: Plan, records: list[dict]) -> dict:
    """A line of the results: by measured round the held-out loss and share of exact captions.

    Where clients keep models of their own, the mean over clients.
    """
    name = plan.heldout(job)
    measured = [record for record in records if record["heldout"]]
    models = [[sets[name] for sets in record["heldout"].values()] for record in measured]
    return {
        "job": vars(job),
        "rounds": [record["round"] for record in measured],
        "loss": [_mean([m["loss"] for m in of_round]) for of_round in models],
        "exact": [_mean([m["exact"] for m in of_round]) for of_round in models],
        "drift": [record["drift"] for record in records],
    }


def _mean(values: list[float]) -> float:
    return round(sum(values) / len(values), 5)


def run_all(
    jobs: Iterable[Job],
    args: argparse.Namespace,
    deadline: float,
    run: Callable[[Job, Path, Path], None],
) -> bool:
    """Make the runs that are not there; False if time ran out first."""
    done = {Job(**row["job"]).key for row in read_rows(args.results)}
    left = [job for job in dict.fromkeys(jobs) if job.key not in done]
    spawn = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(args.workers, spawn, max_tasks_per_child=12) as pool:
        waiting = set()
        for i, job in enumerate(left):
            while len(waiting) >= args.workers:
                finished = {future for future in waiting if future.done()}
                for future in finished:
                    future.result()
                waiting -= finished
                time.sleep(0.05)
            if time.monotonic() > deadline:
                break
            print(f"{i + 1}/{len(left)} {job.part} {job.title} {job.setting} "
                  f"{job.scenario} seed {job.seed}", flush=True)  # fmt: skip
            waiting.add(pool.submit(run, job, args.plan, args.results))
        for future in waiting:
            future.result()
    return time.monotonic() <= deadline or not left


def arguments(about: str, plan: Path, results: Path) -> argparse.Namespace:
    """What a study's command line says."""
    parser = argparse.ArgumentParser(description=about.split("\n")[0])
    parser.add_argument("--hours", type=float, default=1.0, help="begin no run after so long")
    parser.add_argument("--workers", type=int, default=os.cpu_count(), help="runs at a time")
    parser.add_argument("--plan", type=Path, default=plan)
    parser.add_argument("--results", type=Path, default=results)
    return parser.parse_args()


def main() -> None:
    args = arguments(__doc__, PLAN, RESULTS / "fedcmp.jsonl")
    deadline = time.monotonic() + 3600 * args.hours
    with one_clear_error():
        study(Plan(args.plan), args, deadline, run)


def study(
    plan: Plan,
    args: argparse.Namespace,
    deadline: float,
    run: Callable[[Job, Path, Path], None],
) -> None:
    """Tune, report, then try variants of our own method, as far as time goes."""
    if not run_all(plan.tuning(), args, deadline, run):
        return
    chosen = plan.chosen(read_rows(args.results))
    if run_all(plan.reporting(chosen), args, deadline, run):
        run_all(plan.ablating(chosen[plan.ours]), args, deadline, run)


if __name__ == "__main__":
    main()
