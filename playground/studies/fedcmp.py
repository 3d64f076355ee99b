"""The study of Fed-CMP and its baselines: a projector trained on differing clients' pictures."""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Mapping, Sequence

from playground.flags import flags
from playground.studies.plan import Job
from playground.studies.training import FederatedPlan

DATA = "playground/data/emoji"


class FedCMPPlan(FederatedPlan):
    def score(self, row: Mapping) -> float:
        return row["loss"][-1]

    def values(self, job: Job) -> dict:
        scenario = self.data(job.scenario)
        clients = scenario["clients"]
        if job.part != "report" and clients == "skew":
            clients = "skew-dev"
        return {
            **flags("pretrain"),
            "fed_clients": f"playground/fed/{clients}.yaml",
            "fed_rounds": scenario["rounds"],
            "fed_eval_data_path": f"{DATA}/{self.heldout(job)}.json",
            "fed_eval_domain": scenario.get("domain", "topic"),
            # Settings are chosen by the end alone.
            "fed_eval_every": 1 if job.part == "report" else 1000,
            "seed": job.seed,
            **self.document["flags"],
            **scenario.get("flags", {}),
        }

    def summary(self, job: Job, records: Sequence[dict]) -> dict:
        """By measured round the held-out loss and the share of exact captions.

        So is the explained share of a plan with the flag fed_eval_explained. Where clients keep
        models of their own, the mean over clients.
        """
        name = self.heldout(job)
        measured = [record for record in records if record["heldout"]]
        models = [[sets[name] for sets in record["heldout"].values()] for record in measured]
        keys = ["loss", "exact"]
        keys += ["explained"] if any("explained" in m for last in models[-1:] for m in last) else []
        return {
            "rounds": [record["round"] for record in measured],
            **{key: [_mean(m[key] for m in of_round) for of_round in models]
               for key in keys},
            "drift": [record["drift"] for record in records],
        }  # fmt: skip


def _mean(values: Iterable[float]) -> float:
    return round(statistics.mean(values), 5)
