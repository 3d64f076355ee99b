"""The frozen model into which projectors are put to be measured, and the merging of experts."""

from __future__ import annotations

import dataclasses
import functools
import json
from collections.abc import Mapping
from pathlib import Path

from fed import methods
from fed.arguments import FedArguments
from fed.clients.measures import evaluate
from fed.merging.calibration import load_calibration
from fed.methods import Calibration
from fed.server.heldout import evaluation_set
from fed.state import State, load
from llava.model.checkpoint import projector_state
from llava.model.trainable_part import ProjectorPart
from llava.train.arguments import DataArguments, ModelArguments, TrainingArguments, parse
from llava.train.data import DataCollatorForSupervisedDataset
from llava.train.session import load_session
from playground import ROOT
from playground.flags import words
from playground.studies.pivotmerge import (
    CALIBRATION,
    EMOJI,
    JOINT,
    PROJECTOR,
    PivotMergePlan,
    training_flags,
)
from playground.studies.plan import Job

KINDS = (ModelArguments, DataArguments, TrainingArguments, FedArguments)


class Bench:
    """A model whose projector is replaced job by job.

    Args:
        feature_cache: the folder of cached features.
    """

    def __init__(self, feature_cache: str):
        more = {"use_cpu": True, "feature_cache": feature_cache}
        *loading, fed = parse(words(training_flags() | more), *KINDS)
        self.session = load_session(*loading)
        self.data_args = dataclasses.replace(loading[1], image_folder=fed.fed_eval_image_folder)
        self.collate = DataCollatorForSupervisedDataset(self.session.tokenizer)
        self.sets: dict[tuple[str, str], object] = {}

    def measure(
        self, state: State, title: str, heldout: str, domain: str, explained: bool = False
    ) -> dict:
        """Loss and exact captions of a projector, over all pictures of a set and by domain."""
        ProjectorPart().into_model(self.session.model, state, title)
        if (heldout, domain) not in self.sets:
            self.sets[heldout, domain] = evaluation_set(
                str(EMOJI / f"{heldout}.json"), self.session, self.data_args, domain
            )
        data = self.sets[heldout, domain]
        model = self.session.model.eval()
        return evaluate(model, data, self.collate, batch_size=64, explained=explained)


_bench = functools.cache(Bench)


def drawn_projector(seed: int) -> State:
    """A projector as fed.train draws it for this seed."""
    args = parse(words(training_flags() | {"seed": seed, "use_cpu": True}), *KINDS)
    return projector_state(load_session(*args[:3]).model)


def measure(plan: PivotMergePlan, job: Job) -> dict:
    """A row of the study, but for its job."""
    files = plan.expert_files(job.scenario, job.seed, job.experts)
    experts = {name: load(file) for name, file in files.items()}
    bench = _bench(plan.document["flags"]["feature_cache"])
    state = merged(plan, job, experts)
    domain = plan.data(job.scenario)["domain"]
    explained = plan.document["flags"].get("fed_eval_explained", False)
    measures = bench.measure(state, job.title, plan.heldout(job), domain, explained)
    return {
        **_rounded(measures),
        "domains": {name: _rounded(of_domain) for name, of_domain in measures["domains"].items()},
        "of": list(experts),
    }


def merged(plan: PivotMergePlan, job: Job, experts: Mapping[str, State]) -> State:
    """The projector that a job asks for: merged, one expert's, or that of joint training."""
    place = job.scenario, job.seed
    if job.title == JOINT:
        return load(plan.work / plan.joint(*place) / PROJECTOR)
    if job.title.startswith("expert "):
        return experts[job.title.removeprefix("expert ")]
    title = plan.ours if job.title in plan.variants else job.title
    method, options = methods.get(plan.methods[title]["method"]), json.loads(job.setting)
    if looks_at := plan.methods[title].get("calibration"):
        folder = plan.work / plan.experts(*place) / "clients" / min(experts)
        data = plan.files(job, looks_at, list(experts))
        options["calibration"] = _calibration(folder, *data)
    base, weights = load(plan.start_file(*place)), [1] * len(experts)
    return method(list(experts.values()), weights=weights, base=base, **options).state


@functools.lru_cache(maxsize=2)
def _calibration(model: Path, *files: Path) -> list[Calibration]:
    """Pairs of a file for each expert, few where files are many."""
    distinct = list(dict.fromkeys(files))
    loaded = load_calibration(
        str(model),
        str(ROOT / "playground/backbones/llm"),
        [str(file) for file in distinct],
        str(EMOJI / "images"),
        samples=CALIBRATION // len(distinct),
    )
    by_file = dict(zip(distinct, loaded, strict=True))
    return [by_file[file] for file in files]


def _rounded(measures: Mapping) -> dict[str, float]:
    names = [name for name in ("loss", "exact", "explained") if name in measures]
    return {name: round(measures[name], 5) for name in names}
