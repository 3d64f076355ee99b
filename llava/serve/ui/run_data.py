"""The records of a run or of a merge, read for plots; only the JSON files of `fed` are opened."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable
from datetime import datetime
from pathlib import Path
from typing import Any

from llava.serve.ui.worker_client import PageError
from llava.texts import half_character

Rows = list[dict[str, Any]]

RECORDS = ("rounds.jsonl", "merge.json")
SITES = "fed/sites.json"


def stamp(folder: str | Path) -> tuple:
    """Another value once the folder's records have changed, or its sites are known."""
    sites = (Path(folder) / SITES).exists()
    return (str(folder), *(_stamp(folder, name) for name in RECORDS), sites)


def sites_stamp(folder: str | Path) -> tuple:
    """Another value once what is known of the run's sites has changed."""
    return (str(folder), _stamp(folder, SITES))


def _stamp(folder: str | Path, name: str) -> tuple[int, int] | None:
    try:
        status = (Path(folder) / name).stat()
    except OSError:
        return None
    return status.st_mtime_ns, status.st_size


def read(folder: str | Path) -> tuple[list[dict], dict | None]:
    """The finished rounds of a run, and the facts of a merge.

    Raises:
        PageError: neither is there, nor is this a run that is waiting for its sites.
    """
    folder = Path(folder)
    rounds, merge = (_text(folder / name) for name in RECORDS)
    if rounds is None and merge is None and not (folder / SITES).exists():
        raise PageError(
            f"{folder} has neither rounds.jsonl nor merge.json: it is no run and no merge, "
            "or no round is finished yet."
        )
    try:
        *lines, last = (rounds or "").split("\n")  # `last` is empty, or still being written
        return [json.loads(line) for line in lines if line], json.loads(merge) if merge else None
    except ValueError as error:
        raise PageError(f"The records in {folder} are not JSON ({error}).") from None


def sites(folder: str | Path) -> tuple[Rows, datetime] | None:
    """The sites of a run with --fed_driver remote, and when a change was last written.

    None of another run. A row has the texts site, state and since, and of a site at work what is
    known of asked (a text), step, steps and loss.

    Raises:
        PageError: the file is not as `fed` writes it, or only a part of it is there.
    """
    path = Path(folder) / SITES
    text = _text(path)
    if text is None:
        return None
    try:
        written = datetime.fromtimestamp(int(path.stat().st_mtime))
        known = json.loads(text)
        if half_character(known):
            raise ValueError
        return [_site(name, row) for name, row in known.items()], written
    except (OSError, ValueError, RecursionError, KeyError, TypeError, AttributeError):
        raise PageError(f"{path} is not as `fed` writes it.") from None


def _site(name: str, row: dict[str, Any]) -> dict[str, Any]:
    texts = {key: row[key] for key in ("state", "since")}
    if isinstance(row.get("asked"), str):
        texts["asked"] = row["asked"]
    if not all(isinstance(text, str) for text in texts.values()):
        raise ValueError
    numbers = {key: row[key] for key in ("step", "steps", "loss") if _number(row.get(key))}
    return {"site": name, **texts, **numbers}


def _text(path: Path) -> str | None:
    try:
        return path.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return None


def client_losses(rounds: list[dict]) -> Rows:
    """Training loss of each client in each round."""
    return [
        {"round": record["round"], "loss": client["loss"], "of": name}
        for record in rounds
        for name, client in record["clients"].items()
        if _number(client.get("loss"))
    ]


def heldout_losses(rounds: list[dict]) -> Rows:
    """Held-out loss of each model on each set in each round."""
    return _heldout(rounds, "loss", "loss")


def explained_shares(rounds: list[dict]) -> Rows:
    """The share of the held-out captions that the pictures explain, where it was measured."""
    return _heldout(rounds, "explained", "explained share")


def _heldout(rounds: list[dict], key: str, column: str) -> Rows:
    return [
        {"round": record["round"], column: measures[key], "of": f"{model} on {name}"}
        for record in rounds
        for model, sets in record["heldout"].items()
        for name, measures in sets.items()
        if _number(measures.get(key))
    ]


def reliabilities(rounds: list[dict]) -> Rows:
    """What each client's pictures explain of its captions, where clients are weighed by it."""
    return [
        {"round": record["round"], "reliability": share, "of": name}
        for record in rounds
        for name, share in record.get("reliability", {}).items()
    ]


def agreements(rounds: list[dict]) -> Rows:
    """Agreement of each client with the others in each round.

    It is the mean cosine of its update with theirs. If `compared_with_mean`, it is the cosine with
    the mean update, and of no round that lacks it, for the two do not belong on one scale.
    """
    found = _with_mean if compared_with_mean(rounds) else _with_others
    return [
        {"round": record["round"], "cosine": cosine, "of": name}
        for record in rounds
        for name, cosine in zip(record["clients"], found(record), strict=True)
        if _number(cosine)
    ]


def compared_with_mean(rounds: list[dict]) -> bool:
    """Whether a round has so many clients that they were not compared in pairs."""
    return any("to_mean" in record for record in rounds)


def _with_mean(record: dict) -> list[float | None]:
    return record.get("to_mean", [None] * len(record["clients"]))


def _with_others(record: dict) -> list[float | None]:
    if record["cosines"] is None:  # of secure sums nobody's update is known
        return [None] * len(record["clients"])
    rows = [
        [c for j, c in enumerate(row) if j != i and _number(c)]
        for i, row in enumerate(record["cosines"])
    ]
    return [sum(row) / len(row) if row else None for row in rows]


def spectrum(rounds: list[dict]) -> Rows:
    """Shares of the energy in the leading directions of each layer's shared space, last round."""
    layers = rounds[-1]["facts"].get("layers", {}) if rounds else {}
    return [
        {"direction": i, "share": share, "of": short}
        for short, facts in zip(_short(layers), layers.values(), strict=True)
        for i, share in enumerate(facts.get("spectrum", ()), 1)
    ]


def layer_weights(merge: dict) -> Rows:
    """Each expert's weight in each layer; the given weights where the method has no others."""
    given = [expert["weight"] for expert in merge["experts"]]
    said = merge["method_facts"].get("layers", {})
    rows = []
    for short, layer in zip(_short(merge["layers"]), merge["layers"], strict=True):
        facts = said.get(layer)
        alpha = facts.get("alpha") if isinstance(facts, dict) else None
        weights = alpha or [weight / sum(given) for weight in given]
        rows += [
            {"layer": short, "weight": weight, "of": name}
            for name, weight in zip(experts(merge), weights, strict=True)
        ]
    return rows


def layer_agreements(merge: dict) -> Rows:
    """The share of what the experts learnt that is common, by layer."""
    return [
        {"layer": short, "share": facts["kappa"], "of": "all experts"}
        for short, facts in zip(_short(merge["layers"]), merge["layers"].values(), strict=True)
        if _number(facts["kappa"])
    ]


def experts(merge: dict) -> list[str]:
    """Names of the experts, as short as tells them apart."""
    paths = [Path(expert["path"]).parts for expert in merge["experts"]]
    for length in range(1, max(map(len, paths)) + 1):
        names = ["/".join(parts[-length:]) for parts in paths]
        if len(set(names)) == len(names):
            return names
    return [f"{i} {name}" for i, name in enumerate(names, 1)]


def _short(layers: Iterable[str]) -> list[str]:
    """Names of layers without the parts in front that all have."""
    parts = [layer.split(".") for layer in layers]
    while len(parts) > 1 and all(len(p) > 1 and p[0] == parts[0][0] for p in parts):
        parts = [p[1:] for p in parts]
    return [f"layer {p[0]}" if p[0].isdigit() else ".".join(p) for p in parts]


def _number(value: Any) -> bool:
    return isinstance(value, int | float) and math.isfinite(value)
