"""What study.yaml asks for: the runs of a study, each with its command line and its key."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import yaml

from fed import methods
from fed.methods.interface.options import defaults
from llava.errors import InputError

ROOT = Path(__file__).resolve().parents[2]
PLAN = ROOT / "scripts/fed/study.yaml"
RESULTS = ROOT / "playground/results"
DATA = "playground/data/emoji"


@dataclass(frozen=True)
class Job:
    """One run of fed.train; two jobs with one key are the same."""

    part: str
    title: str
    setting: str  # JSON
    scenario: str
    seed: int

    @property
    def key(self) -> str:
        return json.dumps([self.part, self.title, self.setting, self.scenario, self.seed])


class Plan:
    """study.yaml, as questions and answers."""

    def __init__(self, path: Path = PLAN):
        self.path = path
        self.document = yaml.safe_load(path.read_text())
        self.methods: Mapping[str, dict] = self.document["methods"]
        self.ours, self.reference = self.document["ours"], self.document["reference"]
        self.not_compared = self.document["not_compared"]

    def scenarios(self, part: str) -> list[str]:
        return self.document[part]["scenarios"]

    def seeds(self, part: str) -> list[int]:
        return self.document[part]["seeds"]

    def settings(self, title: str) -> list[str]:
        return [json.dumps(setting) for setting in self.methods[title]["settings"]]

    def tuning(self) -> Iterator[Job]:
        """Every setting of every method, on the development part."""
        for seed in self.seeds("development"):
            for title in self.methods:
                for setting in self.settings(title):
                    for scenario in self.scenarios("development"):
                        yield Job("development", title, setting, scenario, seed)

    def reporting(self, chosen: Mapping[str, str]) -> Iterator[Job]:
        """Every method with its chosen setting, seed by seed, on the part `report`."""
        for seed in self.seeds("report"):
            for scenario in self.scenarios("report"):
                for title, setting in chosen.items():
                    yield Job("report", title, setting, scenario, seed)

    def ablating(self, chosen: str) -> Iterator[Job]:
        """Our method with other options, everything else as chosen, on the development part."""
        plan = self.document["ablation"]
        for seed in plan["seeds"]:
            for title, options in plan["variants"].items():
                for scenario in plan["scenarios"]:
                    setting = json.dumps({**json.loads(chosen), **options})
                    yield Job("ablation", title, setting, scenario, seed)

    def chosen(self, rows: Sequence[dict]) -> dict[str, str]:
        """Of each method that is tuned through, the setting with the least development loss."""
        tuned = [row for row in rows if row["job"]["part"] == "development"]
        loss = {Job(**row["job"]).key: self.score(row) for row in tuned}
        best = {}
        for title in self.methods:
            means = {}
            for setting in self.settings(title):
                found = [
                    loss.get(Job("development", title, setting, scenario, seed).key)
                    for scenario in self.scenarios("development")
                    for seed in self.seeds("development")
                ]
                if None not in found:
                    means[setting] = sum(found) / len(found)
            if len(means) == len(self.settings(title)):
                best[title] = min(means, key=means.get)
        return best

    def score(self, row: Mapping) -> float:
        """What a setting is chosen by; less is better."""
        return row["loss"][-1]

    def heldout(self, job: Job) -> str:
        """The name of the evaluation set."""
        part = self._part(job)
        return self.document["scenarios"][job.scenario]["heldout"].format(part=part)

    def flags(self, job: Job) -> list[str]:
        """The flags of fed.train that make this run, beside those of all runs."""
        method = self.methods[self.ours if job.part == "ablation" else job.title]["flags"]
        known = defaults(methods.get(method["fed_method"]))
        setting = json.loads(job.setting)
        options = {name: value for name, value in setting.items() if name in known}
        values = self.values(job) | method
        values |= {k: v for k, v in setting.items() if k not in options}
        words = [w for name, value in values.items() for w in (f"--{name}", str(value))]
        if options:
            words += ["--fed_options", *(f"{name}={value}" for name, value in options.items())]
        return words

    def values(self, job: Job) -> dict:
        """Of those flags, what does not depend on the method."""
        scenario = self.document["scenarios"][job.scenario]
        clients = scenario["clients"]
        if job.part != "report" and clients == "skew":
            clients = "skew-dev"
        return {
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

    def _part(self, job: Job) -> str:
        return self.document["report" if job.part == "report" else "development"]["part"]


def read_rows(path: Path) -> list[dict]:
    """The finished runs of a study."""
    if not path.exists():
        return []
    try:
        return [json.loads(line) for line in path.read_text().splitlines()]
    except ValueError as error:
        raise InputError(f"{path}: not one JSON object a line ({error})") from None
