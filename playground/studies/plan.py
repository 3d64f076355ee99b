"""The plan of a study, as its YAML file states it, and the jobs it is cut into."""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from llava.errors import InputError
from playground import ROOT


@dataclass(frozen=True)
class Job:
    """One measurement."""

    part: str
    title: str  # of a method or variant
    setting: str  # JSON: options of the method and flags
    scenario: str
    seed: int
    experts: int = 0  # how many are merged, where merging is measured; 0: all

    def __str__(self) -> str:
        return f"{self.part} {self.title} {self.setting} {self.scenario} seed {self.seed}"


@dataclass(frozen=True)
class Task:
    """A call that one process makes, begun once the path `needs` exists."""

    name: str
    call: Callable[..., None]
    arguments: tuple
    needs: Path | None = None

    @property
    def ready(self) -> bool:
        return self.needs is None or self.needs.exists()


KEYS = ("work", "scenarios", "development", "report", "ablation", "methods", "ours", "reference")


def check_document(document: Any, path: Path) -> None:
    """Refuse a document that a plan cannot be cut from; `path` is named in the sentence."""
    if not isinstance(document, dict):
        raise InputError(f"{path}: a mapping is expected, not {type(document).__name__}")
    missing = [key for key in KEYS if key not in document]
    if missing:
        raise InputError(f"{path}: {missing[0]} is missing; a plan has {', '.join(KEYS)}")
    for title, method in document["methods"].items():
        if not (isinstance(method, dict) and method.get("settings")):
            raise InputError(f"{path}: method {title!r} has no settings, of which one is chosen")
    named = (document["ours"], document["reference"])
    unknown = [title for title in named if title not in document["methods"]]
    if unknown:
        raise InputError(f"{path}: {unknown[0]!r} is none of the methods")


class Plan:
    """A plan's document, as questions and answers; subclasses measure jobs."""

    ablation_part = "ablation"  # the part that jobs of variants belong to

    def __init__(self, document: Mapping[str, Any]):
        self.document = document
        self.methods: Mapping[str, dict] = document["methods"]
        self.variants: Mapping[str, dict] = document["ablation"]["variants"]
        self.ours, self.reference = document["ours"], document["reference"]
        self.not_compared: Sequence[str] = document.get("not_compared", [])
        self.work = ROOT / document["work"]

    def scenarios(self, part: str) -> list[str]:
        return self.document[part]["scenarios"]

    def seeds(self, part: str) -> list[int]:
        return self.document[part]["seeds"]

    def places(self, part: str) -> list[tuple[str, int]]:
        """Pairs of scenario and seed, seed by seed."""
        return [(scenario, seed) for seed in self.seeds(part) for scenario in self.scenarios(part)]

    def data(self, scenario: str) -> dict:
        """A scenario's entry under `scenarios`."""
        return self.document["scenarios"][scenario]

    def settings(self, title: str) -> list[str]:
        return [json.dumps(setting) for setting in self.methods[title]["settings"]]

    def variant(self, title: str, chosen: Mapping[str, str]) -> str:
        """The setting of a variant: our chosen one with the variant's options."""
        return json.dumps({**json.loads(chosen[self.ours]), **self.variants[title]})

    def heldout(self, job: Job) -> str:
        """The name of the evaluation set."""
        pictures = self.document[job.part].get("part", self.document["development"]["part"])
        return self.data(job.scenario)["heldout"].format(part=pictures)

    def tuning(self) -> Iterator[Job]:
        """Every setting of every method, on the development part."""
        for title in self.methods:
            for setting, place in itertools.product(
                self.settings(title), self.places("development")
            ):
                yield Job("development", title, setting, *place)

    def reporting(self, chosen: Mapping[str, str]) -> Iterator[Job]:
        """Every method with its chosen setting, on the part `report`."""
        for place, (title, setting) in itertools.product(self.places("report"), chosen.items()):
            yield Job("report", title, setting, *place)

    def ablating(self, chosen: Mapping[str, str]) -> Iterator[Job]:
        """Our method with other options, everything else as chosen."""
        for place, title in itertools.product(self.places("ablation"), self.variants):
            yield Job(self.ablation_part, title, self.variant(title, chosen), *place)

    def stages(self, chosen: Mapping[str, str]) -> list[Iterator[Job]]:
        """What follows tuning, in order."""
        return [self.reporting(chosen), self.ablating(chosen)]

    def chosen(self, rows: Sequence[Mapping]) -> dict[str, str]:
        """The setting of least mean score on the development part, of each method tuned through."""
        measured, places = self.by_job(rows), self.places("development")
        best = {}
        for title in self.methods:
            means = {}
            for setting in self.settings(title):
                jobs = [Job("development", title, setting, *place) for place in places]
                scores = [self.job_score(job, measured) for job in jobs]
                if None not in scores:
                    means[setting] = sum(scores) / len(scores)
            if len(means) == len(self.settings(title)):
                best[title] = min(means, key=means.get)
        return best

    def job_score(self, job: Job, measured: Mapping[Job, Mapping]) -> float | None:
        """The number that a setting is chosen by, less is better; None if it is not measured."""
        return self.score(measured[job]) if job in measured else None

    def score(self, row: Mapping) -> float:
        raise NotImplementedError

    def described(self, job: Job) -> dict:
        """A job as its row has it."""
        return {name: value for name, value in asdict(job).items() if name != "experts"}

    def job_of(self, row: Mapping) -> Job:
        return Job(**row["job"])

    def by_job(self, rows: Sequence[Mapping]) -> dict[Job, Mapping]:
        try:
            return {self.job_of(row): row for row in rows}
        except (KeyError, TypeError) as error:
            raise InputError(
                f"the results are not of a study {self.document['study']!r}: {error}"
            ) from None

    def batches(self, jobs: Sequence[Job]) -> Iterator[list[Job]]:
        """Jobs that one process runs one after another."""
        for job in jobs:
            yield [job]

    def preparation(self) -> list[Task]:
        """What must be done, and is not yet, before any job."""
        return []

    def measure(self, job: Job) -> dict:
        """Everything of the job's row beside the job."""
        raise NotImplementedError
