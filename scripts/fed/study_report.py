"""What a study has found: a page of tables with two pictures, from its finished runs.

    bash scripts/fed/study.sh --hours 0

Writes fedcmp.md, fedcmp-curves.png and fedcmp-gains.png beside the results.
"""

from __future__ import annotations

import argparse
import itertools
import json
import statistics
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy
from study_plan import PLAN, RESULTS, Job, Plan, read_rows

from fed.report import PALETTE, markdown, write_figure
from llava.atomic import write_text
from llava.errors import InputError, one_clear_error

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


def spread(values: Sequence[float], digits: int) -> str:
    """Mean ± standard deviation over the seeds."""
    deviation = statistics.stdev(values) if len(values) > 1 else 0.0
    return f"{statistics.mean(values):.{digits}f} ± {deviation:.{digits}f}"


def sign_flip_p(differences: Sequence[float]) -> float:
    """Two-sided p of a paired permutation test: how often random signs give as large a sum.

    All sign patterns for up to 16 pairs; beyond, 200,000 drawn with seed 0.
    """
    values = numpy.array(differences)
    if len(values) <= 16:
        signs = numpy.array(list(itertools.product((-1, 1), repeat=len(values))))
    else:
        signs = numpy.random.RandomState(0).choice((-1, 1), (200_000, len(values)))
        signs[0] = 1  # the pattern that was seen
    sums = numpy.abs(signs @ values)
    return float((sums >= abs(values.sum()) - 1e-12).mean())


def main_table(found: Found) -> str:
    head = ["method", *(f"{s}: {what}" for s in found.scenarios for what in ("loss", "exact %"))]
    head += ["mean loss", "mean exact %"]
    body = []
    for title in sorted(found.methods, key=lambda t: found.over_scenarios(t, final_loss)):
        cells = [title]
        for scenario in found.scenarios:
            cells.append(spread(found.values(title, scenario, final_loss), 3))
            cells.append(spread(found.values(title, scenario, final_exact), 1))
        cells.append(f"{found.over_scenarios(title, final_loss):.3f}")
        cells.append(f"{found.over_scenarios(title, final_exact):.1f}")
        body.append(cells)
    return markdown(head, body)


def paired_table(found: Found, against: str) -> str:
    """Our method less another one, pair by pair of the same scenario and seed."""
    ours, body = found.plan.ours, []
    everything = {"loss": [], "exact": []}
    for scenario in found.scenarios:
        cells = [scenario]
        for name, of, digits, sign in (("loss", final_loss, 3, -1), ("exact", final_exact, 1, 1)):
            pairs = zip(
                found.values(ours, scenario, of), found.values(against, scenario, of), strict=True
            )
            less = [a - b for a, b in pairs]
            everything[name] += less
            won = sum(sign * value > 0 for value in less)
            cells += [spread(less, digits), f"{won} of {len(less)}"]
        body.append(cells)
    cells = ["all"]
    for name, digits, sign in (("loss", 3, -1), ("exact", 1, 1)):
        less = everything[name]
        won = sum(sign * value > 0 for value in less)
        cells += [spread(less, digits), f"{won} of {len(less)}, p = {sign_flip_p(less):.2g}"]
    return markdown(["scenario", "loss", "better", "exact %", "better"], [*body, cells])


def dynamics_table(found: Found) -> str:
    head = ["method"]
    head += [f"{s}: {what}" for s in found.scenarios for what in ("rounds", "rises", "drift")]
    body = []
    for title in found.compared:
        cells = [title]
        for scenario in found.scenarios:
            cells.append(_rounds_to_reference(found, title, scenario))
            cells.append(f"{statistics.mean(found.values(title, scenario, rises)):.3f}")
            cells.append(f"{statistics.mean(found.values(title, scenario, drift)):.2f}")
        body.append(cells)
    return markdown(head, body)


def _rounds_to_reference(found: Found, title: str, scenario: str) -> str:
    """After how many rounds the reference's final loss is reached: mean, and how many never do."""
    needed = []
    for seed in found.seeds(scenario):
        goal = final_loss(found.cells[found.plan.reference, scenario, seed])
        row = found.cells[title, scenario, seed]
        reached = [r for r, loss in zip(row["rounds"], row["loss"], strict=True) if loss <= goal]
        needed.append(reached[0] if reached else None)
    there = [n for n in needed if n is not None]
    never = len(needed) - len(there)
    mean = f"{statistics.mean(there):.1f}" if there else ""
    return f"{mean} ({never} never)" if never and there else mean or "never"


def tuning_table(found: Found, rows: Sequence[dict]) -> str:
    loss = {Job(**row["job"]).key: row["loss"][-1] for row in rows}
    plan, body = found.plan, []
    scenarios, seeds = plan.scenarios("development"), plan.seeds("development")
    for title in found.methods:
        for setting in plan.settings(title):
            cells = [
                [loss[Job("development", title, setting, s, seed).key] for seed in seeds]
                for s in scenarios
            ]
            means = [statistics.mean(values) for values in cells]
            mark = " ←" if setting == found.chosen[title] else ""
            shown = ", ".join(f"{k} {v:g}" if isinstance(v, float | int) else f"{k} {v}"
                              for k, v in json.loads(setting).items())  # fmt: skip
            numbers = [f"{value:.3f}" for value in [*means, statistics.mean(means)]]
            body.append([title, shown + mark, *numbers])
    return markdown(["method", "setting", *scenarios, "mean"], body)


def ablation_table(found: Found, rows: Sequence[dict]) -> str:
    plan = found.plan
    of = {}
    for row in rows:
        job = Job(**row["job"])
        if job.part == "ablation":
            of.setdefault(job.key, row)
    wanted = plan.document["ablation"]
    body = []
    for title, options in wanted["variants"].items():
        setting = json.dumps({**json.loads(found.chosen[plan.ours]), **options})
        cells, losses = [title], []
        for scenario in wanted["scenarios"]:
            jobs = [Job("ablation", title, setting, scenario, seed) for seed in wanted["seeds"]]
            there = [of[job.key] for job in jobs if job.key in of]
            if there:
                cells.append(spread([final_loss(row) for row in there], 3))
                cells.append(spread([final_exact(row) for row in there], 1))
                losses.append(statistics.mean(final_loss(row) for row in there))
                seeds = len(there)
        if len(losses) == len(wanted["scenarios"]):
            body.append([*cells, f"{statistics.mean(losses):.3f}", str(seeds)])
    head = [
        "variant",
        *(f"{s}: {what}" for s in wanted["scenarios"] for what in ("loss", "exact %")),
    ]
    return markdown([*head, "mean loss", "seeds"], body) if body else "Not run yet.\n"


def draw_curves(found: Found, path: Path) -> None:
    """Held-out loss over rounds, a panel a scenario: the mean over seeds, with the spread."""
    from matplotlib import pyplot

    shown = [*found.compared]
    columns = len(found.scenarios)
    figure, panels = pyplot.subplots(
        1, columns, figsize=(3.6 * columns + 1.6, 3.8), layout="constrained", squeeze=False
    )
    colours = itertools.cycle(PALETTE[1:])
    colour = {t: PALETTE[0] if t == found.plan.ours else next(colours) for t in shown}
    for axes, scenario in zip(panels[0], found.scenarios, strict=True):
        lowest, highest = float("inf"), 0.0
        for i, title in enumerate(shown):
            runs = [found.cells[title, scenario, seed] for seed in found.seeds(scenario)]
            losses = numpy.array([row["loss"] for row in runs])
            mean, deviation = losses.mean(0), losses.std(0)
            ours = title == found.plan.ours
            axes.plot(runs[0]["rounds"], mean, color=colour[title], lw=2.6 if ours else 1.2,
                      ls="-" if ours else ("-", "--", ":")[i // len(PALETTE)],
                      label=title, zorder=3 if ours else 2)  # fmt: skip
            axes.fill_between(runs[0]["rounds"], mean - deviation, mean + deviation,
                              color=colour[title], alpha=0.12, lw=0)  # fmt: skip
            lowest, highest = min(lowest, mean.min()), max(highest, float(numpy.median(mean)))
        if "centralised" in found.methods:
            level = statistics.mean(found.values("centralised", scenario, final_loss))
            axes.axhline(level, color="0.4", lw=1, ls=(0, (1, 2)), label="centralised")
            lowest = min(lowest, level)
        margin = 0.1 * (highest - lowest)
        axes.set(xlabel="round", title=scenario, ylim=(lowest - margin, highest + 4 * margin))
        axes.xaxis.get_major_locator().set_params(integer=True)
        axes.grid(alpha=0.25)
        axes.spines[["top", "right"]].set_visible(False)
    panels[0][0].set_ylabel("held-out caption loss (nats a token)")
    figure.legend(*panels[0][0].get_legend_handles_labels(), loc="outside right", frameon=False)
    write_figure(figure, path)


def draw_gains(found: Found, path: Path) -> None:
    """Each method's final loss less the reference's, a dot a seed, a bar the mean."""
    from matplotlib import pyplot

    order = sorted(found.compared, key=lambda t: found.over_scenarios(t, final_loss))
    order = [title for title in order if title != found.plan.reference]
    columns = len(found.scenarios)
    size = (2.9 * columns + 1.4, 0.36 * len(order) + 1.4)
    figure, panels = pyplot.subplots(
        1, columns, figsize=size, layout="constrained", sharey=True, squeeze=False
    )
    for axes, scenario in zip(panels[0], found.scenarios, strict=True):
        base = found.values(found.plan.reference, scenario, final_loss)
        for y, title in enumerate(order):
            own = found.values(title, scenario, final_loss)
            less = [a - b for a, b in zip(own, base, strict=True)]
            colour = PALETTE[0] if title == found.plan.ours else "0.6"
            axes.barh(y, statistics.mean(less), color=colour, alpha=0.55, height=0.7)
            axes.plot(less, [y] * len(less), "o", ms=3, color=colour if colour[0] == "#" else "0.3")
        axes.axvline(0, color="black", lw=0.8)
        axes.set_title(scenario)
        axes.set_xlabel(f"loss less {found.plan.reference}'s")
        axes.grid(axis="x", alpha=0.25)
        axes.spines[["top", "right"]].set_visible(False)
    panels[0][0].set_yticks(range(len(order)), order)
    panels[0][0].invert_yaxis()
    write_figure(figure, path)


def page(found: Found, rows: Sequence[dict], name: str = "fedcmp") -> str:
    plan, best = found.plan, found.best_baseline()
    seeds = {scenario: found.seeds(scenario) for scenario in found.scenarios}
    settings = {len(plan.settings(title)) for title in found.methods}
    development = [row for row in rows if row["job"]["part"] == "development"]
    return f"""# Fed-CMP and its baselines on the playground

Made by `bash scripts/fed/study.sh` from the {len(rows)} runs in `{name}.jsonl`, each one of
`fed.train`, whose flags stand in its line. One pass over the data, the projector alone trains.
Held-out pictures (`heldout_test`), mean ± standard deviation over seeds
({", ".join(f"{s}: {', '.join(map(str, of))}" for s, of in seeds.items())}). Loss: caption loss in
nats a token, lower is better. Exact: share of pictures whose whole name is the model's first
choice, token by token; in the caption scenario of those captions that are names.

{main_table(found)}
![held-out loss over rounds]({name}-curves.png)

## {plan.ours} against {plan.reference}, pair by pair

The same scenario and seed make a pair; negative loss differences are in favour of {plan.ours}. p is
of a two-sided sign-flip test over all pairs.

{paired_table(found, plan.reference)}
## {plan.ours} against the best baseline, {best}

Best by the mean loss over scenarios, on these very runs: the comparison favours the baseline.

{paired_table(found, best)}
![each method less FedAvg]({name}-gains.png)

## On the way

`rounds`: after how many {plan.reference}'s final loss is reached (the same seed). `rises`: by how
much the held-out loss rose, added up over the rounds in which it did, the mean over seeds: what
oscillation costs. `drift`: how far clients are from their mean update over how far they went (root
mean squares; 0 alike, 1 cancelling), the mean over rounds and seeds.

{dynamics_table(found)}
## How settings were chosen

{"/".join(map(str, sorted(settings)))} settings a method ({len(development)} runs), by the mean
final loss on the development part: pictures `heldout_dev`, scenarios
{" and ".join(plan.scenarios("development"))}, seed {plan.seeds("development")[0]}. The scenarios
{" and ".join(s for s in found.scenarios if s not in plan.scenarios("development"))} and the seeds
and pictures above had no part in it. The chosen ones are marked.

{tuning_table(found, rows)}
## Ablations of {plan.ours}

On the development part (pictures `heldout_dev`, seeds {plan.document["ablation"]["seeds"]}), the
learning rate as chosen above.

{ablation_table(found, rows)}"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--plan", type=Path, default=PLAN)
    parser.add_argument("--results", type=Path, default=RESULTS / "fedcmp.jsonl")
    args = parser.parse_args()
    with one_clear_error():
        rows = read_rows(args.results)
        found = Found(Plan(args.plan), rows)
        folder, name = args.results.parent, args.results.stem
        import matplotlib

        matplotlib.use("Agg")
        draw_curves(found, folder / f"{name}-curves.png")
        draw_gains(found, folder / f"{name}-gains.png")
        write_text(folder / f"{name}.md", page(found, rows, name))
        print(f"wrote {folder / name}.md from {len(rows)} runs")


if __name__ == "__main__":
    main()
