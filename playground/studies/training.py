"""Training runs of a study, in this process."""

from __future__ import annotations

import contextlib
import json
import os
import shlex
import shutil
import statistics
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from fed import methods
from llava.atomic import own_name
from llava.processes import name_of
from playground import ROOT
from playground.flags import flags, words
from playground.studies.plan import Job, Plan, Task


@contextlib.contextmanager
def whole_folder(folder: Path) -> Iterator[Path]:
    """A folder to write into, which gets its name when the block has ended without an error."""
    temporary = own_name(folder)
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    yield temporary
    os.replace(temporary, folder)


@contextlib.contextmanager
def logged(work: Path, argv: Sequence[str]) -> Iterator[None]:
    """Collect what is printed in this process's log, below the command."""
    log = work / f"logs/{name_of()}.log"
    log.parent.mkdir(parents=True, exist_ok=True)
    with open(log, "a") as file, contextlib.redirect_stdout(file):
        print(f"$ {shlex.join(argv)}", flush=True)
        yield


def align(folder: Path, argv: Sequence[str]) -> None:
    """Train a projector by llava.train.train."""
    from llava.train.train import train

    with whole_folder(folder) as temporary, logged(folder.parent, argv):
        train(argv=[*argv, "--output_dir", str(temporary)])


class FederatedPlan(Plan):
    """A study in which every job is a run of fed.train.

    Subclasses say which flags a job has and what is kept of its rounds. With `rank: true` in the
    plan a row also has the shares `first` and `among_five` of `fed.evaluate --rank` at the end.
    `start`, if the plan has it, are flags of llava.train, beside the section of
    playground/flags.yaml that it names: they align the projector that all runs begin with.
    """

    def __init__(self, document: Mapping[str, Any]):
        super().__init__(document)
        self.start = self.work / "start"

    def preparation(self) -> list[Task]:
        if "start" not in self.document or self.start.exists():
            return []
        own = dict(self.document["start"])
        argv = words(flags(own.pop("section")) | own)
        return [Task("the projector to start from", align, (self.start, argv))]

    def begun(self) -> dict[str, str]:
        """The flag that names the projector to start from, if there is one."""
        if "start" not in self.document:
            return {}
        return {"pretrain_mm_mlp_adapter": os.path.relpath(self.start / "mm_projector.bin", ROOT)}

    def values(self, job: Job) -> dict:
        """The flags of a job that do not depend on its method."""
        raise NotImplementedError

    def summary(self, job: Job, records: Sequence[dict]) -> dict:
        """What a row keeps of the records in rounds.jsonl."""
        raise NotImplementedError

    def argv(self, job: Job) -> list[str]:
        """The flags of fed.train, but for --output_dir, that make the job's run."""
        method = self.methods[self.ours if job.title in self.variants else job.title]["flags"]
        known = methods.get(method["fed_method"]).defaults
        setting = json.loads(job.setting)
        options = {name: value for name, value in setting.items() if name in known}
        values = self.values(job) | method
        values |= {name: value for name, value in setting.items() if name not in known}
        values.pop("output_dir", None)
        chosen = [f"{name}={value}" for name, value in options.items()]
        return words(values) + (["--fed_options", *chosen] if chosen else [])

    def measure(self, job: Job) -> dict:
        """A run in this process. Its files are removed; a log and cached features stay in work."""
        from fed.train import train

        argv, began = self.argv(job), time.perf_counter()
        self.work.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=self.work) as folder, logged(self.work, argv):
            cache = ["--feature_cache", str(self.work / "features"), "--report_to", "none"]
            train([*argv, *cache, "--output_dir", folder])
            lines = (Path(folder) / "rounds.jsonl").read_text().splitlines()
            ranks = self.ranks(job, Path(folder)) if self.document.get("rank") else {}
        seconds = round(time.perf_counter() - began, 1)
        summary = self.summary(job, [json.loads(line) for line in lines])
        return {**summary, **ranks, "seconds": seconds, "flags": shlex.join(argv)}

    def ranks(self, job: Job, folder: Path) -> dict[str, float]:
        """How often names are ranked first, and among five; the mean over a run's models."""
        from fed import evaluate

        values, output = self.values(job), folder / "ranks.json"
        words = ["--models", folder, "--model_base", values["model_name_or_path"], "--rank",
                 "--data", values["fed_eval_data_path"], "--version", values["version"],
                 "--image_folder", values["fed_eval_image_folder"], "--output", output]  # fmt: skip
        evaluate.evaluate_all(evaluate.parser().parse_args([str(word) for word in words]))
        found = [row["measures"] for row in json.loads(output.read_text())["rows"]]
        rows = [measures[self.heldout(job)] for measures in found]
        return {
            name: round(statistics.mean(row[name] for row in rows), 5)
            for name in ("first", "among_five")
        }
