"""The page of the study of PivotMerge: tables and a picture."""

from __future__ import annotations

import functools
import itertools
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path

from fed.report import PALETTE, write_figure
from llava.atomic import write_text
from playground.studies.pivotmerge import CALIBRATION, JOINT, PivotMergePlan
from playground.studies.plan import Job
from playground.studies.plots import GREY, Bars, draw_bars, panels
from playground.studies.results import Results
from playground.studies.tables import (
    TableColumn,
    mean_cell,
    paired_table,
    spread,
    spread_cell,
    table,
    tuning_table,
)

BEST = "best single expert"
KNOWS = 0.05  # exact captions of its own, below which what is kept of an expert tells nothing


def loss(row: Mapping) -> float:
    return row["loss"]


def exact(row: Mapping) -> float:
    return 100 * row["exact"]


LOSS, EXACT = TableColumn("loss", loss, 3), TableColumn("exact %", exact, 1, better=1)
FINE = TableColumn("loss", loss, 4)  # for differences


class PivotMergeResults(Results):
    """Results of methods, of the experts themselves and of joint training."""

    plan: PivotMergePlan

    def complete(self, scenario: str, seed: int) -> bool:
        return super().complete(scenario, seed) and bool(
            self.row(JOINT, scenario, seed) and self.experts(scenario, seed)
        )

    def row(self, title: str, scenario: str, seed: int, experts: int = 0) -> Mapping | None:
        if title == BEST:
            return min(self.experts(scenario, seed, experts).values(), key=loss)
        return super().row(title, scenario, seed, experts)

    def experts(self, scenario: str, seed: int, number: int = 0) -> dict[str, Mapping]:
        """The experts' own rows, of those that a merge of `number` has; none if one is missing."""
        merge = self.row(self.plan.reference, scenario, seed, number)
        names = merge["of"] if merge else ()
        rows = {name: self.row(f"expert {name}", scenario, seed) for name in names}
        return rows if all(rows.values()) else {}

    def relative(self, row: Mapping) -> float:
        """The loss over that of the reference."""
        job = self.plan.job_of(row)
        return loss(row) / loss(self.row(self.plan.reference, job.scenario, job.seed))

    def has_domains(self, scenario: str) -> bool:
        """Whether each expert has a domain of its own."""
        row = self.row(self.plan.reference, scenario, self.seeds(scenario)[0])
        return set(row["of"]) <= row["domains"].keys()

    def kept(self, row: Mapping) -> float:
        """Mean over domains: the share of the domain's own expert's exact captions, in percent."""
        job = self.plan.job_of(row)
        shares = []
        for name, expert in self.experts(job.scenario, job.seed).items():
            if expert["domains"][name]["exact"] >= KNOWS:
                shares.append(row["domains"][name]["exact"] / expert["domains"][name]["exact"])
        return 100 * statistics.mean(shares)

    def marked(self, title: str) -> str:
        return f"{title} †" if title in self.plan.not_compared else title

    def ordered(self) -> list[str]:
        titles = [*self.methods, BEST, JOINT]
        return sorted(titles, key=lambda title: self.mean(title, self.relative))


def titles_table(results: PivotMergeResults, titles: Sequence[str], column: TableColumn) -> str:
    """A measure by scenario, and the mean loss over the reference's."""
    columns = [(s, spread_cell(results, s, column)) for s in results.scenarios]
    ratio = TableColumn("loss / mean's", results.relative, 3)
    columns.append((ratio.name, mean_cell(results, ratio)))
    return table("", titles, columns, results.marked)


def kept_table(results: PivotMergeResults) -> str:
    kept = TableColumn("mean", results.kept, 0, better=1)
    scenarios = [scenario for scenario in results.scenarios if results.has_domains(scenario)]
    columns = [(s, spread_cell(results, s, kept)) for s in scenarios]
    columns.append((kept.name, mean_cell(results, kept, scenarios)))
    return table("", results.ordered(), columns, results.marked)


def counts_table(results: PivotMergeResults) -> str:
    """Loss on the domains of the experts that are merged, the plain mean over them."""
    counts = results.plan.document["counts"]
    places = [(counts["cell"], seed) for seed in results.seeds(counts["cell"])]
    numbers = [*counts["experts"], 0]
    if not all(results.experts(*p, n) for p, n in itertools.product(places, numbers)):
        return "Not measured yet.\n"

    def cell(number: int, title: str) -> str:
        values = []
        for place in places:
            experts = results.experts(*place, number)
            rows = [results.row(title, *place, number)]
            rows = experts.values() if title == BEST else rows
            values.append(min(_over(row, experts) for row in rows))
        return spread(values, 3)

    heads = [f"{number or 'all 8'} experts" for number in numbers]
    cells = [functools.partial(cell, number) for number in numbers]
    return table("", [*counts["methods"], BEST], [*zip(heads, cells, strict=True)])


def _over(row: Mapping, names: Sequence[str]) -> float:
    return statistics.mean(row["domains"][name]["loss"] for name in names)


def tuned_table(results: PivotMergeResults) -> str:
    plan, places = results.plan, results.plan.places("development")
    jobs = [Job("development", plan.reference, "{}", *place) for place in places]
    base = [loss(results.by_job[job]) for job in jobs]

    def cells(rows: Sequence[Mapping]) -> list[str]:
        losses = [loss(row) for row in rows]
        ratio = statistics.mean(a / b for a, b in zip(losses, base, strict=True))
        return [f"{value:.3f}" for value in [*losses, ratio]]

    return tuning_table(results, [*(scenario for scenario, _ in places), "loss / mean's"], cells)


def draw(results: PivotMergeResults, path: Path) -> None:
    """Loss over the mean's: a bar the mean over seeds, a dot a seed."""
    titles = [title for title in results.ordered() if title != BEST]
    figure, axes = panels(results.scenarios, (2.5, 0.3 * len(titles) + 1.2), sharey=True)
    bars = Bars(
        lambda title, scenario: results.values(title, scenario, results.relative),
        lambda title: PALETTE[0] if title == results.plan.ours else GREY,
    )
    draw_bars(figure, axes, results, titles, [bars], "loss / mean's", 1, results.marked)
    for panel in axes:
        panel.set_xlim(right=min(panel.get_xlim()[1], 1.5))
    write_figure(figure, path)


def write_report(plan: PivotMergePlan, rows: Sequence[Mapping], folder: Path, name: str) -> None:
    results = PivotMergeResults(plan, rows)
    draw(results, folder / f"{name}.png")
    write_text(folder / f"{name}.md", page(results, name))


def looks_at(plan: PivotMergePlan) -> str:
    """Which data the methods look at that look at any."""
    of = {title: plan.methods[title]["calibration"] for title in plan.not_compared}
    own, held_out = ([t for t, data in of.items() if data == d] for d in ("own", "held out"))
    said = f"† looks at data: {CALIBRATION} pairs, the experts' own ({', '.join(own)})"
    if held_out:
        said += (
            f", or such as no expert has seen and settings are chosen on ({', '.join(held_out)}: "
            "their own settings are chosen on the very pictures that they look at)"
        )
    return f"{said}."


def page(results: PivotMergeResults, name: str) -> str:
    plan, best = results.plan, results.best_baseline(results.relative)
    report, development = plan.document["report"], plan.document["development"]
    epochs, cell = plan.document["joint"]["epochs"], plan.document["counts"]["cell"]
    seeds, ours = report["seeds"], plan.ours
    about = "\n".join(
        f"- {scenario}: {words}" for scenario, words in plan.document["about"].items()
    )
    return f"""# Merging aligned projectors on the playground

Made by `bash scripts/merge/study.sh` from [{name}.jsonl]({name}.jsonl);
`playground/studies/{name}.yaml` says what is run. Experts are aligned apart from one start,
each on its own data; `fresh`: the start is a projector as it is drawn, `brief`: after a brief
alignment on a tenth of all pictures. The experts:

{about}

Held-out pictures (`{report["part"]}`), {len(seeds)} seeds
({seeds[0]} to {seeds[-1]}: of the start and of the order of the data), mean ± standard deviation.
Settings were chosen on other pictures (`{development["part"]}`) and another seed,
{development["seeds"][0]}: {", ".join(development["cells"])}.

Joint training: {epochs} epochs on all data from the same start, the upper reference. The
best single expert is picked by the very loss that is shown.
{looks_at(plan)}

## Held-out loss (nats a token)

`loss / mean's`: over that of the plain mean of the same experts; the mean over cells.

{titles_table(results, results.ordered(), LOSS)}
![loss over that of the mean]({name}.png)

## Exactly named pictures, %

{titles_table(results, results.ordered(), EXACT)}
## What is kept of each expert

Where experts have domains, on each one's own: the share of its exact captions that the merged model
has, in percent, the mean over experts; not over one that names fewer than {KNOWS:.0%} of its own.

{kept_table(results)}
## {ours} against the mean

Loss differences on the same experts; negative is in favour of {ours}. p: two-sided sign-flip
test over all pairs.

{paired_table(results, plan.reference, [FINE])}
## {ours} against the best of the others that look at no data, {best}

Best by the loss above, on these very runs: the comparison favours it.

{paired_table(results, best, [FINE])}
## More and fewer experts

{cell}: so many of the eight, drawn by seed; the loss is the mean over the domains of those.

{counts_table(results)}
## Ablations of {ours}

The same experts and pictures as above, everything else as chosen.

{titles_table(results, [ours, *results.variants], LOSS)}
## How settings were chosen

By the mean over the development cells of the loss over the plain mean's; at most four settings a
method. The chosen ones are marked.

{tuned_table(results)}"""
