"""The study of Pilot and its baselines: clients of different tasks tune one LLaVA.

Of a task's held-out samples, `own` are the models of the clients of that task, `others` those of
all other clients, `all` both; each is the mean over its models. Where all clients have one model
the three are the same.
"""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence

from fed.clients.clients_yaml import load_clients
from llava.errors import InputError
from playground import ROOT
from playground.flags import flags
from playground.studies.plan import Job
from playground.studies.training import FederatedPlan

WHOSE = ("own", "others", "all")


class PilotPlan(FederatedPlan):
    def score(self, row: Mapping) -> float:
        """The held-out loss of the models of each task's own clients, the mean over tasks."""
        return over_tasks(row, "own", "loss")

    def values(self, job: Job) -> dict:
        return {
            **flags("pilot"),
            **self.document["flags"],
            "fed_clients": self.data(job.scenario)["clients"],
            "fed_eval_data_path": f"{self.document['data']}/{self.heldout(job)}.json",
            **self.begun(),
            "seed": job.seed,
        }

    def tasks(self, scenario: str) -> dict[str, str]:
        """The task of each client of a scenario."""
        file = ROOT / self.data(scenario)["clients"]
        tasks = {spec.name: spec.task for spec in load_clients(file, [])}
        if None in tasks.values():
            raise InputError(f"{file}: a study of tasks needs a `task` of every client")
        return tasks

    def summary(self, job: Job, records: Sequence[dict]) -> dict:
        """Measures after the last round, and what each exchange costs.

        `measures`: task → domain → own, others, all → exact and loss, and `samples` of the domain.
        `parameters`: by exchange the mean over clients of numbers trained, sent and received.
        """
        tasks, heldout = self.tasks(job.scenario), self.heldout(job)
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
            means = {whose: _mean(sets) for whose, sets in by_whose.items()}
            measures.setdefault(task, {})[domain] = {"samples": first["samples"], **means}
        return {"measures": measures, "parameters": [_parameters(record) for record in records]}


def task_of(domain: str, tasks: set[str]) -> str:
    """The task of a domain, which is called as its task, or begins with it: `vqa colour`."""
    task = domain.split(" ")[0]
    if task not in tasks:
        raise InputError(f"held-out domain {domain!r} is of none of the tasks {sorted(tasks)}")
    return task


def measure(row: Mapping, task: str, whose: str, name: str) -> float:
    """A run's `exact` or `loss` on a task: the mean over its domains, by samples."""
    domains = row["measures"][task].values()
    total = sum(domain["samples"] for domain in domains)
    return sum(domain["samples"] * domain[whose][name] for domain in domains) / total


def over_tasks(row: Mapping, whose: str, name: str) -> float:
    """The mean over tasks, which count alike."""
    return statistics.mean(measure(row, task, whose, name) for task in row["measures"])


def _mean(sets: Sequence[Mapping]) -> dict[str, float]:
    """Of what was measured; `explained` is of a plan with the flag fed_eval_explained."""
    names = [name for name in ("exact", "loss", "explained") if any(name in m for m in sets)]
    return {name: round(statistics.mean(m[name] for m in sets), 5) for name in names}


def _parameters(record: Mapping) -> dict[str, float] | None:
    counts = [c["parameters"] for c in record["clients"].values() if "parameters" in c]
    if not counts:
        return None
    return {name: round(statistics.mean(c[name] for c in counts)) for name in counts[0]}
