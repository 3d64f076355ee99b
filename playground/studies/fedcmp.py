"""The study of Fed-CMP and its baselines: a projector trained on differing clients' pictures."""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Iterator, Mapping, Sequence

from playground.flags import flags
from playground.studies.plan import Job
from playground.studies.training import FederatedPlan

DATA = "playground/data/emoji"
LEFT_OUT = "left_out"  # the part of a plan, and of its jobs


class FedCMPPlan(FederatedPlan):
    """A plan, which may have the part `left_out`: our method without some of the clients.

    `base` is the section of playground/flags.yaml that all runs share, `pretrain` if not named.
    """

    def stages(self, chosen: Mapping[str, str]) -> list[Iterator[Job]]:
        reporting, ablating = super().stages(chosen)
        return [reporting, self.leaving_out(chosen), ablating]

    def leaving_out(self, chosen: Mapping[str, str]) -> Iterator[Job]:
        """Our method without the clients that the plan leaves out."""
        for place in self.places(LEFT_OUT) if LEFT_OUT in self.document else ():
            yield Job(LEFT_OUT, self.ours, chosen[self.ours], *place)

    def score(self, row: Mapping) -> float:
        return row["loss"][-1]

    def values(self, job: Job) -> dict:
        scenario, reported = self.data(job.scenario), job.part in ("report", LEFT_OUT)
        clients = scenario["clients"]
        if job.part == LEFT_OUT:
            clients = self.document[LEFT_OUT]["clients"]
        elif not reported:
            clients = scenario.get("development", clients)
        return {
            **flags(self.document.get("base", "pretrain")),
            "fed_clients": f"playground/fed/{clients}.yaml",
            "fed_rounds": scenario["rounds"],
            "fed_eval_data_path": f"{DATA}/{self.heldout(job)}.json",
            "fed_eval_domain": scenario.get("domain", "topic"),
            # Settings are chosen by the end alone.
            "fed_eval_every": 1 if reported else 1000,
            "seed": job.seed,
            **self.begun(),
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
