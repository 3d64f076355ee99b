"""What Pilot's study has found: a page of tables with a picture, from its finished runs.

    bash scripts/fed/pilot_study.sh --hours 0

Writes pilot.md and pilot.png beside the results.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from pilot_plan import PLAN, PilotPlan
from pilot_tables import (
    PilotFound,
    cost_table,
    domains_table,
    draw,
    overall_table,
    paired_table,
    tasks_table,
    tuning_table,
)
from study_plan import RESULTS, read_rows

from llava.atomic import write_text
from llava.errors import one_clear_error


def page(found: PilotFound, rows: Sequence[dict], name: str = "pilot") -> str:
    plan, ours = found.plan, found.plan.ours
    others = [title for title in found.methods if title != ours]
    seeds = "; ".join(f"{s}: {', '.join(map(str, found.seeds(s)))}" for s in found.scenarios)
    part = plan.document["report"]["part"]
    ablated = plan.document["ablation"]["scenarios"]
    text = f"""# Pilot and its baselines on the playground's tasks

Made by `bash scripts/fed/pilot_study.sh` from the {len(rows)} runs in
[{name}.jsonl]({name}.jsonl), each one of `fed.train`, whose flags stand in its line;
`scripts/fed/pilot_study.yaml` says what is run. {_tasks(found)} All begin with the same projector,
aligned on public pictures; LoRA and what each method has for a projector train. Held-out samples
(`{part}`), mean ± standard deviation over seeds ({seeds}).

Exact: the share of samples whose whole answer is the model's first choice, token by token. `own`:
the models of the clients of a task, asked that task; `others`: the models of all other clients;
`all`: both. Methods with one model for all have one number for the three.

## All tasks

The mean over tasks; loss in nats a token, of all.

{overall_table(found, found.methods, found.scenarios)}
![exact answers by method]({name}.png)

"""
    for scenario in found.scenarios:
        text += f"""## Scenario {scenario}, one by one

`own / others`; exact answers, %:

{domains_table(found, scenario, "exact", found.methods)}
Loss:

{domains_table(found, scenario, "loss", found.methods)}
"""
    text += f"""## {ours} less each other method

The same scenario and seed make a pair. p is of a two-sided sign-flip test over all pairs.

{paired_table(found, others)}
Exact answers of all models, %, task by task, and of how many seeds {ours} is ahead:

{tasks_table(found, others)}
## {ours} without its parts

With the setting that {ours} has chosen, in scenario {" and ".join(ablated)}.

{overall_table(found, [ours, *found.variants], ablated) if found.variants else "Not run yet."}
"""
    if found.variants:
        text += f"""{ours} less each of them:

{paired_table(found, found.variants)}
"""
    return (
        text
        + f"""## What an exchange costs

Thousands of numbers a client, as the runs have counted them; one
number where all exchanges are alike, else one for each. Where nothing is exchanged there is still a
state that the run keeps.

{cost_table(found, [*found.methods, *found.variants])}
## How settings were chosen

By the loss of each task's own clients on the development part, the mean over tasks (samples
`{plan.document["development"]["part"]}`, scenario {" and ".join(plan.scenarios("development"))},
seed {", ".join(map(str, plan.seeds("development")))}). The chosen ones are marked.

{tuning_table(found, rows)}"""
    )


def _tasks(found: PilotFound) -> str:
    said = []
    for scenario in found.scenarios:
        of_client = found.plan.tasks(scenario)
        tasks = dict.fromkeys(of_client.values())
        said.append(f"Scenario {scenario}: {len(of_client)} clients of {', '.join(tasks)}.")
    return " ".join(said)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--plan", type=Path, default=PLAN)
    parser.add_argument("--results", type=Path, default=RESULTS / "pilot.jsonl")
    args = parser.parse_args()
    with one_clear_error():
        rows = read_rows(args.results)
        found = PilotFound(PilotPlan(args.plan), rows)
        folder, name = args.results.parent, args.results.stem
        draw(found, folder / f"{name}.png")
        write_text(folder / f"{name}.md", page(found, rows, name))
        print(f"wrote {folder / name}.md from {len(rows)} runs")


if __name__ == "__main__":
    main()
