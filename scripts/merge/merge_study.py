"""Run the merging study: train experts, merge them by every method, measure what comes out.

    bash scripts/merge/study.sh --hours 3

What is there is not made again: experts and joint models lie in runs/merge-study, measures in
playground/results/pivotmerge.jsonl. First every setting is measured on the development part, then
each method's best on the part `report`, then ablations of PivotMerge and fewer experts, there too.
"""

from __future__ import annotations

import argparse
import itertools
import json
import multiprocessing
import os
import statistics
import time
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from pathlib import Path

from study_experts import PLAN, ROOT, Cell, cells, expert_files, read_plan
from study_measure import Job, run_cell
from study_train import begin, train_all

from llava.errors import one_clear_error

RESULTS = ROOT / "playground/results/pivotmerge.jsonl"


def settings(plan: Mapping, title: str) -> list[str]:
    return [json.dumps(setting) for setting in plan["methods"][title]["settings"]]


def tuning(plan: Mapping) -> Iterator[Job]:
    """Every setting of every method on the development part."""
    for cell in cells(plan, "development"):
        for title in plan["methods"]:
            for setting in settings(plan, title):
                yield Job("development", cell, title, setting, 0)


def reporting(plan: Mapping, chosen: Mapping[str, str]) -> Iterator[Job]:
    """Every method as chosen, each expert, and joint training; on the part `report`."""
    for cell in cells(plan, "report"):
        for title, setting in chosen.items():
            yield Job("report", cell, title, setting, 0)
        for title in ["joint training", *(f"expert {name}" for name in expert_files(cell))]:
            yield Job("report", cell, title, "{}", 0)


def ablating(plan: Mapping, chosen: Mapping[str, str]) -> Iterator[Job]:
    """Our method with other options."""
    for cell in cells(plan, "report"):
        for title, options in plan["ablation"]["variants"].items():
            setting = {**json.loads(chosen[plan["ours"]]), **options}
            yield Job("report", cell, title, json.dumps(setting), 0)


def counting(plan: Mapping, chosen: Mapping[str, str]) -> Iterator[Job]:
    """Some methods on fewer experts."""
    of = plan["counts"]
    for cell in cells(plan, "report"):
        if f"{cell.scenario} {cell.start}" == of["cell"]:
            for count, title in itertools.product(of["experts"], of["methods"]):
                yield Job("report", cell, title, chosen[title], count)


def choose(plan: Mapping, rows: Sequence[dict]) -> dict[str, str]:
    """Of each method the setting whose held-out loss, over the reference's, is least on average."""
    loss = {Job.of_row(row).key: row["loss"] for row in rows}
    best = {}
    for title in plan["methods"]:
        means = {}
        for setting in settings(plan, title):
            ratios = []
            for cell in cells(plan, "development"):
                own = loss.get(Job("development", cell, title, setting, 0).key)
                mean = loss.get(Job("development", cell, plan["reference"], "{}", 0).key)
                ratios.append(own / mean if own and mean else None)
            if None not in ratios:
                means[setting] = statistics.mean(ratios)
        if len(means) == len(settings(plan, title)):
            best[title] = min(means, key=means.get)
    return best


def read_rows(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def measure_all(plan: dict, jobs: Sequence[Job], results: Path, workers: int, deadline: float):
    """Measure what is not there, cell by cell; False if time ran out first."""
    done = {Job.of_row(row).key for row in read_rows(results)}
    left: dict[Cell, list[Job]] = {}
    for job in jobs:
        if job.key not in done:
            left.setdefault(job.cell, []).append(job)
    spawn = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(workers, spawn, initializer=begin) as pool:
        tasks = {}
        for cell, of_cell in left.items():
            for few in _few(of_cell):
                tasks[pool.submit(_timely, plan, list(few), results, deadline)] = cell
        for i, task in enumerate(as_completed(tasks)):
            print(f"{i + 1}/{len(tasks)} measured: {tasks[task].name}", flush=True)
            task.result()
    return time.time() <= deadline or not left


def _few(jobs: Sequence[Job], size: int = 12) -> Iterator[Sequence[Job]]:
    for start in range(0, len(jobs), size):
        yield jobs[start : start + size]


def _timely(plan: dict, jobs: Sequence[Job], results: Path, deadline: float) -> None:
    if time.time() <= deadline:
        run_cell(plan, jobs, results)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--hours", type=float, default=1.0, help="begin nothing after so long")
    parser.add_argument("--workers", type=int, default=os.cpu_count(), help="processes at a time")
    parser.add_argument("--plan", type=Path, default=PLAN)
    parser.add_argument("--results", type=Path, default=RESULTS)
    args = parser.parse_args()
    deadline = time.time() + 3600 * args.hours
    args.results.parent.mkdir(parents=True, exist_ok=True)
    with one_clear_error():
        plan = read_plan(args.plan)
        more = (args.results, args.workers, deadline)
        if not train_all(plan, ["development", "report"], args.workers, deadline):
            return
        if not measure_all(plan, list(tuning(plan)), *more):
            return
        chosen = choose(plan, read_rows(args.results))
        for jobs in (reporting, counting, ablating):
            if not measure_all(plan, list(jobs(plan, chosen)), *more):
                return


if __name__ == "__main__":
    main()
