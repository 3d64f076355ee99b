"""The page of the study of Pilot: tables and a picture."""

from __future__ import annotations

import functools
import itertools
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path

from fed.markdown import markdown_table
from fed.report import PALETTE, write_figure
from llava.atomic import write_text
from playground.studies.pilot import WHOSE, PilotPlan, measure, over_tasks
from playground.studies.plots import Bars, draw_bars, panels
from playground.studies.results import Measure, Results
from playground.studies.tables import (
    TableColumn,
    sign_flip_p,
    spread,
    spread_cell,
    table,
    tuning_table,
    wins,
)


def of(whose: str, name: str, task: str | None = None) -> Measure:
    """A measure of a run: of a task, or the mean over all; `exact` in percent."""
    scale = 100 if name == "exact" else 1
    if task is None:
        return lambda row: scale * over_tasks(row, whose, name)
    return lambda row: scale * measure(row, task, whose, name)


EXACT = [TableColumn(f"{whose} exact %", of(whose, "exact"), 1, better=1) for whose in WHOSE]
LOSS = [TableColumn(f"{whose} loss", of(whose, "loss"), 3) for whose in ("own", "all")]


def ordered(results: Results, titles: Sequence[str], scenarios: Sequence[str]) -> list[str]:
    """The most exact answers first, of all models."""
    return sorted(titles, key=lambda t: -results.mean(t, of("all", "exact"), scenarios))


def measures_of(results: Results, scenario: str) -> Mapping[str, Mapping]:
    """Tasks with their domains, as any row of a scenario has them."""
    return results.row(results.methods[0], scenario, results.seeds(scenario)[0])["measures"]


def overall_table(results: Results, titles: Sequence[str], scenarios: Sequence[str]) -> str:
    """Exact answers and loss, the mean over tasks, by who is asked."""
    places = [*itertools.product(scenarios, EXACT), *itertools.product(scenarios, LOSS)]
    columns = [(f"{s}: {column.name}", spread_cell(results, s, column)) for s, column in places]
    return table("", ordered(results, titles, scenarios), columns)


def domains_table(results: Results, scenario: str, name: str) -> str:
    """A scenario's domains, `own / others`; one number where the two are of one model."""
    digits, scale = (1, 100) if name == "exact" else (3, 1)

    def cell(task: str, domain: str, title: str) -> str:
        spreads = []
        for whose in ("own", "others"):
            rows = [results.row(title, scenario, seed) for seed in results.seeds(scenario)]
            values = [scale * row["measures"][task][domain][whose][name] for row in rows]
            spreads.append(spread(values, digits))
        return " / ".join(dict.fromkeys(spreads))

    columns = [
        (domain, functools.partial(cell, task, domain))
        for task, domains in measures_of(results, scenario).items()
        for domain in domains
    ]
    return table("", ordered(results, results.methods, results.scenarios), columns)


def tasks_table(results: Results, others: Sequence[str]) -> str:
    """Ours less each other method: exact answers of all models, task by task."""

    def cell(scenario: str, task: str, other: str) -> str:
        exact = of("all", "exact", task)
        less = results.differences(results.plan.ours, other, exact, scenario)
        return f"{spread(less, 1)} ({wins(less, 1)})"

    places = [(s, task) for s in results.scenarios for task in measures_of(results, s)]
    return table("", others, [(f"{s}: {t}", functools.partial(cell, s, t)) for s, t in places])


def paired_table(results: Results, others: Sequence[str]) -> str:
    """Ours less each other one over all pairs of scenario and seed, with the sign-flip test's p."""
    body = []
    for other in others:
        cells = [other]
        for column in [*EXACT, *LOSS]:
            less = results.differences(results.plan.ours, other, column.measure)
            p = f"{wins(less, column.better)}, {sign_flip_p(less):.2g}"
            cells += [spread(less, column.digits), p]
        body.append(cells)
    names = [column.name for column in [*EXACT, *LOSS]]
    return markdown_table(["", *(head for name in names for head in (name, "better, p"))], body)


def cost_table(results: Results, titles: Sequence[str]) -> str:
    """Numbers a client and exchange, in thousands, as the runs have counted them."""
    body = []
    for title in titles:
        rows = [r for place in results.places if (r := results.row(title, *place))]
        rows = [row for row in rows if row["job"]["scenario"] == rows[0]["job"]["scenario"]]
        rounds, counts = rows[0]["parameters"], ["not counted"] * 3
        if None not in rounds:
            counts = [_each(rounds, name) for name in ("trained", "sent", "received")]
        body.append([title, *counts])
    return markdown_table(["", "trained", "sent", "received"], body)


def _each(rounds: Sequence[Mapping], name: str) -> str:
    """One number where all exchanges are alike, else one each."""
    values = [f"{counts[name] / 1000:,.0f}" for counts in rounds]
    return values[0] if len(set(values)) == 1 else ", ".join(values)


def tuned_table(results: Results) -> str:
    columns = [("chosen by", results.plan.score, 3), ("loss", of("all", "loss"), 3)]
    columns += [(f"{whose} exact %", of(whose, "exact"), 1) for whose in ("own", "others")]

    def cells(rows: Sequence[Mapping]) -> list[str]:
        return [f"{statistics.mean(map(value, rows)):.{n}f}" for _, value, n in columns]

    return tuning_table(results, [name for name, *_ in columns], cells)


def draw(results: Results, path: Path) -> None:
    """Exact answers of own and of other clients' models: a bar the mean, a dot a seed."""
    titles = ordered(results, results.methods, results.scenarios)
    figure, axes = panels(results.scenarios, (3.9, 0.5 * len(titles) + 1.4), sharey=True)
    bars = [
        Bars(
            lambda title, scenario, whose=whose: results.values(
                title, scenario, of(whose, "exact")
            ),
            lambda title, colour=colour: colour,
            label,
            shift,
            height=0.38,
        )
        for shift, whose, label, colour in (
            (-0.2, "own", "clients of the task", PALETTE[0]),
            (0.2, "others", "other clients", PALETTE[1]),
        )
    ]
    draw_bars(figure, axes, results, titles, bars, "exact answers, %, mean over tasks")
    for panel, scenario in zip(axes, results.scenarios, strict=True):
        tasks = ", ".join(measures_of(results, scenario))
        panel.set_title(f"scenario {scenario}: {tasks}", fontsize=10)
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside lower center",
                  ncols=2, frameon=False)  # fmt: skip
    write_figure(figure, path)


def write_report(plan: PilotPlan, rows: Sequence[Mapping], folder: Path, name: str) -> None:
    results = Results(plan, rows)
    draw(results, folder / f"{name}.png")
    write_text(folder / f"{name}.md", page(results, name))


def page(results: Results, name: str) -> str:
    plan, ours, variants = results.plan, results.plan.ours, results.variants
    others = [title for title in results.methods if title != ours]
    seeds = "; ".join(f"{s}: {', '.join(map(str, results.seeds(s)))}" for s in results.scenarios)
    part = plan.document["report"]["part"]
    ablated = plan.scenarios("ablation")
    tasks = _tasks(results)
    text = f"""# Pilot and its baselines on the playground's tasks

Made by `bash scripts/fed/pilot_study.sh` from the {results.count} runs in
[{name}.jsonl]({name}.jsonl), each one of `fed.train`, whose flags stand in its line;
`playground/studies/pilot.yaml` says what is run. {tasks} All begin with the same projector,
aligned on public pictures; LoRA and what each method has for a projector train. Held-out samples
(`{part}`), mean ± standard deviation over seeds ({seeds}).

Exact: the share of samples whose whole answer is the model's first choice, token by token. `own`:
the models of the clients of a task, asked that task; `others`: the models of all other clients;
`all`: both. Methods with one model for all have one number for the three.

## All tasks

The mean over tasks; loss in nats a token.

{overall_table(results, results.methods, results.scenarios)}
![exact answers by method]({name}.png)

"""
    for scenario in results.scenarios:
        text += f"""## Scenario {scenario}, one by one

`own / others`; exact answers, %:

{domains_table(results, scenario, "exact")}
Loss:

{domains_table(results, scenario, "loss")}
"""
    text += f"""## {ours} less each other method

The same scenario and seed make a pair. p is of a two-sided sign-flip test over all pairs.

{paired_table(results, others)}
Exact answers of all models, %, task by task, and of how many seeds {ours} is ahead:

{tasks_table(results, others)}
## {ours} without its parts

With the setting that {ours} has chosen, in scenario {" and ".join(ablated)}.

{overall_table(results, [ours, *variants], ablated) if variants else "Not run yet."}
"""
    if variants:
        text += f"""{ours} less each of them:

{paired_table(results, variants)}
"""
    return (
        text
        + f"""## What an exchange costs

Thousands of numbers a client, as the runs have counted them; one
number where all exchanges are alike, else one for each. Where nothing is exchanged there is still a
state that the run keeps.

{cost_table(results, [*results.methods, *variants])}
## How settings were chosen

By the loss of each task's own clients on the development part, the mean over tasks (samples
`{plan.document["development"]["part"]}`, scenario {" and ".join(plan.scenarios("development"))},
seed {", ".join(map(str, plan.seeds("development")))}). The chosen ones are marked.

{tuned_table(results)}"""
    )


def _tasks(results: Results) -> str:
    sentences = []
    for scenario in results.scenarios:
        tasks = results.plan.tasks(scenario)
        names = ", ".join(dict.fromkeys(tasks.values()))
        sentences.append(f"Scenario {scenario}: {len(tasks)} clients of {names}.")
    return " ".join(sentences)
