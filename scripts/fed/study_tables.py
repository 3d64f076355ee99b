"""The tables of a study's page."""

from __future__ import annotations

import json
import statistics
from collections.abc import Sequence

from study_found import Found, drift, final_exact, final_loss, rises
from study_plan import Job

from fed.report import markdown
from fed.significance import sign_flip_p, spread


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
