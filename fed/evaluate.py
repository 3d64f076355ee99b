"""Models measured on held-out data: as a run records it, and whose name each picture gets.

    python -m fed.evaluate --models "FedAvg=runs/fedavg" runs/merged --model_base LLM \\
        --data heldout.json --image_folder images --output measures.json

A model is a folder with a projector, a LoRA or a whole LLaVA, or the folder of a run; of a run that
leaves a model for each client, each of these. Prints the table of `fed.report`.

Measured are the caption loss, the exact answers and the explained share (`fed.clients.measures`);
with --rank also how often a picture's own name is the first, or among the five first, of all names
(`llava.eval.name_tree`).
"""

from __future__ import annotations

import argparse
import contextlib
import json
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fed.report import table
from llava.atomic import write_text
from llava.errors import InputError, one_clear_error
from llava.flags import FlagParser, pairs
from llava.progress import progress_shown

if TYPE_CHECKING:
    from fed.clients.measures import EvaluationSet
    from llava.train.session import Session


def models_of(words: Sequence[str]) -> dict[str, str]:
    """`[NAME=]FOLDER` each: name → folder; the clients of a run are named as `fed.report` does."""
    named = pairs("--models", [w if "=" in w else f"{w}={w}" for w in words], "NAME=FOLDER")
    found: dict[str, str] = {}
    for name, path in named.items():
        clients = sorted(file.parent for file in Path(path).glob("clients/*/config.json"))
        if clients and not (Path(path) / "config.json").is_file():
            found |= {f"{folder.name}, {name}": str(folder) for folder in clients}
        else:
            found[name] = path
    return found


def template_of(path: str, asked: str | None) -> str:
    """The template asked for, else `plain` for a projector alone, else the one in the config.

    Raises:
        InputError: there is no such folder, or its config names no template.
    """
    from llava.json_files import read_json
    from llava.model.builder import has_weights
    from llava.model.checkpoint_names import PROJECTOR_FILE
    from llava.model.lora import ADAPTER_CONFIG
    from llava.model.shards import local_folder

    folder = local_folder(path)
    if asked:
        return asked
    is_lora = (folder / ADAPTER_CONFIG).is_file()
    if (folder / PROJECTOR_FILE).is_file() and not is_lora and not has_weights(folder):
        return "plain"  # as pre-training is; a config names the language model's own
    config = folder / "config.json"
    named = read_json(config).get("conversation_template") if config.is_file() else None
    if not named:
        raise InputError(f"{path}: --version is missing: the conversation template of its training")
    return str(named)


def check_output(path: Path) -> None:
    """Find out before anything is loaded whether the file can be written."""
    if path.is_dir():
        raise InputError(f"--output {path}: this is a folder, a JSON file is expected")
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryFile(dir=path.parent):
        pass


def check_data(paths: Sequence[str]) -> None:
    """`InputError` for files of one name, and for one that holds no LLaVA records."""
    from llava.train.data import load_records

    names = [Path(path).stem for path in paths]
    for i, (name, path) in enumerate(zip(names, paths, strict=True)):
        if name in names[:i]:
            raise InputError(f"--data: two files are called {name}")
        load_records(path)


def read_names(path: Path) -> list[str]:
    """The candidate names of a text file, one a line; empty lines are passed over."""
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"--candidates {path} is no text file that can be read: {error}") from None
    names = list(dict.fromkeys(line.strip() for line in lines if line.strip()))
    if not names:
        raise InputError(f"--candidates {path}: expected a name a line, found none")
    return names


def ranking(
    session: Session, data: EvaluationSet, batch_size: int, candidates: Path | None = None
) -> dict:
    """How often a picture's own name is ranked `first`, and `among_five`, of all `candidates`.

    Shares of the samples with pictures, None where there are none; the same per domain. Without a
    file of candidates they are the distinct captions of the data.
    """
    from llava.eval.name_ranking import names_of, rank_names
    from llava.train.data import DataCollatorForSupervisedDataset

    dataset: Any = data.dataset
    names = read_names(candidates) if candidates else names_of(dataset)
    collate = DataCollatorForSupervisedDataset(session.tokenizer)
    found = rank_names(session.model, dataset, collate, names, batch_size)
    of_domain: dict[str, list[int | None]] = {name: [] for name in data.domains or ()}
    for i, sample in enumerate(found):
        if sample and data.domains:
            of_domain[data.domains[i]].append(sample.rank)
    shares = _shares([sample.rank for sample in found if sample])
    domains = {name: _shares(ranks) for name, ranks in of_domain.items()}
    return {**shares, "candidates": len(names), "domains": domains}


def _shares(ranks: Sequence[int | None]) -> dict[str, float | None]:
    """Of ranks from 1 to 5, None below these."""
    if not ranks:
        return {"first": None, "among_five": None}
    return {
        "first": ranks.count(1) / len(ranks),
        "among_five": 1 - ranks.count(None) / len(ranks),
    }


def measures(path: str, version: str, args: argparse.Namespace) -> dict[str, dict]:
    """The measures of one model on each file: `fed.clients.measures.evaluate`, and `ranking`."""
    from fed.clients.measures import evaluate
    from fed.server.heldout import evaluation_set
    from llava.train.arguments import DataArguments
    from llava.train.data import DataCollatorForSupervisedDataset
    from llava.train.finished import finished_session

    session = finished_session(path, args.model_base, version, args.device)
    collate = DataCollatorForSupervisedDataset(session.tokenizer)
    data_args = DataArguments(image_folder=args.image_folder)
    sets = [
        evaluation_set(data, session, data_args, args.domain, flag="--data") for data in args.data
    ]
    found = {}
    for data in sets:
        row = evaluate(session.model, data, collate, args.batch_size, session.model.device, True)
        if args.rank or args.candidates:
            ranked = ranking(session, data, args.batch_size, args.candidates)
            for name, of_domain in ranked.pop("domains").items():
                row["domains"][name] |= of_domain
            row |= ranked
        found[data.name] = row
    return found


def evaluate_all(args: argparse.Namespace) -> str:
    """Measure every model, write --output, and give the tables. Bad input is found first."""
    from llava.conversation import get_template
    from llava.eval.answer import check_device

    if args.batch_size < 1:
        raise InputError(f"--batch_size {args.batch_size}: at least 1 is expected")
    check_device(args.device)
    if args.version:
        get_template(args.version)
    models = models_of(args.models)
    versions = {name: template_of(path, args.version) for name, path in models.items()}
    check_data(args.data)
    if args.candidates:
        read_names(args.candidates)
    if args.output:
        check_output(args.output)
    rows = []
    for name, path in models.items():
        print(f"{name}: {path}, template {versions[name]}", file=sys.stderr, flush=True)
        with (
            contextlib.redirect_stdout(sys.stderr),
            progress_shown(),
        ):  # the tables have stdout to themselves
            rows.append({"model": name, "measures": measures(path, versions[name], args)})
    if args.output:
        write_text(args.output, json.dumps({"rows": rows}, indent=1))
    return table(rows, [Path(path).stem for path in args.data])


def parser() -> argparse.ArgumentParser:
    top = FlagParser(prog="python -m fed.evaluate", description=__doc__.split("\n")[0])
    add = top.add_argument
    add("--models", nargs="+", required=True, metavar="[NAME=]FOLDER")
    add("--model_base", help="the language model of a projector or a LoRA")
    add("--data", nargs="+", required=True, metavar="JSON", help="LLaVA JSON files to measure on")
    add("--image_folder", help="the pictures of the data")
    add("--output", type=Path, metavar="FILE.json", help="where the measures go, too")
    add("--domain", default="domain", help="the key of a record that names its domain")
    add(
        "--version",
        help="conversation template; else plain for a projector alone, else the config's",
    )
    add(
        "--rank",
        action="store_true",
        help="rank all names of a file for each of its pictures, which takes longer",
    )
    add(
        "--candidates",
        type=Path,
        metavar="FILE",
        help="rank the names in this text file, one a line, instead of the captions of the data",
    )
    add("--batch_size", type=int, default=16)
    add("--device", default="cuda", help="cuda where there is one, else the CPU")
    return top


def main(argv: Sequence[str] | None = None) -> None:
    args = parser().parse_args(argv)
    with one_clear_error():
        print(evaluate_all(args), end="")


if __name__ == "__main__":
    main()
