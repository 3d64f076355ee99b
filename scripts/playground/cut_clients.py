"""Cut the playground's private pictures into clients in two further ways.

By caption source: four clients, each with a random quarter of the pictures, which it describes in
its own way. By skew: twelve clients, Dirichlet over topic × style, of very unequal sizes, once for
choosing settings (`skew-dev`) and once for reporting (`skew`). `unpack_data.py` calls `cut`.
"""

from __future__ import annotations

import json
import random
from pathlib import Path

from fed.partition import dirichlet

SEED = 2024
SKEW = {"skew-dev": 1, "skew": 2}  # the seeds of the two Dirichlet cuts
SKEW_CLIENTS, ALPHA, SIZE_ALPHA, SMALLEST = 12, 0.3, 1.0, 16
TOPICS = {
    "smileys": "smileys and emotion",
    "people": "people and body",
    "animals": "animals and nature",
    "food": "food and drink",
    "travel": "travel and places",
    "activities": "activities",
    "objects": "objects",
    "symbols": "symbols",
}
SOURCES = ("name", "keywords", "sentence", "french")


def caption(source: str, name: str, topic: str, said: dict) -> str:
    """A picture's caption as one source gives it.

    >>> said = {"keywords": ["light", "oil"], "fr": "diya"}
    >>> [caption(s, "diya lamp", "objects", said) for s in SOURCES]
    ['diya lamp', 'diya lamp, light, oil', 'among objects: diya lamp', 'diya']
    """
    if source == "keywords":
        return ", ".join([name, *said["keywords"]])
    if source == "sentence":
        return f"among {TOPICS[topic]}: {name}"
    return said["fr"] if source == "french" else name


def cut(folder: Path, captions: dict[str, dict]) -> None:
    """Write `clients/{caption,skew-dev,skew}/*.json` and `heldout_{dev,test}_caption.json`.

    Args:
        folder: the unpacked playground.
        captions: `playground/data/captions.json`: concept → its keywords and its French name.
    """
    private = []
    for file in sorted((folder / "clients/topic").glob("*.json")):
        private += json.loads(file.read_text())
    order = private[:]
    random.Random(f"{SEED} caption").shuffle(order)
    for i, source in enumerate(SOURCES):
        records = [_described(record, source, captions) for record in order[i :: len(SOURCES)]]
        _write(folder / f"clients/caption/{source}.json", records)
    for part in ("dev", "test"):
        heldout = json.loads((folder / f"heldout_{part}.json").read_text())
        random.Random(f"{SEED} caption {part}").shuffle(heldout)
        # Half of the pictures by name, the others as the other sources describe them, in turns.
        records = [
            _described(record, "name" if i % 2 == 0 else SOURCES[1 + i // 2 % 3], captions)
            for i, record in enumerate(heldout)
        ]
        _write(folder / f"heldout_{part}_caption.json", records)
    keys = [(record["topic"], record["style"]) for record in private]
    for name, seed in SKEW.items():
        shards = dirichlet(
            keys, SKEW_CLIENTS, alpha=ALPHA, size_alpha=SIZE_ALPHA, minimum=SMALLEST, seed=seed
        )
        for i, shard in enumerate(shards):
            _write(folder / f"clients/{name}/{i + 1:02d}.json", [private[j] for j in shard])


def _described(record: dict, source: str, captions: dict[str, dict]) -> dict:
    question, answer = record["conversations"]
    said = captions[record["id"].split("-", 1)[1]]
    text = caption(source, answer["value"], record["topic"], said)
    turns = [question, {**answer, "value": text}]
    return {**record, "source": source, "conversations": turns}


def _write(path: Path, records: list[dict]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("[\n" + ",\n".join(map(json.dumps, records)) + "\n]\n")
