"""The rows of a study, by method, scenario and seed."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterable, Mapping, Sequence

from llava.errors import InputError
from playground.studies.plan import Job, Plan

Measure = Callable[[Mapping], float]  # of a row


class UnfinishedError(InputError):
    """There is nothing to compare yet."""


class Results:
    """The rows of the part `report` at the places that all methods share.

    A title is a method's or a variant's; a place is a scenario and a seed.
    """

    def __init__(self, plan: Plan, rows: Sequence[Mapping]):
        self.plan, self.chosen = plan, plan.chosen(rows)
        self.by_job, self.count = plan.by_job(rows), len(rows)
        planned = plan.places("report")
        self.methods = [t for t in self.chosen if any(self.row(t, *place) for place in planned)]
        self.compared = [title for title in self.methods if title not in plan.not_compared]
        self.places = [
            (scenario, seed)
            for scenario in plan.scenarios("report")
            for seed in plan.seeds("report")
            if self.complete(scenario, seed)
        ]
        self.scenarios = list(dict.fromkeys(scenario for scenario, _ in self.places))
        if not (self.places and {plan.ours, plan.reference} <= set(self.methods)):
            raise UnfinishedError("no seed of any scenario is finished for every method")

    def complete(self, scenario: str, seed: int) -> bool:
        return all(self.row(title, scenario, seed) for title in self.methods)

    def row(self, title: str, scenario: str, seed: int, experts: int = 0) -> Mapping | None:
        part, setting = "report", self.chosen.get(title, "{}")
        if title in self.plan.variants:
            part, setting = self.plan.ablation_part, self.plan.variant(title, self.chosen)
        return self.by_job.get(Job(part, title, setting, scenario, seed, experts))

    @property
    def variants(self) -> list[str]:
        """The variants that are measured at all places of their scenarios."""
        scenarios = self.plan.scenarios("ablation")
        places = [place for place in self.places if place[0] in scenarios]
        return [
            title
            for title in self.plan.variants
            if places and all(self.row(title, *place) for place in places)
        ]

    def seeds(self, scenario: str) -> list[int]:
        return [seed for s, seed in self.places if s == scenario]

    def values(self, title: str, scenario: str, measure: Measure) -> list[float]:
        """A measure, seed by seed."""
        return [measure(self.row(title, scenario, seed)) for seed in self.seeds(scenario)]

    def mean(self, title: str, measure: Measure, scenarios: Iterable[str] | None = None) -> float:
        """The mean over scenarios of the mean over seeds."""
        return statistics.mean(
            statistics.mean(self.values(title, scenario, measure))
            for scenario in scenarios or self.scenarios
        )

    def differences(
        self, title: str, other: str, measure: Measure, scenario: str | None = None
    ) -> list[float]:
        """The measure of one title less that of another, at each place that the other has."""
        places = [p for p in self.places if scenario in (None, p[0]) and self.row(other, *p)]
        return [measure(self.row(title, *p)) - measure(self.row(other, *p)) for p in places]

    def best_baseline(self, loss: Measure) -> str:
        """The compared method of least mean loss, but for our own and what the plan calls ours."""
        ours = {self.plan.ours, *self.plan.document.get("ours_too", [])}
        others = [title for title in self.compared if title not in ours]
        return min(others, key=lambda title: self.mean(title, loss))
