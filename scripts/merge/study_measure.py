"""Merge the study's experts by every method and measure what comes out on held-out pictures."""

from __future__ import annotations

import dataclasses
import fcntl
import functools
import json
import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from study_experts import ROOT, WORK, Cell, expert_files, joint_name, playground_flags, start_file

DATA = ROOT / "playground/data/emoji"
CALIBRATION = 256  # pairs for a cell, shared out among the experts' own data


@dataclass(frozen=True)
class Job:
    """One merge to measure; two jobs of one key are the same."""

    part: str
    cell: Cell
    title: str
    setting: str  # JSON: the method's options
    experts: int  # how many of the cell's experts; 0 is all

    @property
    def key(self) -> str:
        values = [self.part, self.cell.name, self.title, self.setting, self.experts]
        return json.dumps(values)

    @classmethod
    def of_row(cls, row: Mapping) -> Job:
        return cls(**{**row["job"], "cell": Cell(**row["job"]["cell"])})


class Bench:
    """The frozen model, loaded once, into which merged projectors are put."""

    def __init__(self, plan: Mapping):
        from fed.arguments import FedArguments
        from llava.train.arguments import DataArguments, ModelArguments, TrainingArguments, parse
        from llava.train.data import DataCollatorForSupervisedDataset
        from llava.train.session import load_session

        cache = plan["flags"]["feature_cache"]
        words = [*playground_flags(), "--use_cpu", "True", "--feature_cache", cache]
        kinds = (ModelArguments, DataArguments, TrainingArguments, FedArguments)
        self.plan, self.arguments = plan, parse(words, *kinds)
        self.session = load_session(*self.arguments[:3])
        self.collate = DataCollatorForSupervisedDataset(self.session.tokenizer)

    @functools.cache  # noqa: B019
    def heldout(self, scenario: str, part: str):
        from fed.setup import evaluation_set

        of = self.plan["scenarios"][scenario]
        _, data_args, training_args, fed_args = self.arguments
        fed_args = dataclasses.replace(fed_args, fed_eval_domain=of["domain"])
        part = self.plan["report" if part == "report" else "development"]["part"]
        path = str(DATA / f"{of['heldout'].format(part=part)}.json")
        return evaluation_set(path, data_args, fed_args, self.session, training_args)

    def measure(self, state: Mapping, job: Job) -> dict:
        from fed.evaluate import evaluate
        from llava.model.trainable_part import ProjectorForm

        ProjectorForm().into_model(self.session.model, state, job.title)
        data = self.heldout(job.cell.scenario, job.part)
        return evaluate(self.session.model.eval(), data, self.collate, batch_size=64)


def calibration(plan: Mapping, cell: Cell, names: Sequence[str]) -> list:
    """Data of each expert's own, few where experts are many."""
    from fed.merging.calibration_data import load_calibration

    clients = plan["scenarios"][cell.scenario]["clients"]
    return load_calibration(
        str(WORK / cell.name / "clients" / names[0]),
        str(ROOT / "playground/backbones/llm"),
        [str(DATA / f"clients/{clients}/{name}.json") for name in names],
        str(DATA / "images"),
        samples=CALIBRATION // len(names),
    )


def merge(plan: Mapping, job: Job, experts: Mapping[str, Mapping], given: dict) -> Mapping:
    """The projector that a job asks for: merged, one expert's, or that of joint training."""
    from fed import methods
    from fed.state import load

    if job.title == "joint training":
        return load(WORK / joint_name(plan, job.cell) / "mm_projector.bin")
    if job.title.startswith("expert "):
        return experts[job.title.removeprefix("expert ")]
    of = plan["ablation"] if job.title in plan["ablation"]["variants"] else plan["methods"]
    name = of["method"] if of is plan["ablation"] else of[job.title]["method"]
    options = json.loads(job.setting)
    method = methods.get(name)
    if method.needs_calibration or options.get("mode") == "calibration":
        if job.cell not in given:
            given[job.cell] = calibration(plan, job.cell, list(experts))
        options["calibration"] = given[job.cell]
    base = load(start_file(job.cell))
    weights = [1] * len(experts)
    return method(list(experts.values()), weights=weights, base=base, **options).state


def chosen_experts(cell: Cell, count: int) -> dict[str, Path]:
    """All experts of a cell, or so many of them, drawn with its seed."""
    files = expert_files(cell)
    names = random.Random(f"experts {cell.seed}").sample(sorted(files), count or len(files))
    return {name: files[name] for name in sorted(names)}


def run_cell(plan: Mapping, jobs: Sequence[Job], results: Path) -> None:
    """Measure jobs of one cell, a line of the results each."""
    from fed.state import load

    bench, given = _bench(json.dumps(plan)), {}
    for job in jobs:
        files = chosen_experts(job.cell, job.experts)
        experts = {name: load(file) for name, file in files.items()}
        found = bench.measure(merge(plan, job, experts, given), job)
        domains = {
            name: {"loss": round(m["loss"], 5), "exact": round(m["exact"], 5)}
            for name, m in found["domains"].items()
        }
        row = {
            "job": dataclasses.asdict(job),
            "loss": round(found["loss"], 5),
            "exact": round(found["exact"], 5),
            "domains": domains,
            "of": list(experts),
        }
        with open(results, "a") as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            file.write(json.dumps(row) + "\n")


@functools.cache
def _bench(plan: str) -> Bench:
    return Bench(json.loads(plan))
