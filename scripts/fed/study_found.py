"""What a study's finished runs amount to: cells that all methods have, and measures of a run."""

from __future__ import annotations

import itertools
import statistics
from collections.abc import Callable, Sequence

from study_plan import Job, Plan

from llava.errors import InputError

# (method, scenario, seed) → a finished run
Cells = dict[tuple[str, str, int], dict]


class Found:
    """The runs of the part `report` that are there for every method: the same cells for all."""

    def __init__(self, plan: Plan, rows: Sequence[dict]):
        self.plan, self.chosen = plan, plan.chosen(rows)
        by_key = {Job(**row["job"]).key: row for row in rows}
        self.cells: Cells = {}
        for job in plan.reporting(self.chosen):
            if job.key in by_key:
                self.cells[job.title, job.scenario, job.seed] = by_key[job.key]
        self.methods = [title for title in plan.methods if any(c[0] == title for c in self.cells)]
        self.compared = [title for title in self.methods if title not in plan.not_compared]
        self.places = [
            (scenario, seed)
            for scenario in plan.scenarios("report")
            for seed in plan.seeds("report")
            if all((title, scenario, seed) in self.cells for title in self.methods)
        ]
        self.scenarios = list(dict.fromkeys(scenario for scenario, _ in self.places))
        if not (self.methods and self.places):
            raise InputError("no seed of any scenario is finished for every method")

    def seeds(self, scenario: str) -> list[int]:
        return [seed for s, seed in self.places if s == scenario]

    def values(self, title: str, scenario: str, of: Callable[[dict], float]) -> list[float]:
        return [of(self.cells[title, scenario, seed]) for seed in self.seeds(scenario)]

    def over_scenarios(self, title: str, of: Callable[[dict], float]) -> float:
        """The mean over scenarios of the mean over seeds."""
        return statistics.mean(statistics.mean(self.values(title, s, of)) for s in self.scenarios)

    def best_baseline(self) -> str:
        others = [title for title in self.compared if title != self.plan.ours]
        return min(others, key=lambda title: self.over_scenarios(title, final_loss))


def final_loss(row: dict) -> float:
    return row["loss"][-1]


def final_exact(row: dict) -> float:
    return 100 * row["exact"][-1]


def rises(row: dict) -> float:
    """Oscillation: what the held-out loss gained in the rounds in which it rose, in nats."""
    return sum(max(after - before, 0) for before, after in itertools.pairwise(row["loss"]))


def drift(row: dict) -> float:
    return statistics.mean(value for value in row["drift"] if value is not None)
