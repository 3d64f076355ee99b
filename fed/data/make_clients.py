"""Federated clients out of one data set: by source, cluster, caption style, Dirichlet or task.

    python -m fed.data SHAPE --input DATA --output FOLDER …

docs/data.md has the commands for LLaVA-Pretrain, CC12M and LLaVA's mix665k, and says what
they cost.
"""

from __future__ import annotations

import argparse
import math
import shlex
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from fed.data import keys
from llava.errors import InputError
from llava.flags import FlagParser

if TYPE_CHECKING:
    import numpy as np

    from fed.data.cutting import Column, Cut
    from fed.data.samples import Sample, SampleSource

SHAPES = {
    "source": "a client for each value of a key",
    "cluster": "a client for each cluster of pictures",
    "style": "a client for each style of captions",
    "dirichlet": "clients that mix a key's values, more or less unlike each other",
    "task": "clients of LLaVA's mix665k with a task each, all of one size",
}
COUNTS = (
    *("clients", "minimum_size", "clusters", "fit_samples", "batch_size"),
    *("clients_per_task", "samples"),
)
"""Flags that are 1 or more."""


def parser() -> argparse.ArgumentParser:
    top = FlagParser(description=__doc__.splitlines()[0])
    shapes = top.add_subparsers(dest="shape", required=True, metavar="SHAPE")
    for name, text in SHAPES.items():
        one = shapes.add_parser(name, help=text, description=text[0].upper() + text[1:] + ".")
        add = one.add_argument
        add("--input", nargs="+", required=True, help="a LLaVA JSON, or tars: a-{000..123}.tar")
        add("--output", required=True, type=Path, help="a folder that is new or empty")
        add("--image_folder", help="JSON: where the pictures lie")
        add(
            "--skip_bad",
            action="store_true",
            help="JSON: leave out records without picture, key or style",
        )
        add("--decode", action="store_true", help="decode each picture to find broken ones; slow")
        each = " of each task" if name == "task" else ""
        add("--heldout", type=float, default=0, help=f"share (below 1) or number held out{each}")
        add("--seed", type=int, default=0)
        if name == "task":
            add("--tasks", nargs="+", required=True, help="which, as docs/data.md has it")
            add("--clients_per_task", type=int, default=3)
            add("--samples", type=int, help="of each client; else as many as the tasks allow")
            one.set_defaults(styles=[], key=["task", "picture"])
            continue
        add("--meta", help="JSON: a list of objects with the same ids, whose keys are used too")
        add("--caption", default="txt", help="tars: the field that is the caption (txt)")
        add("--question", default="Describe the picture.", help="tars: what the human asks")
        add(
            "--styles",
            nargs="+",
            default=[],
            metavar="NAME=FIELD[:FORM]",
            help="ways to describe, dealt to the samples in equal shares; `answer` is the record's "
            "own caption; forms are first-sentence and keywords",
            required=name == "style",
        )
        if name in ("source", "dirichlet"):
            add("--key", nargs="+", required=True, help=keys.HELP)
        add("--clients", type=int, required=name == "dirichlet", help="how many; else the largest")
        add("--minimum_size", type=int, default=1, help="samples that a client has at least")
        if name != "dirichlet":
            add("--rare", choices=("pool", "drop"), default="pool", help="smaller ones: `other`")
        else:
            add("--alpha", type=float, required=True, help="small: a client has few keys")
            add("--size_alpha", type=float, help="small: sizes differ much; else alpha decides")
        if name != "style":
            need = name == "cluster"
            add("--tower", required=need, help="vision tower of clusters: a path or a hub name")
            add("--clusters", type=int, help="how many")
            add("--centroids", help="centroids.safetensors of another cut, instead of new ones")
            add("--fit_samples", type=int, default=20000, help="pictures that k-means is fitted on")
            add("--batch_size", type=int, default=64)
            add("--device", default="cpu")
    return top


def main(argv: list[str] | None = None) -> None:
    argv = sys.argv[1:] if argv is None else argv
    args = parser().parse_args(argv)
    keys_of = {"cluster": ["cluster"], "style": ["style"]}
    wanted: list[str] = keys_of.get(args.shape) or args.key
    tower = getattr(args, "tower", None)
    computed = {key for key, flag in (("style", args.styles), ("cluster", tower)) if flag}
    own = [key for key in wanted if key not in computed]
    _check(args, wanted)

    from fed.data import cutting, writing
    from fed.data.styles import read_styles, restyle
    from llava.atomic import new_folder, write_text

    styles = read_styles(args.styles)
    source = open_source(args)
    command = shlex.join(["python", "-m", "fed.data", *argv]).replace("\n", " ")
    inputs = "\n".join(f"Input: {line}" for line in source.describe())
    header = f"Made by: {command}\nSeed: {args.seed}\n{inputs}"
    if _is_done(args.output, writing.comment(header)):
        print(f"{args.output}: is there already, made by this command")
        return
    clusters = Clusters(args) if "cluster" in computed else None
    with new_folder(args.output) as folder:
        *columns, used = cutting.survey(source, own, styles)
        named = dict(zip(own, columns, strict=True))
        if clusters:
            used = named["cluster"] = clusters.of(source, used.codes >= 0, folder)
        dealt = (
            cutting.deal(used.codes >= 0, [s.name for s in styles], args.seed) if styles else None
        )
        if dealt:
            named["style"] = dealt
        cut = _cut(args, source, [named[key] for key in wanted])

        def record_of(number: int, sample: Sample) -> dict:
            return restyle(sample, styles[dealt.codes[number]]) if dealt else sample.record

        writing.write_records(folder, source, cut, record_of)
        text = writing.report(header, cut, source.left_out)
        write_text(folder / "clients.md", text)
        document = writing.clients_yaml(header, cut, source.image_folder, args.output)
        write_text(folder / "clients.yaml", document)
    print(text)
    print(f"--fed_clients {args.output / 'clients.yaml'}")
    if (args.output / "heldout.json").exists():
        images = source.image_folder or args.output / "heldout/images"
        print(f"--fed_eval_data_path {args.output / 'heldout.json'}")
        print(f"--fed_eval_image_folder {images}")


def _check(args: argparse.Namespace, wanted: list[str]) -> None:
    """Refuse flags that are wrong by themselves, before hours of reading."""
    for name, value in vars(args).items():
        flag = f"--{name}"
        if name in ("alpha", "size_alpha") and value is not None and not 0 < value < math.inf:
            raise InputError(f"{flag} {value}: a number over 0 is expected")
        if name in COUNTS and value is not None and value < 1:
            raise InputError(f"{flag} {value}: 1 or more is expected")
    if not 0 <= args.heldout < 1 and not (args.heldout >= 1 and args.heldout.is_integer()):
        raise InputError(
            f"--heldout {args.heldout}: a share below 1, or a whole number, is expected"
        )
    if args.shape == "task":
        from fed.data.mix665k import check_tasks

        check_tasks(args.tasks)
    if len(set(wanted)) < len(wanted):
        raise InputError("--key: the same key twice")
    if getattr(args, "tower", None):
        if "cluster" not in wanted:
            raise InputError("--tower is for --key cluster")
        if (args.clusters is None) == (args.centroids is None):
            raise InputError("--tower needs either --clusters or --centroids")


def _is_done(output: Path, head: str) -> bool:
    try:
        return (output / "clients.yaml").read_text(encoding="utf-8").startswith(head)
    except OSError:
        return False


def open_source(args: argparse.Namespace) -> SampleSource:
    """The input that the flags name: tar files, or one JSON."""
    from fed.data.reading import LlavaJson
    from fed.data.shards import TarShards, expand

    paths = expand(args.input)
    tars = [path.endswith(".tar") for path in paths]
    if all(tars) and args.shape != "task":
        for flag in ("image_folder", "meta"):
            if getattr(args, flag):
                raise InputError(f"--{flag} is for a JSON, not for tar files")
        return TarShards(paths, args.caption, args.question, args.decode)
    if len(paths) > 1 or any(tars):
        if args.shape == "task":
            raise InputError("--input: one JSON is expected, the mix of LLaVA 1.5")
        raise InputError("--input: one JSON, or files that end in .tar, are expected")
    if not args.image_folder:
        raise InputError("--image_folder is missing: where the pictures of the JSON lie")
    if args.shape == "task":
        from fed.data.mix665k import Mix

        return Mix(paths[0], args.image_folder, args.tasks, args.skip_bad, args.decode)
    return LlavaJson(paths[0], args.image_folder, args.meta, args.skip_bad, args.decode)


class Clusters:
    """The clusters that the flags name; what is wrong with them is found before any reading."""

    def __init__(self, args: argparse.Namespace) -> None:
        from fed.data.clusters import Centroids, Encoder

        self.args = args
        self.encoder = Encoder(args.tower, args.device, args.batch_size)
        self.given = Centroids.load(args.centroids) if args.centroids else None
        if self.given and self.given.tower != self.encoder.fingerprint:
            raise InputError(f"--centroids {args.centroids}: they are of another tower")

    def of(self, source: SampleSource, used: np.ndarray, folder: Path) -> Column:
        """The cluster of every sample that is used (a bool for each); `folder` gets the means."""
        from fed.data.clusters import assign, fit

        args = self.args
        centroids = self.given or fit(
            self.encoder, source, used, args.clusters, args.fit_samples, args.seed
        )
        centroids.save(folder / "centroids.safetensors")
        return assign(self.encoder, source, used, centroids)


def _cut(args: argparse.Namespace, source: SampleSource, columns: list[Column]) -> Cut:
    from fed.data import cutting

    if args.shape == "task":
        from fed.data.mix665k import Mix
        from fed.data.shares import by_task

        task, picture = columns
        assert isinstance(source, Mix)  # `open_source` gives it for this shape
        shares = (args.tasks, args.clients_per_task, args.samples)
        return by_task(task, picture, source.counts, *shares, args.heldout, args.seed)
    column = cutting.product(columns)
    held = cutting.hold_out(column.codes >= 0, args.heldout, args.seed)
    if args.shape == "dirichlet":
        sizes = (args.size_alpha, args.minimum_size)
        return cutting.by_dirichlet(column, held, args.clients, args.alpha, *sizes, args.seed)
    return cutting.by_value(column, held, args.minimum_size, args.clients, args.rare)
