"""What a private run states: privacy.json and the model card, beside its checkpoint.

`OUTPUT/privacy.json` holds the guarantee with all that it follows from, and is written before
anything trains; `OUTPUT/README.md`, the model card, says the same at the end. Both have the
assumptions.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llava.atomic import write_text
from llava.errors import InputError
from llava.json_files import read_json

if TYPE_CHECKING:
    from llava.train.private_accounting import Guarantee

FILE = "privacy.json"
CARD = "README.md"

ASSUMPTIONS = (
    "A record is one entry of a data file: a conversation with at most one picture. Of somebody "
    "who stands in several entries, each by itself is protected; all of them together are less.",
    "Neighbouring data sets differ in one record, which in one of them gives nothing (zero-out "
    "adjacency); `replaced` is epsilon where another record stands in its place.",
    "Batches are fixed: their sizes, and which places of the list share a step, follow from the "
    "seed and the number of records alone. That number is public. No amplification by sampling is "
    "claimed.",
    "Each sample's gradient, of the mean loss over its own labelled tokens, is clipped to a length "
    "of `clip` over all tensors that train; each step's sum gets Gaussian noise of `noise` times "
    "`clip` once, and is divided by a fixed number.",
    "The noise is drawn from a secret of 256 bits by AES-256 and holds against who cannot break "
    "that; sums are floating-point numbers, taken for real ones.",
    "Covered is what follows from the noised steps: the weights that were trained, and what is "
    "sent of them. Not covered: losses in logs and in trainer_state.json, fingerprints of the data "
    "in run.json and below fed/, how long training takes, that records which cannot be read were "
    "left out, earlier runs on the same records, and what was learnt of them before (base model, "
    "tower, a projector to start from).",
)


SHARES = (
    "Noise in shares: each client adds what makes up `noise` in a sum over `shares` of them, which "
    "is the least that the server may get. Single updates stay with their clients. If one of them "
    "tells the server what it has added, epsilon is `betrayed` for the others."
)


def assumptions(stated: Iterable[Guarantee | Mapping[str, Any]]) -> list[str]:
    """All that guarantees rest on."""
    values = [of if isinstance(of, Mapping) else of.as_json() for of in stated]
    return [*ASSUMPTIONS, *([SHARES] if any(of.get("shares", 1) > 1 for of in values) else [])]


def finished(output: Path) -> bool:
    """Whether `output` holds a private run that has come to its end."""
    file = output / FILE
    return file.is_file() and bool(read_json(file).get("finished"))


def guarantees_in(folder: Path) -> dict[str, dict[str, Any]]:
    """The guarantees in the `privacy.json` of a run's folder, by client; empty without one."""
    file = folder / FILE
    if not file.is_file():
        return {}
    found = read_json(file).get("guarantees")
    if not isinstance(found, dict) or not all(isinstance(of, dict) for of in found.values()):
        raise InputError(f"{file}: guarantees by client are expected")
    return found


def write(output: Path, stated: Mapping[str, Guarantee], finished: bool = False) -> None:
    """`privacy.json`, by client."""
    values = {
        "finished": finished,
        "guarantees": {name: of.as_json() for name, of in stated.items()},
        "assumptions": assumptions(stated.values()),
    }
    write_text(output / FILE, json.dumps(values, indent=1) + "\n")


def sentence(who: str, stated: Guarantee) -> str:
    """The guarantee on one line."""
    often = "one step" if stated.entries == 1 else f"{stated.entries} steps"
    shares = ""
    if stated.shares > 1:
        shares = (
            f"; noise in shares, of {stated.shares} clients together: epsilon "
            f"{rounded_up(stated.betrayed)} if one of them tells its own"
        )
    return (
        f"{who} is private: epsilon {rounded_up(stated.epsilon)} at delta {stated.delta:g} for a "
        f"record of {stated.records}, which enters {often} (noise {stated.noise:.4g}, clip "
        f"{stated.clip:g}, no amplification by sampling; epsilon {rounded_up(stated.replaced)} if "
        f"it is replaced{shares})"
    )


def section(stated: Mapping[str, Guarantee | Mapping[str, Any]]) -> str:
    """The guarantees as a table, and their assumptions, in Markdown."""
    lines = [
        "| | epsilon | delta | replaced | records | steps a record | noise | clip | samples a step "
        "|",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for name, of in stated.items():
        values = of if isinstance(of, Mapping) else of.as_json()
        lines.append(
            f"| {name} | {rounded_up(values['epsilon'])} | {values['delta']:g} "
            f"| {rounded_up(values['replaced'])} | {values['records']} | {values['entries']} "
            f"| {values['noise']:.4g} | {values['clip']:g} | {values['step']} |"
        )
    return "\n".join([*lines, "", *(f"- {text}" for text in assumptions(stated.values()))])


def card(title: str, stated: Mapping[str, Guarantee]) -> str:
    """The model card."""
    return (
        "---\nlibrary_name: llava\npipeline_tag: image-text-to-text\n"
        f"tags: [llava, differential-privacy]\n---\n\n# {title}\n\n"
        "## Differential privacy of a record\n\n"
        f"{section(stated)}\n"
    )


def rounded_up(epsilon: float | None) -> str:
    """To three places, never less than it is; None is one above 500."""
    return "above 500" if epsilon is None else f"{math.ceil(epsilon * 1000 - 1e-6) / 1000:g}"
