"""Pictures of a study's results, a panel a scenario."""

from __future__ import annotations

import itertools
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy

from fed.report import PALETTE, write_figure
from playground.studies.results import Measure, Results

GREY = "0.6"


@dataclass(frozen=True)
class Bars:
    """A bar a title.

    Args:
        values: of a title and scenario, a number a seed.
        shift: from the title's line, downwards.
    """

    values: Callable[[str, str], Sequence[float]]
    colour: Callable[[str], str]
    label: str | None = None
    shift: float = 0
    height: float = 0.7


def panels(
    scenarios: Sequence[str], size: tuple[float, float], sharey: bool, columns: int = 4
) -> tuple[Any, Sequence[Any]]:
    """A figure and its axes, one for each scenario, in rows of at most `columns`.

    Args:
        size: of a panel, in inches.
    """
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    width = min(columns, len(scenarios))
    height = -(-len(scenarios) // width)
    figure, grid = pyplot.subplots(
        height, width, figsize=(size[0] * width + 1.4, size[1] * height),
        layout="constrained", sharey=sharey, squeeze=False,
    )  # fmt: skip
    axes = grid.flatten()
    for panel in axes[len(scenarios) :]:
        panel.set_axis_off()
    for panel in axes[: len(scenarios)]:
        panel.spines[["top", "right"]].set_visible(False)
    return figure, axes[: len(scenarios)]


def draw_bars(
    figure: Any,
    axes: Sequence[Any],
    results: Results,
    titles: Sequence[str],
    bars: Sequence[Bars],
    xlabel: str,
    origin: float | None = None,
    label: Callable[[str], str] = str,
) -> None:
    """Bars of the mean over seeds, which start at `origin`, with a dot a seed."""
    for panel, scenario in zip(axes, results.scenarios, strict=True):
        for kind, (y, title) in itertools.product(bars, enumerate(titles)):
            values, start = kind.values(title, scenario), origin or 0
            panel.barh(y + kind.shift, statistics.mean(values) - start, left=start, alpha=0.6,
                       color=kind.colour(title), height=kind.height,
                       label=None if y else kind.label)  # fmt: skip
            panel.plot(values, [y + kind.shift] * len(values), "o", ms=2.5, color="0.25")
        if origin is not None:
            panel.axvline(origin, color="black", lw=0.8)
        panel.set_title(scenario, fontsize=10)
        panel.set_xlabel(xlabel)
        panel.grid(axis="x", alpha=0.25)
    axes[0].set_yticks(range(len(titles)), map(label, titles))
    axes[0].invert_yaxis()


def cut_longest(axes: Sequence[Any], means: Sequence[Sequence[float]]) -> None:
    """End each panel where the longest bar but one is whole; the longest says how far it goes.

    Args:
        means: of each panel, how far each bar goes from the origin 0, in the bars' order.
    """
    for panel, values in zip(axes, means, strict=True):
        *rest, longest = sorted(values)
        end = 1.6 * max(abs(value) for value in rest) if rest else longest
        if longest > end:
            panel.set_xlim(right=end)
            panel.text(end, values.index(longest), f"{longest:.2f} → ", ha="right", va="center",
                       fontsize=8)  # fmt: skip


def draw_curves(
    results: Results,
    scenarios: Sequence[str],
    loss: Measure,
    level: str,
    ylabel: str,
    path: Path,
) -> None:
    """The loss over rounds: the mean over seeds, with the spread.

    Args:
        loss: of a row's end.
        level: a method of which only the end is shown, a dotted line.
    """
    ours = results.plan.ours
    figure, axes = panels(scenarios, (3.6, 3.8), sharey=False)
    styles = itertools.product(("-", "--", ":"), PALETTE[1:])
    style = {t: ("-", PALETTE[0]) if t == ours else next(styles) for t in results.compared}
    for panel, scenario in zip(axes, scenarios, strict=True):
        lowest, middles = float("inf"), []
        for title, (line, colour) in style.items():
            rows = [results.row(title, scenario, seed) for seed in results.seeds(scenario)]
            rounds, losses = rows[0]["rounds"], numpy.array([row["loss"] for row in rows])
            mean, deviation = losses.mean(0), losses.std(0)
            panel.plot(rounds, mean, color=colour, ls=line, lw=2.6 if title == ours else 1.2,
                       label=title, zorder=3 if title == ours else 2)  # fmt: skip
            panel.fill_between(rounds, mean - deviation, mean + deviation, color=colour,
                               alpha=0.12, lw=0)  # fmt: skip
            lowest = min(lowest, mean.min())
            middles.append(float(numpy.median(mean)))
        if level in results.methods:
            end = statistics.mean(results.values(level, scenario, loss))
            panel.axhline(end, color="0.4", lw=1, ls=(0, (1, 2)), label=level)
            lowest = min(lowest, end)
        highest = sorted(middles)[-2:][
            0
        ]  # the worst is let out, so that the rest can be told apart
        margin = 0.1 * (highest - lowest)
        panel.set(xlabel="round", title=scenario, ylim=(lowest - margin, highest + 4 * margin))
        panel.xaxis.get_major_locator().set_params(integer=True)
        panel.grid(alpha=0.25)
    axes[0].set_ylabel(ylabel)
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside right", frameon=False)
    write_figure(figure, path)
