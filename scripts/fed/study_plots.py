"""The pictures of a study's page."""

from __future__ import annotations

import itertools
import statistics
from pathlib import Path

import numpy
from study_found import Found, final_loss

from fed.report import PALETTE, write_figure


def draw_curves(found: Found, path: Path) -> None:
    """Held-out loss over rounds, a panel a scenario: the mean over seeds, with the spread."""
    from matplotlib import pyplot

    shown = [*found.compared]
    columns = len(found.scenarios)
    figure, panels = pyplot.subplots(
        1, columns, figsize=(3.6 * columns + 1.6, 3.8), layout="constrained", squeeze=False
    )
    looks = itertools.product(("-", "--", ":"), PALETTE[1:])
    look = {t: ("-", PALETTE[0]) if t == found.plan.ours else next(looks) for t in shown}
    for axes, scenario in zip(panels[0], found.scenarios, strict=True):
        lowest, highest = float("inf"), 0.0
        for title in shown:
            line, colour = look[title]
            runs = [found.cells[title, scenario, seed] for seed in found.seeds(scenario)]
            losses = numpy.array([row["loss"] for row in runs])
            mean, deviation = losses.mean(0), losses.std(0)
            ours = title == found.plan.ours
            axes.plot(runs[0]["rounds"], mean, color=colour, ls=line, lw=2.6 if ours else 1.2,
                      label=title, zorder=3 if ours else 2)  # fmt: skip
            axes.fill_between(runs[0]["rounds"], mean - deviation, mean + deviation,
                              color=colour, alpha=0.12, lw=0)  # fmt: skip
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
