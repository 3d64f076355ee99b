"""What the merging study's rows amount to: measures by cell and seed, of methods and experts."""

from __future__ import annotations

import json
import statistics
from collections.abc import Callable, Mapping, Sequence

from merge_study import choose
from study_experts import Cell, cells
from study_measure import Job

from llava.errors import InputError

BEST, JOINT = "best single expert", "joint training"


def loss(row: Mapping) -> float:
    return row["loss"]


def exact(row: Mapping) -> float:
    return 100 * row["exact"]


class Found:
    """The rows of the part `report`, for the cells that are measured for every method."""

    def __init__(self, plan: Mapping, rows: Sequence[dict]):
        self.plan, self.chosen = plan, choose(plan, rows)
        self.rows = {Job.of_row(row).key: row for row in rows}
        self.methods = list(self.chosen)
        self.cells = [cell for cell in cells(plan, "report") if self._whole(cell)]
        self.names = list(dict.fromkeys(name_of(cell) for cell in self.cells))
        if not self.cells:
            raise InputError("no cell of the report is measured for every method")

    def _whole(self, cell: Cell) -> bool:
        return all(self.row(title, cell) for title in [*self.methods, JOINT]) and bool(
            self.experts(cell)
        )

    def row(self, title: str, cell: Cell, count: int = 0) -> dict | None:
        """The row of a method as chosen, of an expert, the best expert or joint training."""
        if title == BEST:
            return min(self.experts(cell, count).values(), key=loss)
        setting = self.chosen.get(title, "{}")
        return self.rows.get(Job("report", cell, title, setting, count).key)

    def variant(self, title: str, cell: Cell) -> dict | None:
        options = self.plan["ablation"]["variants"][title]
        setting = {**json.loads(self.chosen[self.plan["ours"]]), **options}
        return self.rows.get(Job("report", cell, title, json.dumps(setting), 0).key)

    def experts(self, cell: Cell, count: int = 0) -> dict[str, dict]:
        """The experts' own rows, of those that a merge of `count` has."""
        found = {}
        reference = self.row(self.plan["reference"], cell, count)
        for name in reference["of"] if reference else ():
            row = self.rows.get(Job("report", cell, f"expert {name}", "{}", 0).key)
            if row is None:
                return {}
            found[name] = row
        return found

    def seeds(self, name: str) -> list[Cell]:
        return [cell for cell in self.cells if name_of(cell) == name]

    def values(self, title: str, name: str, of: Callable[[Mapping], float]) -> list[float]:
        return [of(self.row(title, cell)) for cell in self.seeds(name)]

    def relative(self, title: str, name: str) -> list[float]:
        """Loss over that of the reference, seed by seed."""
        own, other = (self.values(t, name, loss) for t in (title, self.plan["reference"]))
        return [a / b for a, b in zip(own, other, strict=True)]

    def mean_relative(self, title: str) -> float:
        return statistics.mean(statistics.mean(self.relative(title, n)) for n in self.names)

    def best_free(self) -> str:
        """The best method but ours among those that look at no data."""
        others = set(self.methods) - {self.plan["ours"], *self.plan["data_driven"]}
        return min(sorted(others), key=self.mean_relative)

    def kept(self, title: str, cell: Cell) -> float:
        """Mean over domains: the share of the domain's own expert's exact captions, in percent."""
        merged, experts = self.row(title, cell)["domains"], self.experts(cell)
        shares = []
        for name, own in experts.items():
            if own["domains"][name]["exact"]:
                shares.append(merged[name]["exact"] / own["domains"][name]["exact"])
        return 100 * statistics.mean(shares)


def name_of(cell: Cell) -> str:
    return f"{cell.scenario} {cell.start}"
