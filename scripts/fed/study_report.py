"""What a study has found: a page of tables with two pictures, from its finished runs.

    bash scripts/fed/study.sh --hours 0

Writes fedcmp.md, fedcmp-curves.png and fedcmp-gains.png beside the results.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from study_found import Found
from study_plan import PLAN, RESULTS, Plan, read_rows
from study_plots import draw_curves, draw_gains
from study_tables import ablation_table, dynamics_table, main_table, paired_table, tuning_table

from llava.atomic import write_text
from llava.errors import one_clear_error


def page(found: Found, rows: Sequence[dict], name: str = "fedcmp") -> str:
    plan, best = found.plan, found.best_baseline()
    seeds = {scenario: found.seeds(scenario) for scenario in found.scenarios}
    settings = {len(plan.settings(title)) for title in found.methods}
    wanted = plan.document["ablation"]["seeds"]
    return f"""# Fed-CMP and its baselines on the playground

Made by `bash scripts/fed/study.sh` from the {len(rows)} runs in `{name}.jsonl`, each one of
`fed.train`, whose flags stand in its line. One pass over the data, the projector alone trains.
Held-out pictures (`heldout_test`), mean ± standard deviation over seeds
({"; ".join(f"{s}: {', '.join(map(str, of))}" for s, of in seeds.items())}).

Loss: caption loss in nats a token, lower is better. Exact: share of pictures whose whole caption is
the model's first choice, token by token; captions are names, but in the caption scenario, where a
picture has four right captions and only one counts.

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

{"/".join(map(str, sorted(settings)))} settings a method, by the mean final loss on the development
part: pictures `heldout_dev`, scenarios {" and ".join(plan.scenarios("development"))}, seed
{plan.seeds("development")[0]}. The chosen ones are marked. The other scenarios, and the seeds and
pictures above, had no part in it.

{tuning_table(found, rows)}
## Ablations of {plan.ours}

On the development part (pictures `heldout_dev`, seeds {wanted[0]} to {wanted[-1]}), the learning
rate as chosen above.

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
