"""The output: a folder for each client, clients.yaml, the held-out part, and a report."""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, TextIO

import numpy as np
import yaml
from tqdm import tqdm

from fed.data.cutting import HELD_OUT, LEFT_OUT, Cut
from fed.data.samples import LeftOut, Sample, SampleSource
from llava.errors import InputError

MAX_CLIENTS = 500
"""As many files are open at once."""
SHOWN = 5
"""So many of a client's keys are in the report."""


class JsonList:
    """A JSON list that is written item by item."""

    def __init__(self, path: Path) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        self._file: TextIO = open(path, "x", encoding="utf-8")  # noqa: SIM115
        self._next = "[\n"

    def append(self, item: Any) -> None:
        self._file.write(self._next + json.dumps(item))
        self._next = ",\n"

    def close(self) -> None:
        self._file.write("\n]\n" if self._next != "[\n" else "[]\n")
        self._file.close()


def write_records(
    folder: Path, source: SampleSource, cut: Cut, record_of: Callable[[int, Sample], dict]
) -> None:
    """The last pass: captions.json of every client and heldout.json, with pictures if need be.

    Args:
        folder: empty.
        record_of: number and sample → the record to be written.
    """
    if len(cut.clients) > MAX_CLIENTS:
        raise InputError(
            f"{len(cut.clients)} clients are more than {MAX_CLIENTS}; --clients and "
            "--minimum_size make them fewer"
        )
    with contextlib.ExitStack() as stack:
        files = {
            number: stack.enter_context(contextlib.closing(JsonList(folder / path)))
            for number, path in _paths(cut)
        }
        count = 0
        samples = tqdm(source.read(check=False), desc="writing", unit="samples", disable=None)
        for number, sample in enumerate(samples):
            count += 1
            owner = int(cut.owner[number]) if number < len(cut.owner) else LEFT_OUT
            if owner == LEFT_OUT:
                continue
            if sample is None:
                raise InputError("the input changed while it was read")
            record = record_of(number, sample)
            if owner == HELD_OUT:
                record = {**record, "domain": cut.domains[cut.column.codes[number]]}
            files[owner].append(record)
            if source.image_folder is None:
                place = "heldout" if owner == HELD_OUT else cut.clients[owner]
                _write_picture(folder / place / "images" / record["image"], sample)
    if count != len(cut.owner):
        raise InputError("the input changed while it was read")


def _paths(cut: Cut) -> Iterator[tuple[int, str]]:
    if (cut.owner == HELD_OUT).any():
        yield HELD_OUT, "heldout.json"
    for number, name in enumerate(cut.clients):
        yield number, f"{name}/captions.json"


def _write_picture(path: Path, sample: Sample) -> None:
    (picture,) = sample.pictures()
    assert isinstance(picture, bytes)  # of a shard: an input without a folder of pictures
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        with open(path, "xb") as file:
            file.write(picture)
    except FileExistsError:
        raise InputError(f"{sample.name}: another sample of the shard has this key") from None


def clients_yaml(header: str, cut: Cut, image_folder: str | None, output: Path) -> str:
    """The text of clients.yaml; `header` becomes its comment."""
    entries = []
    for number, name in enumerate(cut.clients):
        images = f"{name}/images"
        if image_folder is not None:
            # Real paths, for ".." out of a linked folder leads elsewhere.
            images = os.path.relpath(os.path.realpath(image_folder), os.path.realpath(output))
        task = {"task": cut.tasks[number]} if cut.tasks else {}
        data = {"data_path": f"{name}/captions.json", "image_folder": images}
        entries.append({"name": name, **task, **data})
    body = yaml.safe_dump({"clients": entries}, sort_keys=False, allow_unicode=True, width=1000)
    return comment(header) + body


def comment(text: str) -> str:
    return "".join(f"# {line}\n" for line in text.splitlines())


def report(header: str, cut: Cut, left_out: LeftOut) -> str:
    """A table in Markdown: the clients, their samples, and the keys that most of them have."""
    total = int((cut.owner >= 0).sum())
    lines = [*(f"    {line}" for line in header.splitlines()), ""]
    lines += ["| client | samples | share | main keys |", "|---|---:|---:|---|"]
    rows = [(number, name) for number, name in enumerate(cut.clients)]
    if (cut.owner == HELD_OUT).any():
        rows.append((HELD_OUT, "held out"))
    for number, name in rows:
        counts = np.bincount(cut.column.codes[cut.owner == number], minlength=1)
        size = int(counts.sum())
        share = f"{size / total:.1%}" if number >= 0 else ""
        lines.append(f"| {name} | {size} | {share} | {_main_keys(counts, cut.column.names)} |")
    rare = int((cut.owner == LEFT_OUT).sum()) - left_out.count
    for why, count in (cut.dropped or {"as rare": rare}).items():
        if count:
            lines += ["", f"Dropped {why}: {count} samples."]
    if left_out.count:
        lines += ["", f"Left out for a fault: {left_out.count} samples."]
        lines += [f"- {name}" for name in left_out.names]
        if left_out.count > len(left_out.names):
            lines.append(f"- and {left_out.count - len(left_out.names)} more")
    return "\n".join(lines) + "\n"


def _main_keys(counts: np.ndarray, names: list[str]) -> str:
    order = np.argsort(-counts, kind="stable")[:SHOWN]
    parts = [f"{names[i]} {counts[i] / counts.sum():.0%}" for i in order if counts[i]]
    more = int((counts > 0).sum()) - len(parts)
    text = ", ".join(parts) + (f", {more} more" if more > 0 else "")
    return text.replace("|", "\\|").replace("\n", " ")
