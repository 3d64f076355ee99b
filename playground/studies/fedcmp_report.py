"""The page of the study of Fed-CMP: tables and two pictures."""

from __future__ import annotations

import functools
import itertools
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path

from fed.markdown import markdown_table
from fed.report import PALETTE, write_figure
from llava.atomic import write_text
from playground.studies.fedcmp import LEFT_OUT, FedCMPPlan
from playground.studies.plan import Job
from playground.studies.plots import GREY, Bars, cut_longest, draw_bars, draw_curves, panels
from playground.studies.results import Results
from playground.studies.tables import (
    Cell,
    TableColumn,
    mean_cell,
    paired_table,
    spread,
    spread_cell,
    table,
    tuning_table,
)


def final_loss(row: Mapping) -> float:
    return row["loss"][-1]


def final_exact(row: Mapping) -> float:
    return 100 * row["exact"][-1]


def final_explained(row: Mapping) -> float:
    return 100 * row["explained"][-1]


def rises(row: Mapping) -> float:
    """What the held-out loss gained in the rounds in which it rose, in nats: oscillation."""
    return sum(max(after - before, 0) for before, after in itertools.pairwise(row["loss"]))


def drift(row: Mapping) -> float:
    return statistics.mean(value for value in row["drift"] if value is not None)


CENTRALISED = "centralised"
LOSS, EXACT = TableColumn("loss", final_loss, 3), TableColumn("exact %", final_exact, 1, better=1)
EXPLAINED = TableColumn("explained %", final_explained, 1, better=1)
RISES, DRIFT = TableColumn("rises", rises, 3), TableColumn("drift", drift, 2)


def main_table(results: Results, column: TableColumn, *more: tuple[str, Cell]) -> str:
    """Every method by scenario, in the order of the mean loss.

    Args:
        more: columns behind the mean.
    """
    columns = [(s, spread_cell(results, s, column)) for s in results.scenarios]
    columns += [("mean", mean_cell(results, column))] if len(columns) > 1 else []
    columns += more
    titles = sorted(results.methods, key=lambda title: results.mean(title, final_loss))
    return table("method", titles, columns)


def measured(results: Results) -> list[TableColumn]:
    """What the plan's runs end with."""
    row = results.row(results.plan.ours, *results.places[0])
    return [LOSS, EXACT, *[EXPLAINED] * ("explained" in row)]


def loss_table(results: Results) -> str:
    """The main table of losses, with the way where the plan has all data in one place."""
    if CENTRALISED not in results.methods:
        return main_table(results, LOSS)
    whole = main_table(results, LOSS, ("way, %", functools.partial(way, results)))
    reference = results.plan.reference
    return f"""`way`: how much of the distance from {reference} to all data in one place is gone,
on the mean.

{whole}"""


def way(results: Results, title: str) -> str:
    """How much of the mean loss between the reference and all data in one place is gone, in %."""
    start, end, here = (
        results.mean(t, final_loss) for t in (results.plan.reference, CENTRALISED, title)
    )
    return str(round(100 * (start - here) / (start - end)))


def on_the_way(results: Results) -> list[str]:
    """The scenarios in which more than the end is measured."""
    title = results.plan.ours
    return [s for s, seed in dict(results.places).items()
            if len(results.row(title, s, seed)["rounds"]) > 1]  # fmt: skip


def dynamics_table(results: Results) -> str:
    columns = []
    for scenario in on_the_way(results):
        columns += [
            (f"{scenario}: rounds", functools.partial(rounds_to_reference, results, scenario)),
            (f"{scenario}: rises", mean_cell(results, RISES, [scenario])),
            (f"{scenario}: drift", mean_cell(results, DRIFT, [scenario])),
        ]
    return table("method", results.compared, columns)


def rounds_to_reference(results: Results, scenario: str, title: str) -> str:
    """After how many rounds the reference's final loss is reached: mean, and how many never do."""
    needed = []
    for seed in results.seeds(scenario):
        goal = final_loss(results.row(results.plan.reference, scenario, seed))
        row = results.row(title, scenario, seed)
        reached = [r for r, loss in zip(row["rounds"], row["loss"], strict=True) if loss <= goal]
        needed += reached[:1]
    never = len(results.seeds(scenario)) - len(needed)
    mean = f"{statistics.mean(needed):.1f}" if needed else ""
    return f"{mean} ({never} never)" if never and needed else mean or "never"


def tuned_table(results: Results) -> str:
    """Settings by the final loss on the development part, the mean over its seeds."""
    scenarios = results.plan.scenarios("development")
    several = len(scenarios) > 1

    def cells(rows: Sequence[Mapping]) -> list[str]:
        means = [
            statistics.mean(final_loss(row) for row in rows if row["job"]["scenario"] == scenario)
            for scenario in scenarios
        ]
        means += [statistics.mean(means)] * several
        return [f"{value:.3f}" for value in means]

    return tuning_table(results, [*scenarios, *["mean"] * several], cells)


def ablation_table(results: Results) -> str:
    """Variants on the development part, over the seeds that are measured."""
    plan, body = results.plan, []
    scenarios, seeds = plan.scenarios("ablation"), plan.seeds("ablation")
    for title in plan.variants:
        by_scenario = [[r for k in seeds if (r := results.row(title, s, k))] for s in scenarios]
        if not all(by_scenario):
            continue
        cells = [
            spread([column.measure(row) for row in rows], column.digits)
            for rows, column in itertools.product(by_scenario, (LOSS, EXACT))
        ]
        mean = statistics.mean(statistics.mean(map(final_loss, rows)) for rows in by_scenario)
        body.append([title, *cells, f"{mean:.3f}", str(len(by_scenario[-1]))])
    heads = [f"{s}: {column.name}" for s in scenarios for column in (LOSS, EXACT)]
    if not body:
        return "Not run yet.\n"
    return markdown_table(["variant", *heads, "mean loss", "seeds"], body)


def left_out_section(results: Results) -> str:
    """Our method beside the same run without the clients that the plan leaves out."""
    plan, body = results.plan, []
    if LEFT_OUT not in plan.document:
        return ""
    for scenario, seed in plan.places(LEFT_OUT):
        job = Job(LEFT_OUT, plan.ours, results.chosen[plan.ours], scenario, seed)
        if job in results.by_job and (scenario, seed) in results.places:
            ends = [results.row(t, scenario, seed) for t in (plan.reference, plan.ours)]
            body.append([final_loss(row) for row in (*ends, results.by_job[job])])
    if not body:
        return ""
    cells = [spread(column, 3) for column in zip(*body, strict=True)]
    share = spread([100 * (ours / without - 1) for _, ours, without in body], 1)
    heads = [plan.reference, plan.ours, f"{plan.ours} without them", "more than without them, %"]
    return f"""## What the left-out clients cost

`{plan.document[LEFT_OUT]["clients"]}.yaml` is `noisy.yaml` without the clients whose captions are
shuffled. Final loss over {len(body)} seeds; the last column is pair by pair.

{markdown_table(heads, [[*cells, share]])}
"""


def draw_gains(results: Results, path: Path) -> None:
    """Each method's final loss less the reference's, a dot a seed, a bar the mean."""
    plan = results.plan
    titles = sorted(results.compared, key=lambda title: results.mean(title, final_loss))
    titles.remove(plan.reference)
    figure, axes = panels(results.scenarios, (2.9, 0.3 * len(titles) + 1.2), sharey=True)
    bars = Bars(
        lambda title, s: results.differences(title, plan.reference, final_loss, s),
        lambda title: PALETTE[0] if title == plan.ours else GREY,
    )
    draw_bars(figure, axes, results, titles, [bars], f"loss less {plan.reference}'s", origin=0)
    less = [[statistics.mean(bars.values(t, s)) for t in titles] for s in results.scenarios]
    cut_longest(axes, less)
    write_figure(figure, path)


def write_report(plan: FedCMPPlan, rows: Sequence[Mapping], folder: Path, name: str) -> None:
    results = Results(plan, rows)
    if on_the_way(results):
        label, path = "held-out caption loss (nats a token)", folder / f"{name}-curves.png"
        draw_curves(results, on_the_way(results), final_loss, CENTRALISED, label, path)
    draw_gains(results, folder / f"{name}-gains.png")
    write_text(folder / f"{name}.md", page(results, name))


def named(plan: FedCMPPlan, part: str) -> str:
    """The sets of held-out pictures of a part of the plan."""
    jobs = [Job(part, plan.ours, "{}", *place) for place in plan.places(part)]
    return ", ".join(f"`{name}`" for name in dict.fromkeys(map(plan.heldout, jobs)))


def on_the_way_section(results: Results, name: str) -> str:
    if not on_the_way(results):
        return ""
    reference = results.plan.reference
    return f"""## On the way

![held-out loss over rounds]({name}-curves.png)

Measured in {", ".join(on_the_way(results))}. `rounds`: after how many {reference}'s final loss is
reached (the same seed). `rises`: by how much the held-out loss rose, added up over the rounds in
which it did, the mean over seeds: what oscillation costs. `drift`: how far clients are from their
mean update over how far they went (root mean squares; 0 alike, 1 cancelling), the mean over rounds
and seeds.

{dynamics_table(results)}
"""


def page(results: Results, name: str) -> str:
    plan = results.plan
    seeds = {scenario: results.seeds(scenario) for scenario in results.scenarios}
    settings = {len(plan.settings(title)) for title in results.methods}
    title = plan.document.get("title", "Fed-CMP and its baselines on the playground")
    about = plan.document.get("about", "")
    return f"""# {title}

Made from the {results.count} runs in `{name}.jsonl` (the plan: `../studies/{name}.yaml`),
each one of `fed.train`, whose flags stand in its line. One pass over the data, the projector alone
trains. Held-out pictures ({named(plan, "report")}), mean ± standard deviation over seeds
({"; ".join(f"{s}: {', '.join(map(str, k))}" for s, k in seeds.items())}).
{about}
Loss: caption loss in nats a token, lower is better. Exact: share of pictures whose whole caption is
the model's first choice, token by token; captions are names, but in the caption scenario, where a
picture has four right captions and only one counts.

### Loss

{loss_table(results)}
### Exact, %

{main_table(results, EXACT)}
{explained_section(results)}## {plan.ours} against {plan.reference}, pair by pair

The same scenario and seed make a pair; negative loss differences are in favour of {plan.ours}. p is
of a two-sided sign-flip test over all pairs.

{paired_table(results, plan.reference, measured(results), "scenario")}
{baseline_section(results)}![each method less {plan.reference}]({name}-gains.png)

{left_out_section(results)}{on_the_way_section(results, name)}## How settings were chosen

{"/".join(map(str, sorted(settings)))} settings a method, by the mean final loss on the development
part: pictures {named(plan, "development")}, scenarios
{", ".join(plan.scenarios("development"))}, seed {plan.seeds("development")[0]}. The chosen ones
are marked. The other scenarios, and the seeds and pictures above, had no part in it.

{tuned_table(results)}
{ablation_section(results)}"""


def explained_section(results: Results) -> str:
    """How many of the captions' nats the pictures save, where the plan measures it."""
    if EXPLAINED not in measured(results):
        return ""
    return f"""### Explained, %

The share of the captions' nats that their pictures save, beside other pictures in their place.

{main_table(results, EXPLAINED)}
"""


def baseline_section(results: Results) -> str:
    """Our method against the best baseline, where that is not the reference."""
    plan, best = results.plan, results.best_baseline(final_loss)
    if best == plan.reference:
        return ""
    return f"""## {plan.ours} against the best baseline, {best}

Best by the mean loss over scenarios, on these very runs: the comparison favours the baseline.

{paired_table(results, best, measured(results), "scenario")}
"""


def ablation_section(results: Results) -> str:
    plan = results.plan
    if not plan.variants:
        return ""
    ablated = plan.seeds("ablation")
    return f"""## Ablations of {plan.ours}

On the development part (pictures {named(plan, "ablation")}, seeds {ablated[0]} to {ablated[-1]}),
the learning rate as chosen above.

{ablation_table(results)}"""
