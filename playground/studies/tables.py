"""Markdown tables of a study's results: means with their spread, and paired tests."""

from __future__ import annotations

import json
import statistics
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy

from fed.markdown import markdown_table
from playground.studies.plan import Job
from playground.studies.results import Measure, Results

Cell = Callable[[str], str]  # of a title


@dataclass(frozen=True)
class TableColumn:
    """A measure as tables show it."""

    name: str
    measure: Measure
    digits: int
    better: int = -1  # 1: more is better; -1: less is


def spread(values: Sequence[float], digits: int) -> str:
    """Mean ± standard deviation over the seeds."""
    deviation = statistics.stdev(values) if len(values) > 1 else 0.0
    return f"{statistics.mean(values):.{digits}f} ± {deviation:.{digits}f}"


def sign_flip_p(differences: Sequence[float]) -> float:
    """Two-sided p of a paired permutation test: how often random signs give as large a sum.

    All sign patterns for up to 17 pairs; beyond, the observed one and 199,999 drawn with seed 0.
    """
    from scipy.stats import permutation_test

    if len(differences) == 1:
        return 1.0  # the other sign gives as large a sum
    return float(
        permutation_test(
            (numpy.array(differences),),
            lambda values, axis: abs(values.sum(axis)),
            permutation_type="samples",
            alternative="greater",
            n_resamples=199_999,
            batch=10_000,
            vectorized=True,
            random_state=0,
        ).pvalue
    )


def wins(differences: Sequence[float], better: int) -> str:
    return f"{sum(better * value > 0 for value in differences)} of {len(differences)}"


def table(
    corner: str, titles: Iterable[str], columns: Sequence[tuple[str, Cell]], label: Cell = str
) -> str:
    """A line a title: its label, then the cell of each column."""
    body = [[label(title), *(cell(title) for _, cell in columns)] for title in titles]
    return markdown_table([corner, *(head for head, _ in columns)], body)


def spread_cell(results: Results, scenario: str, column: TableColumn) -> Cell:
    return lambda title: spread(results.values(title, scenario, column.measure), column.digits)


def mean_cell(
    results: Results, column: TableColumn, scenarios: Sequence[str] | None = None
) -> Cell:
    """The mean over scenarios, by default over all."""
    return lambda title: f"{results.mean(title, column.measure, scenarios):.{column.digits}f}"


def paired_table(
    results: Results, other: str, columns: Sequence[TableColumn], corner: str = ""
) -> str:
    """Our method less another one, scenario by scenario, and the sign-flip test over all pairs."""
    body = []
    for scenario in [*results.scenarios, None]:
        cells = [scenario or "all"]
        for column in columns:
            less = results.differences(results.plan.ours, other, column.measure, scenario)
            p = "" if scenario else f", p = {sign_flip_p(less):.2g}"
            cells += [spread(less, column.digits), wins(less, column.better) + p]
        body.append(cells)
    return markdown_table(
        [corner, *(w for column in columns for w in (column.name, "better"))], body
    )


def tuning_table(
    results: Results, heads: Sequence[str], cells: Callable[[Sequence[Mapping]], Sequence[str]]
) -> str:
    """Every setting of every method, the chosen ones marked.

    Args:
        cells: what a setting's rows on the development part come to, place by place.
    """
    plan, body = results.plan, []
    for title in results.methods:
        for setting in plan.settings(title):
            jobs = [Job("development", title, setting, *p) for p in plan.places("development")]
            shown = ", ".join(f"{k} {v}" for k, v in json.loads(setting).items()) or "–"
            mark = " ←" if setting == results.chosen[title] else ""
            body.append([title, shown + mark, *cells([results.by_job[job] for job in jobs])])
    return markdown_table(["method", "setting", *heads], body)
