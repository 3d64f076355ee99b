"""The tables of the page of Pilot's study, and its picture."""

from __future__ import annotations

import functools
import json
import statistics
from collections.abc import Callable, Sequence
from pathlib import Path

from pilot_plan import WHOSE, PilotPlan, measure, over_tasks
from study_found import Found
from study_plan import Job

from fed.report import PALETTE, markdown, write_figure
from fed.significance import sign_flip_p, spread

Of = Callable[[dict], float]


class PilotFound(Found):
    """The finished runs, of variants too."""

    plan: PilotPlan

    def __init__(self, plan: PilotPlan, rows: Sequence[dict]):
        super().__init__(plan, rows)
        by_key = {Job(**row["job"]).key: row for row in rows}
        self.variants = []
        for job in plan.ablating(self.chosen[plan.ours]) if plan.ours in self.chosen else ():
            if job.key in by_key:
                self.cells[job.title, job.scenario, job.seed] = by_key[job.key]
        for title in plan.variants():
            of = plan.document["ablation"]["scenarios"]
            places = [(scenario, seed) for scenario, seed in self.places if scenario in of]
            if places and all((title, *place) in self.cells for place in places):
                self.variants.append(title)

    def best_baseline(self) -> str:
        others = [title for title in self.compared if title != self.plan.ours]
        return max(others, key=lambda title: self.over_scenarios(title, of("all", "exact")))

    def tasks(self, scenario: str) -> list[str]:
        return list(self.row(self.methods[0], scenario)["measures"])

    def row(self, title: str, scenario: str) -> dict:
        """Of any seed."""
        return self.cells[title, scenario, self.seeds(scenario)[0]]

    def less(self, ours: str, other: str, value: Of) -> list[float]:
        """Pair by pair of the same scenario and seed, where there is the other."""
        return [value(self.cells[ours, s, k]) - value(self.cells[other, s, k])
                for s, k in self.places if (other, s, k) in self.cells]  # fmt: skip

    def ordered(self, titles: Sequence[str]) -> list[str]:
        return sorted(titles, key=lambda t: -self.over_scenarios(t, of("all", "exact")))


def of(whose: str, what: str, task: str | None = None) -> Of:
    """A measure of a run: of a task, or the mean over all; `exact` in percent."""
    scale = 100 if what == "exact" else 1
    if task is None:
        return lambda row: scale * over_tasks(row, whose, what)
    return lambda row: scale * measure(row, task, whose, what)


def overall_table(found: PilotFound, titles: Sequence[str], scenarios: Sequence[str]) -> str:
    """Exact answers and loss, the mean over tasks, by who is asked."""
    head = [""]
    head += [f"{s}: {whose} exact %" for s in scenarios for whose in WHOSE]
    head += [f"{s}: loss" for s in scenarios]
    body = []
    value = of("all", "exact")

    def order(title: str) -> float:
        means = [statistics.mean(found.values(title, s, value)) for s in scenarios]
        return -statistics.mean(means)

    for title in sorted(titles, key=order):
        cells = [title]
        for s in scenarios:
            cells += [spread(found.values(title, s, of(whose, "exact")), 1) for whose in WHOSE]
        cells += [spread(found.values(title, s, of("all", "loss")), 3) for s in scenarios]
        body.append(cells)
    return markdown(head, body)


def domains_table(found: PilotFound, scenario: str, what: str, titles: Sequence[str]) -> str:
    """A scenario's domains, `own / others`; one number where the two are of one model."""
    measures = found.row(found.methods[0], scenario)["measures"]
    domains = [(task, domain) for task in measures for domain in measures[task]]
    digits, scale = (1, 100) if what == "exact" else (3, 1)
    body = []
    for title in found.ordered(titles):
        cells = [title]
        for task, domain in domains:
            both = []
            for whose in ("own", "others"):
                value = functools.partial(_of_domain, task, domain, whose, what, scale)
                both.append(spread(found.values(title, scenario, value), digits))
            cells.append(" / ".join(dict.fromkeys(both)))
        body.append(cells)
    return markdown(["", *(domain for _, domain in domains)], body)


def _of_domain(task: str, domain: str, whose: str, what: str, scale: float, row: dict) -> float:
    return scale * row["measures"][task][domain][whose][what]


def tasks_table(found: PilotFound, others: Sequence[str]) -> str:
    """Ours less each other method: exact answers of all nine models, task by task."""
    places = [(s, task) for s in found.scenarios for task in found.tasks(s)]
    body = []
    for other in others:
        cells = [other]
        for scenario, task in places:
            value = of("all", "exact", task)
            ours = found.values(found.plan.ours, scenario, value)
            pairs = zip(ours, found.values(other, scenario, value), strict=True)
            less = [a - b for a, b in pairs]
            cells.append(f"{spread(less, 1)} ({sum(v > 0 for v in less)} of {len(less)})")
        body.append(cells)
    return markdown(["", *(f"{s}: {task}" for s, task in places)], body)


def paired_table(found: PilotFound, others: Sequence[str]) -> str:
    """Ours less each other one over all pairs of scenario and seed, with the sign-flip test's p."""
    kinds = [(whose, "exact", 1, 1) for whose in WHOSE] + [("all", "loss", 3, -1)]
    head = [""]
    for whose, what, _, _ in kinds:
        head += [f"{whose}: {what}{' %' if what == 'exact' else ''}", "better, p"]
    body = []
    for other in others:
        cells = [other]
        for whose, what, digits, sign in kinds:
            less = found.less(found.plan.ours, other, of(whose, what))
            won = sum(sign * value > 0 for value in less)
            cells += [spread(less, digits), f"{won} of {len(less)}, {sign_flip_p(less):.2g}"]
        body.append(cells)
    return markdown(head, body)


def cost_table(found: PilotFound, titles: Sequence[str]) -> str:
    """Numbers a client and exchange, in thousands, as the runs have counted them; seconds a run."""
    body = []
    for title in titles:
        places = {scenario for other, scenario, _ in found.cells if other == title}
        scenario = next(s for s in found.scenarios if s in places)
        runs = [found.cells[title, scenario, seed] for seed in found.seeds(scenario)]
        seconds = f"{statistics.mean(row['seconds'] for row in runs):.0f}"
        rounds = runs[0]["parameters"]
        if None in rounds:
            body.append([title, *["not counted"] * 3, seconds])
            continue
        body.append([title, *(_each(rounds, w) for w in ("trained", "sent", "received")), seconds])
    return markdown(["", "trained", "sent", "received", "seconds a run"], body)


def _each(rounds: Sequence[dict], what: str) -> str:
    """One number where all exchanges are alike, else one each."""
    values = [f"{of_round[what] / 1000:,.0f}" for of_round in rounds]
    return values[0] if len(set(values)) == 1 else ", ".join(values)


def tuning_table(found: PilotFound, rows: Sequence[dict]) -> str:
    by_key = {Job(**row["job"]).key: row for row in rows}
    plan, body = found.plan, []
    scenarios, seeds = plan.scenarios("development"), plan.seeds("development")
    for title in found.methods:
        for setting in plan.settings(title):
            jobs = [Job("development", title, setting, s, k) for s in scenarios for k in seeds]
            runs = [by_key[job.key] for job in jobs]
            shown = ", ".join(f"{k} {v}" for k, v in json.loads(setting).items())
            mark = " ←" if setting == found.chosen[title] else ""
            cells = [statistics.mean(map(of("all", "loss"), runs))]
            cells += [statistics.mean(map(of(whose, "exact"), runs)) for whose in ("own", "others")]
            score = f"{statistics.mean(map(plan.score, runs)):.3f}"
            numbers = [f"{cells[0]:.3f}", *(f"{value:.1f}" for value in cells[1:])]
            body.append([title, shown + mark, score, *numbers])
    return markdown(
        ["method", "setting", "chosen by", "loss", "own exact %", "others exact %"], body
    )


def draw(found: PilotFound, path: Path) -> None:
    """Exact answers of own and of other clients' models: a bar the mean, a dot a seed."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    order = found.ordered(found.methods)
    size = (3.9 * len(found.scenarios) + 1.8, 0.5 * len(order) + 1.4)
    figure, panels = pyplot.subplots(
        1, len(found.scenarios), figsize=size, layout="constrained", sharey=True, squeeze=False
    )
    for axes, scenario in zip(panels[0], found.scenarios, strict=True):
        for shift, whose, colour in ((-0.2, "own", PALETTE[0]), (0.2, "others", PALETTE[1])):
            for y, title in enumerate(order):
                values = found.values(title, scenario, of(whose, "exact"))
                label = {"own": "clients of the task", "others": "other clients"}[whose]
                axes.barh(y + shift, statistics.mean(values), height=0.38, color=colour, alpha=0.6,
                          label=None if y else label)  # fmt: skip
                axes.plot(values, [y + shift] * len(values), "o", ms=2.5, color="0.25")
        axes.set_title(f"scenario {scenario}: {', '.join(found.tasks(scenario))}", fontsize=10)
        axes.set_xlabel("exact answers, %, mean over tasks")
        axes.grid(axis="x", alpha=0.25)
        axes.spines[["top", "right"]].set_visible(False)
    panels[0][0].set_yticks(range(len(order)), order)
    panels[0][0].invert_yaxis()
    figure.legend(*panels[0][0].get_legend_handles_labels(), loc="outside lower center",
                  ncols=2, frameon=False)  # fmt: skip
    write_figure(figure, path)
