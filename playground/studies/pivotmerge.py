"""The study of PivotMerge: experts aligned apart from one start, merged by every method.

A scenario of the report is a scenario of the data and a start, as in `topic fresh`. A folder of the
plan's `work` is one start, one set of experts or one joint model.
"""

from __future__ import annotations

import itertools
import random
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from fed.clients.clients_yaml import load_clients
from playground import ROOT
from playground.flags import flags, words
from playground.studies.plan import Job, Plan, Task
from playground.studies.training import logged, whole_folder

PROJECTOR = "mm_projector.bin"
EMOJI = ROOT / "playground/data/emoji"
JOINT = "joint training"
BATCH = 12  # jobs of one place that a process measures one after another
CALIBRATION = 256  # pairs for a place; of the experts' own data so many together


class PivotMergePlan(Plan):
    ablation_part = "report"

    def __init__(self, document: Mapping[str, Any]):
        super().__init__(document)
        self.not_compared = document["data_driven"]

    def scenarios(self, part: str) -> list[str]:
        return self.document["report" if part == "ablation" else part]["cells"]

    def seeds(self, part: str) -> list[int]:
        return super().seeds("report" if part == "ablation" else part)

    def data(self, scenario: str) -> dict:
        return super().data(scenario.split()[0])

    def job_score(self, job: Job, measured: Mapping[Job, Mapping]) -> float | None:
        """The held-out loss over the reference's."""
        reference = Job(job.part, self.reference, "{}", job.scenario, job.seed)
        if not {job, reference} <= measured.keys():
            return None
        return measured[job]["loss"] / measured[reference]["loss"]

    def stages(self, chosen: Mapping[str, str]) -> list[Iterator[Job]]:
        return [self.reporting(chosen), self.counting(chosen), self.ablating(chosen)]

    def reporting(self, chosen: Mapping[str, str]) -> Iterator[Job]:
        """Every method as chosen, each expert, and joint training."""
        yield from super().reporting(chosen)
        for place in self.places("report"):
            experts = (f"expert {name}" for name in self.expert_files(*place))
            for title in [JOINT, *experts]:
                yield Job("report", title, "{}", *place)

    def counting(self, chosen: Mapping[str, str]) -> Iterator[Job]:
        """Some methods on fewer experts."""
        counts = self.document["counts"]
        for seed in self.seeds("report"):
            for number, title in itertools.product(counts["experts"], counts["methods"]):
                yield Job("report", title, chosen[title], counts["cell"], seed, number)

    def described(self, job: Job) -> dict:
        scenario, start = job.scenario.split()
        cell = {"scenario": scenario, "start": start, "seed": job.seed}
        values = asdict(job)
        return {
            "part": job.part,
            "cell": cell,
            **{k: values[k] for k in ("title", "setting", "experts")},
        }

    def job_of(self, row: Mapping) -> Job:
        values = dict(row["job"])
        cell = values.pop("cell")
        return Job(**values, scenario=f"{cell['scenario']} {cell['start']}", seed=cell["seed"])

    def batches(self, jobs: Sequence[Job]) -> Iterator[list[Job]]:
        by_place: dict[tuple[str, int], list[Job]] = {}
        for job in jobs:
            by_place.setdefault((job.scenario, job.seed), []).append(job)
        for of_place in by_place.values():
            for first in range(0, len(of_place), BATCH):
                yield of_place[first : first + BATCH]

    def measure(self, job: Job) -> dict:
        from playground.studies.pivotmerge_bench import measure

        return measure(self, job)

    def preparation(self) -> list[Task]:
        """Train every folder that is missing, each after the one it begins with."""
        needed: dict[str, dict] = {}
        for part in ("development", "report"):
            for place in self.places(part):
                needed |= self.runs(*place)
        return [
            Task(
                name,
                self.train,
                (name, values),
                self.work / values["from"] if "from" in values else None,
            )
            for name, values in needed.items()
            if not (self.work / name).exists()
        ]

    def runs(self, scenario: str, seed: int) -> dict[str, dict]:
        """What must be trained for a place, in order: folder → flags beside the common ones."""
        data, start = self.data(scenario), scenario.split()[1]
        begin, fresh = f"start-{start}-{seed}", f"start-fresh-{seed}"
        pooled, common = {"fed_method": "fedavg", "fed_pool": True}, {"seed": seed, "from": begin}
        runs: dict[str, dict] = {fresh: {"seed": seed}}
        if start == "brief":
            runs[begin] = {**pooled, **_flags(self.document["brief"]), "seed": seed, "from": fresh}
        runs[self.experts(scenario, seed)] = {"fed_method": "local", **_flags(data), **common}
        joint = {**self.document["joint"], "clients": data["joint"]}
        runs[self.joint(scenario, seed)] = {**pooled, **_flags(joint), **common}
        return runs

    def train(self, name: str, values: Mapping) -> None:
        """Make a folder of the study."""
        from fed.train import train
        from llava.state import save
        from playground.studies.pivotmerge_bench import drawn_projector

        with whole_folder(self.work / name) as folder:
            if "from" not in values:
                save(drawn_projector(values["seed"]), folder / PROJECTOR)
                return
            start = self.work / values["from"] / PROJECTOR
            argv = words(
                training_flags()
                | self.document["flags"]
                | {key: value for key, value in values.items() if key != "from"}
                | {"pretrain_mm_mlp_adapter": start, "fed_eval_every": 0, "output_dir": folder}
            )
            with logged(self.work, argv):
                train(argv)

    def files(self, job: Job, looks_at: str, experts: Sequence[str]) -> list[Path]:
        """The data that a job calibrates on, for each expert.

        `own`: what the experts were aligned on. `held out`: pictures of the part that settings are
        chosen on, which nobody was aligned on.
        """
        if looks_at == "own":
            clients = ROOT / f"playground/fed/{self.data(job.scenario)['clients']}.yaml"
            own = {spec.name: Path(spec.data_path).resolve() for spec in load_clients(clients, [])}
            return [own[name] for name in experts]
        pictures = self.document["development"]["part"]
        heldout = self.data(job.scenario)["heldout"].format(part=pictures)
        return [EMOJI / f"{heldout}.json"] * len(experts)

    def experts(self, scenario: str, seed: int) -> str:
        """The folder of the experts."""
        return f"{scenario.replace(' ', '-')}-{seed}"

    def joint(self, scenario: str, seed: int) -> str:
        """The folder of the joint model."""
        return f"joint-{self.data(scenario)['joint']}-{scenario.split()[1]}-{seed}"

    def start_file(self, scenario: str, seed: int) -> Path:
        return self.work / f"start-{scenario.split()[1]}-{seed}" / PROJECTOR

    def expert_files(self, scenario: str, seed: int, number: int = 0) -> dict[str, Path]:
        """The experts' projectors by the names of their clients: all, or so many, drawn by seed."""
        folder = self.work / self.experts(scenario, seed) / "clients"
        names = sorted(path.name for path in folder.iterdir())
        drawn = random.Random(f"experts {seed}").sample(names, number or len(names))
        return {name: folder / name / PROJECTOR for name in sorted(drawn)}


def training_flags() -> dict[str, Any]:
    """The flags of a playground run without held-out data."""
    values = flags("pretrain")
    del values["fed_eval_data_path"]
    return values


def _flags(source: Mapping) -> dict:
    return {
        "per_device_train_batch_size": source["batch"],
        "num_train_epochs": source["epochs"],
        "fed_clients": f"playground/fed/{source['clients']}.yaml",
    }
