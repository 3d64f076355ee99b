"""Train what the merging study merges: as far as it gets in the time it is given.

bash scripts/merge/study.sh --hours 3
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import time
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait

from study_experts import ROOT, WORK, cells, read_plan, runs, train


def begin() -> None:
    """What a worker does first."""
    import transformers

    transformers.logging.set_verbosity_error()
    os.chdir(ROOT)


def train_all(plan: dict, parts: list[str], workers: int, deadline: float) -> bool:
    """Train every missing folder; False if time ran out first."""
    wanted = {f: flags for part in parts for cell in cells(plan, part)
              for f, flags in runs(plan, cell).items()}  # fmt: skip
    left = [folder for folder in wanted if not (WORK / folder).exists()]
    spawn, running = multiprocessing.get_context("spawn"), dict[Future, str]()
    with ProcessPoolExecutor(workers, spawn, initializer=begin, max_tasks_per_child=12) as pool:
        while left or running:
            for folder in list(left):
                source = wanted[folder].get("from")
                ready = source is None or (WORK / source).exists()
                if ready and len(running) < workers and time.time() < deadline:
                    print(f"{len(left)} left: {folder}", flush=True)
                    left.remove(folder)
                    running[pool.submit(train, folder, wanted[folder], plan)] = folder
            if not running:
                return not left
            done, _ = wait(running, return_when=FIRST_COMPLETED)
            for future in done:
                running.pop(future)
                future.result()
    return True


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--hours", type=float, default=1.0, help="begin no run after so long")
    parser.add_argument("--workers", type=int, default=os.cpu_count(), help="runs at a time")
    args = parser.parse_args()
    deadline = time.time() + 3600 * args.hours
    train_all(read_plan(), ["development", "report"], args.workers, deadline)


if __name__ == "__main__":
    main()
