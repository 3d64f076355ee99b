"""Run a study: everything that its plan asks for and is not there yet, while time is left."""

from __future__ import annotations

import multiprocessing
import os
import time
from collections.abc import Iterable, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from pathlib import Path

from playground import ROOT
from playground.studies.plan import Job, Plan, Task
from playground.studies.rows import add_row, read_rows


class Workers:
    """Processes that run tasks, the working folder being the repository's root.

    They last over all stages of a study, for a process needs seconds to import what trains.

    Args:
        count: of processes.
        deadline: of `time.monotonic()`; nothing is begun after it.
    """

    def __init__(self, count: int, deadline: float):
        self.count, self.deadline = count, deadline
        spawn = multiprocessing.get_context("spawn")
        self.pool = ProcessPoolExecutor(count, spawn, initializer=_begin, max_tasks_per_child=12)

    def __enter__(self) -> Workers:
        return self

    def __exit__(self, *_: object) -> None:
        self.pool.shutdown()

    def run(self, tasks: Sequence[Task]) -> bool:
        """Run all tasks; False if some were not begun before the deadline."""
        waiting, running = list(tasks), dict[Future, Task]()
        while waiting or running:
            for task in [task for task in waiting if task.ready]:
                if len(running) == self.count or time.monotonic() > self.deadline:
                    break
                waiting.remove(task)
                print(f"{len(tasks) - len(waiting)}/{len(tasks)} {task.name}", flush=True)
                running[self.pool.submit(task.call, *task.arguments)] = task
            if not running:
                return False
            for future in wait(running, return_when=FIRST_COMPLETED).done:
                del running[future]
                future.result()
        return True


def run_study(plan: Plan, file: Path, workers: Workers) -> None:
    """Prepare, tune, and measure with the chosen settings, as far as time goes.

    Args:
        file: of the rows; a job that has one is not run again.
    """
    if not workers.run(plan.preparation()):
        return
    if not measure_all(plan, plan.tuning(), file, workers):
        return
    for jobs in plan.stages(plan.chosen(read_rows(file))):
        if not measure_all(plan, jobs, file, workers):
            return


def measure_all(plan: Plan, jobs: Iterable[Job], file: Path, workers: Workers) -> bool:
    """Measure the jobs without a row; False if time ran out first."""
    done = plan.by_job(read_rows(file))
    missing = [job for job in dict.fromkeys(jobs) if job not in done]
    batches = plan.batches(missing)
    return workers.run([Task(str(batch[0]), _measure, (plan, batch, file)) for batch in batches])


def _begin() -> None:
    import transformers

    transformers.logging.set_verbosity_error()
    os.chdir(ROOT)


def _measure(plan: Plan, jobs: Sequence[Job], file: Path) -> None:
    for job in jobs:
        add_row(file, {"job": plan.described(job), **plan.measure(job)})
