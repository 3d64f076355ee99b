"""What the merging study has found: a page of tables with a picture, from its measures.

    bash scripts/merge/study.sh --hours 0

Writes pivotmerge.md and pivotmerge.png beside the results.
"""

from __future__ import annotations

import argparse
import json
import statistics
from collections.abc import Sequence
from pathlib import Path

from merge_found import BEST, JOINT, Found, exact, loss, name_of
from merge_study import RESULTS, read_rows, settings
from study_experts import PLAN, cells, read_plan
from study_measure import CALIBRATION, Job

from fed.report import PALETTE, markdown, write_figure
from fed.significance import sign_flip_p, spread
from llava.atomic import write_text
from llava.errors import one_clear_error


def mark(found: Found, title: str) -> str:
    return f"{title} †" if title in found.plan["data_driven"] else title


def ordered(found: Found) -> list[str]:
    return sorted([*found.methods, BEST, JOINT], key=found.mean_relative)


def main_table(found: Found, of, digits: int) -> str:
    body = []
    for title in ordered(found):
        cells_ = [spread(found.values(title, name, of), digits) for name in found.names]
        body.append([mark(found, title), *cells_, f"{found.mean_relative(title):.3f}"])
    return markdown(["", *found.names, "loss / mean's"], body)


def kept_table(found: Found) -> str:
    body = []
    for title in ordered(found):
        by_name = [[found.kept(title, c) for c in found.seeds(n)] for n in found.names]
        means = [statistics.mean(values) for values in by_name]
        body.append(
            [mark(found, title), *(spread(v, 0) for v in by_name), f"{statistics.mean(means):.0f}"]
        )
    return markdown(["", *found.names, "mean"], body)


def paired_table(found: Found, against: str) -> str:
    """Ours less another method, pair by pair of the same experts."""
    body, everything = [], []
    for name in found.names:
        pairs = zip(found.values(found.plan["ours"], name, loss),
                    found.values(against, name, loss), strict=True)  # fmt: skip
        less = [a - b for a, b in pairs]
        everything += less
        body.append([name, spread(less, 4), f"{sum(v < 0 for v in less)} of {len(less)}"])
    won = (
        f"{sum(v < 0 for v in everything)} of {len(everything)}, p = {sign_flip_p(everything):.2g}"
    )
    return markdown(["", "loss", "better"], [*body, ["all", spread(everything, 4), won]])


def tuning_table(found: Found, rows: Sequence[dict]) -> str:
    of = {Job.of_row(row).key: row["loss"] for row in rows}
    places, body = list(cells(found.plan, "development")), []
    for title in found.methods:
        for setting in settings(found.plan, title):
            losses = [of[Job("development", cell, title, setting, 0).key] for cell in places]
            base = [of[Job("development", c, found.plan["reference"], "{}", 0).key] for c in places]
            ratio = statistics.mean(a / b for a, b in zip(losses, base, strict=True))
            shown = ", ".join(f"{k} {v}" for k, v in json.loads(setting).items()) or "–"
            chosen = " ←" if setting == found.chosen[title] else ""
            body.append([title, shown + chosen, *(f"{v:.3f}" for v in losses), f"{ratio:.3f}"])
    return markdown(["method", "setting", *map(name_of, places), "loss / mean's"], body)


def ablation_table(found: Found) -> str:
    ours, body = found.plan["ours"], []
    for title in [ours, *found.plan["ablation"]["variants"]]:
        row_of = found.row if title == ours else found.variant
        rows = {name: [row_of(title, cell) for cell in found.seeds(name)] for name in found.names}
        if any(row is None for of_name in rows.values() for row in of_name):
            continue
        shown = [spread([loss(row) for row in of_name], 3) for of_name in rows.values()]
        ratios = [
            loss(row) / loss(found.row(found.plan["reference"], cell))
            for name, of_name in rows.items()
            for row, cell in zip(of_name, found.seeds(name), strict=True)
        ]
        body.append([title, *shown, f"{statistics.mean(ratios):.3f}"])
    return markdown(["", *found.names, "loss / mean's"], body)


def counts_table(found: Found) -> str:
    """Loss on the domains of the experts that are merged, the plain mean over them."""
    of, body = found.plan["counts"], []
    places = found.seeds(of["cell"])
    for title in [*of["methods"], BEST]:
        shown = []
        for count in [*of["experts"], 0]:
            values = []
            for cell in places:
                experts = found.experts(cell, count)
                if not experts:
                    return "Not measured yet.\n"
                if title == BEST:
                    values.append(min(_over(row, experts) for row in experts.values()))
                else:
                    values.append(_over(found.row(title, cell, count), experts))
            shown.append(spread(values, 3))
        body.append([title, *shown])
    return markdown(["", *(f"{count or 'all 8'} experts" for count in [*of["experts"], 0])], body)


def _over(row: dict, experts) -> float:
    return statistics.mean(row["domains"][name]["loss"] for name in experts)


def draw(found: Found, path: Path) -> None:
    """Loss over the mean's, a panel a cell: a bar the mean over seeds, a dot a seed."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    order = [title for title in ordered(found) if title != BEST]
    size = (2.5 * len(found.names) + 1.8, 0.3 * len(order) + 1.2)
    figure, panels = pyplot.subplots(
        1, len(found.names), figsize=size, layout="constrained", sharey=True, squeeze=False
    )
    for axes, name in zip(panels[0], found.names, strict=True):
        for y, title in enumerate(order):
            values = found.relative(title, name)
            colour = PALETTE[0] if title == found.plan["ours"] else "0.6"
            axes.barh(y, statistics.mean(values) - 1, left=1, color=colour, alpha=0.6, height=0.7)
            axes.plot(values, [y] * len(values), "o", ms=2.5, color="0.25")
        axes.axvline(1, color="black", lw=0.8)
        axes.set_title(name, fontsize=10)
        axes.set_xlim(right=min(axes.get_xlim()[1], 1.5))
        axes.set_xlabel("loss / mean's")
        axes.grid(axis="x", alpha=0.25)
        axes.spines[["top", "right"]].set_visible(False)
    panels[0][0].set_yticks(range(len(order)), [mark(found, title) for title in order])
    panels[0][0].invert_yaxis()
    write_figure(figure, path)


def page(found: Found, rows: Sequence[dict], name: str) -> str:
    plan, best = found.plan, found.best_free()
    seeds = plan["report"]["seeds"]
    return f"""# Merging aligned projectors on the playground

Made by `bash scripts/merge/study.sh` from [{name}.jsonl]({name}.jsonl); `scripts/merge/study.yaml`
says what is run. Experts are aligned apart from one start, each on its own data; `fresh`: the start
is a projector as it is drawn, `brief`: after a brief alignment on a tenth of all pictures. topic: 8
experts, a topic each. style: 4, a vendor's drawings each. caption: 4, the same kinds of pictures
described in different ways. mixed: 4, half of the topics in half of the styles. Held-out pictures
(`{plan["report"]["part"]}`), {len(seeds)} seeds ({seeds[0]} to {
        seeds[-1]
    }: of the start and of the order
of the data), mean ± standard deviation. Settings were chosen on other pictures
(`{plan["development"]["part"]}`) and another seed ({
        plan["development"]["seeds"][0]
    }), without mixed.

Joint training: {
        plan["joint"]["epochs"]
    } epochs on all data from the same start, the upper reference. The
best single expert is picked by the very loss that is shown. † looks at data: {
        CALIBRATION
    } pairs of the
experts' own.

## Held-out loss (nats a token)

`loss / mean's`: over that of the plain mean of the same experts; the mean over cells.

{main_table(found, loss, 3)}
![loss over that of the mean]({name}.png)

## Exactly named pictures, %

{main_table(found, exact, 1)}
## What is kept of each expert

On each expert's own domain: the share of its exact captions that the merged model has, in percent,
the mean over experts.

{kept_table(found)}
## {plan["ours"]} against the mean

Loss differences on the same experts; negative is in favour of {
        plan["ours"]
    }. p: two-sided sign-flip
test over all pairs.

{paired_table(found, plan["reference"])}
## {plan["ours"]} against the best of the others that look at no data, {best}

Best by the loss above, on these very runs: the comparison favours it.

{paired_table(found, best)}
## More and fewer experts

{
        plan["counts"]["cell"]
    }: so many of the eight, drawn by seed; the loss is the mean over the domains of those.

{counts_table(found)}
## Ablations of {plan["ours"]}

The same experts and pictures as above, everything else as chosen.

{ablation_table(found)}
## How settings were chosen

By the mean over the development cells of the loss over the plain mean's; at most four settings a
method. The chosen ones are marked.

{tuning_table(found, rows)}"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--plan", type=Path, default=PLAN)
    parser.add_argument("--results", type=Path, default=RESULTS)
    args = parser.parse_args()
    with one_clear_error():
        rows = read_rows(args.results)
        found = Found(read_plan(args.plan), rows)
        folder, name = args.results.parent, args.results.stem
        draw(found, folder / f"{name}.png")
        write_text(folder / f"{name}.md", page(found, rows, name))
        print(f"wrote {folder / name}.md from {len(rows)} measures")


if __name__ == "__main__":
    main()
