"""The records of a run or of a merge, read for plots; only the JSON files of `fed` are opened."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from llava.serve.ui.worker_client import PageError

Rows = list[dict[str, Any]]


def stamp(folder: str | Path) -> tuple:
    """Another value once the folder's records have changed."""
    found: list[tuple[int, int] | None] = []
    for name in ("rounds.jsonl", "merge.json"):
        try:
            status = (Path(folder) / name).stat()
            found.append((status.st_mtime_ns, status.st_size))
        except OSError:
            found.append(None)
    return (str(folder), *found)


def read(folder: str | Path) -> tuple[list[dict], dict | None]:
    """The finished rounds of a run, and the facts of a merge; `PageError` if neither is there."""
    folder = Path(folder)
    rounds, merge = _text(folder / "rounds.jsonl"), _text(folder / "merge.json")
    if rounds is None and merge is None:
        raise PageError(
            f"{folder} has neither rounds.jsonl nor merge.json: it is no run and no merge, "
            "or no round is finished yet."
        )
    try:
        *lines, last = (rounds or "").split("\n")  # `last` is empty, or still being written
        return [json.loads(line) for line in lines if line], json.loads(merge) if merge else None
    except ValueError as error:
        raise PageError(f"The records in {folder} are not JSON ({error}).") from None


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
    return [
        {"round": record["round"], "loss": measures["loss"], "of": f"{model} on {name}"}
        for record in rounds
        for model, sets in record["heldout"].items()
        for name, measures in sets.items()
        if _number(measures.get("loss"))
    ]


def agreements(rounds: list[dict]) -> Rows:
    """Mean cosine of each client's update with the others', in each round."""
    rows = []
    for record in rounds:
        for i, name in enumerate(record["clients"] if record["cosines"] else ()):
            others = [c for j, c in enumerate(record["cosines"][i]) if j != i and _number(c)]
            if others:
                mean = sum(others) / len(others)
                rows.append({"round": record["round"], "cosine": mean, "of": name})
    return rows


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
