"""What pilot_study.yaml asks for, and what is kept of a run: each task by who is asked.

Of a task's held-out samples, `own` are the models of the clients of that task, `others` those of
all other clients, `all` both; each is the mean over its models. Where all clients have one model
the three are the same.
"""

from __future__ import annotations

import os
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path

from study_plan import ROOT, Job, Plan

from fed.clients.clients_yaml import load_clients
from llava.errors import InputError

PLAN = ROOT / "scripts/fed/pilot_study.yaml"
WHOSE = ("own", "others", "all")


class PilotPlan(Plan):
    """pilot_study.yaml, as questions and answers."""

    def __init__(self, path: Path = PLAN):
        super().__init__(path)
        self.work = ROOT / self.document["work"]
        self.start = self.work / "start"  # a folder that gets its name when it is whole

    def score(self, row: Mapping) -> float:
        """The held-out loss of the models of each task's own clients, the mean over tasks."""
        return over_tasks(row, "own", "loss")

    def values(self, job: Job) -> dict:
        scenario = self.document["scenarios"][job.scenario]
        return {
            **self.document["flags"],
            "fed_clients": scenario["clients"],
            "fed_eval_data_path": f"{self.document['data']}/{self.heldout(job)}.json",
            "pretrain_mm_mlp_adapter": os.path.relpath(self.start / "mm_projector.bin", ROOT),
            "seed": job.seed,
        }

    def start_flags(self) -> list[str]:
        """The flags of llava.train that make the projector to start from."""
        return [
            w for name, value in self.document["start"].items() for w in (f"--{name}", str(value))
        ]

    def tasks(self, scenario: str) -> dict[str, str]:
        """The task of each client of a scenario."""
        file = ROOT / self.document["scenarios"][scenario]["clients"]
        found = {spec.name: spec.task for spec in load_clients(file, [])}
        if None in found.values():
            raise InputError(f"{file}: a study of tasks needs a `task` of every client")
        return found

    def variants(self) -> list[str]:
        return list(self.document["ablation"]["variants"])

    def _part(self, job: Job) -> str:
        return self.document[job.part]["part"]


def summary(job: Job, plan: PilotPlan, records: Sequence[dict]) -> dict:
    """A line of the results.

    `measures`: task → domain → own, others, all → exact and loss, and `samples` of the domain.
    `parameters`: by exchange the mean over clients of numbers trained, sent and received.
    """
    tasks, heldout = plan.tasks(job.scenario), plan.heldout(job)
    models = {name: sets[heldout]["domains"] for name, sets in records[-1]["heldout"].items()}
    if not models:
        raise InputError("the run has measured nothing after its last round")
    measures: dict[str, dict] = {}
    for domain, first in next(iter(models.values())).items():
        task = task_of(domain, set(tasks.values()))
        by_whose = {
            "own": [m[domain] for n, m in models.items() if tasks.get(n, task) == task],
            "others": [m[domain] for n, m in models.items() if tasks.get(n) != task],
            "all": [m[domain] for m in models.values()],
        }
        measures.setdefault(task, {})[domain] = {
            "samples": first["samples"],
            **{whose: _mean(found) for whose, found in by_whose.items()},
        }
    return {
        "job": vars(job),
        "measures": measures,
        "parameters": [_parameters(record) for record in records],
    }


def task_of(domain: str, tasks: set[str]) -> str:
    """Domains are called as their task, or begin with it: `vqa colour`."""
    task = domain.split(" ")[0]
    if task not in tasks:
        raise InputError(f"held-out domain {domain!r} is of none of the tasks {sorted(tasks)}")
    return task


def measure(row: Mapping, task: str, whose: str, what: str) -> float:
    """A run's `exact` or `loss` on a task: the mean over its domains, by samples."""
    domains = row["measures"][task].values()
    total = sum(domain["samples"] for domain in domains)
    return sum(domain["samples"] * domain[whose][what] for domain in domains) / total


def over_tasks(row: Mapping, whose: str, what: str) -> float:
    """The mean over tasks, which count alike."""
    return statistics.mean(measure(row, task, whose, what) for task in row["measures"])


def _mean(found: Sequence[Mapping]) -> dict[str, float]:
    return {what: round(statistics.mean(m[what] for m in found), 5) for what in ("exact", "loss")}


def _parameters(record: Mapping) -> dict[str, float] | None:
    found = [c["parameters"] for c in record["clients"].values() if "parameters" in c]
    if not found:
        return None
    return {name: round(statistics.mean(p[name] for p in found)) for name in found[0]}
