"""The experts of the merging study: trained once, apart, each from the start that all share.

    bash scripts/merge/study.sh --hours 3

A folder of runs/merge-study is one start, one set of experts or one joint model; it gets its name
when it is whole, so that a killed study goes on.
"""

from __future__ import annotations

import contextlib
import json
import os
import shlex
import shutil
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import yaml

from llava.atomic import own_name

ROOT = Path(__file__).resolve().parents[2]
WORK = ROOT / "runs/merge-study"
PLAN = ROOT / "scripts/merge/study.yaml"
SCRIPT = ROOT / "scripts/fed/pretrain_playground.sh"
PROJECTOR = "mm_projector.bin"


@dataclass(frozen=True)
class Cell:
    """Experts of a scenario from a start, of a seed."""

    scenario: str
    start: str  # fresh or brief
    seed: int

    @property
    def name(self) -> str:
        return f"{self.scenario}-{self.start}-{self.seed}"


def read_plan(path: Path = PLAN) -> dict:
    return yaml.safe_load(path.read_text())


def cells(plan: Mapping, part: str) -> Iterator[Cell]:
    """The cells of a part of the study, seed by seed."""
    for seed in plan[part]["seeds"]:
        for cell in plan[part]["cells"]:
            yield Cell(*cell.split(), seed)


def runs(plan: Mapping, cell: Cell) -> dict[str, dict]:
    """What must be trained for a cell, in order: folder → flags beside the common ones."""
    scenario = plan["scenarios"][cell.scenario]
    start = f"start-{cell.start}-{cell.seed}"
    found: dict[str, dict] = {}
    fresh = f"start-fresh-{cell.seed}"
    found[fresh] = {"seed": cell.seed, "fresh": True}
    pooled = {"fed_method": "fedavg", "fed_pool": True}
    if cell.start == "brief":
        found[start] = {**pooled, **_data(plan["brief"]), "seed": cell.seed, "from": fresh}
    common = {"seed": cell.seed, "from": start}
    found[cell.name] = {"fed_method": "local", **_data(scenario), **common}
    joint = {**_data(plan["joint"]), "fed_clients": _clients(scenario["joint"])}
    found[joint_name(plan, cell)] = {**pooled, **joint, **common}
    return found


def joint_name(plan: Mapping, cell: Cell) -> str:
    return f"joint-{plan['scenarios'][cell.scenario]['joint']}-{cell.start}-{cell.seed}"


def start_file(cell: Cell) -> Path:
    return WORK / f"start-{cell.start}-{cell.seed}" / PROJECTOR


def expert_files(cell: Cell) -> dict[str, Path]:
    """The experts' projectors by the names of their clients."""
    found = sorted((WORK / cell.name / "clients").iterdir())
    return {folder.name: folder / PROJECTOR for folder in found}


def train(folder: str, flags: dict, plan: Mapping) -> None:
    """Make a folder of the study, unless it is there."""
    from fed.train import train as fed_train
    from llava.state import save

    if (WORK / folder).exists():
        return
    temporary = own_name(WORK / folder)
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    flags = dict(flags)
    if flags.pop("fresh", False):
        save(fresh_projector(flags["seed"]), temporary / PROJECTOR)
    else:
        source = WORK / flags.pop("from") / PROJECTOR
        values = {**plan["flags"], **flags, "pretrain_mm_mlp_adapter": source, "fed_eval_every": 0}
        words = [word for name, value in values.items() for word in (f"--{name}", str(value))]
        with open(WORK / "log.txt", "a") as log, contextlib.redirect_stdout(log):
            print(f"$ {folder}: {shlex.join(words)}", flush=True)
            fed_train([*playground_flags(), *words, "--output_dir", str(temporary)])
    os.replace(temporary, WORK / folder)


def fresh_projector(seed: int) -> dict:
    """A projector as fed.train draws it for this seed."""
    from fed.arguments import FedArguments
    from llava.model.checkpoint import projector_state
    from llava.train.arguments import DataArguments, ModelArguments, TrainingArguments, parse
    from llava.train.session import load_session

    words = [*playground_flags(), "--seed", str(seed), "--use_cpu", "True"]
    args = parse(words, ModelArguments, DataArguments, TrainingArguments, FedArguments)
    return projector_state(load_session(*args[:3]).model)


def playground_flags() -> list[str]:
    """The flags of pretrain_playground.sh, as its text has them, without held-out data."""
    text = SCRIPT.read_text().replace("\\\n", " ")
    (command,) = [line for line in text.splitlines() if "-m fed.train" in line]
    words = [word for word in shlex.split(command)[3:] if word != "$@"]
    place = words.index("--fed_eval_data_path")
    return words[:place] + words[place + 2 :]


def _clients(name: str) -> str:
    return f"playground/fed/{name}.yaml"


def _data(source: Mapping) -> dict:
    found = {"per_device_train_batch_size": source["batch"], "num_train_epochs": source["epochs"]}
    return found | ({"fed_clients": _clients(source["clients"])} if "clients" in source else {})


def main() -> None:
    """Train one folder; the study calls it in a process of its own: FOLDER FLAGS-AS-JSON."""
    import transformers

    transformers.logging.set_verbosity_error()
    os.chdir(ROOT)
    folder, flags = sys.argv[1:]
    train(folder, json.loads(flags), read_plan())


if __name__ == "__main__":
    main()
