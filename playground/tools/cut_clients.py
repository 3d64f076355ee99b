"""Cut the playground's private pictures into clients in further ways.

By caption source: four clients, each with a random quarter of the pictures, which it describes in
its own way. By skew: twelve clients, Dirichlet over topic × style, of very unequal sizes, once for
choosing settings (`skew-dev`) and once for reporting (`skew`). Mixed: four clients, each with half
of the topics in half of the styles. Common: a random tenth of all pictures, for a brief alignment
that several parties begin with. Noisy and crawl: the clients by topic with wrong captions: three
of the eight have all of theirs shuffled, or each has a share of 0 to 60 % of them shuffled, once
for choosing settings (`-dev`) and once for reporting. Brief: every fourth picture of the clients by
topic. Sentences: these pictures, asked about and answered in sentences. `unpack_data.py` calls
`cut`.
"""

from __future__ import annotations

import json
import random
from pathlib import Path

from fed.data.dirichlet import dirichlet

SEED = 2024
SKEW = {"skew-dev": 1, "skew": 2}  # the seeds of the two Dirichlet cuts
NOISE = {"-dev": 1, "": 4}  # the seeds of the cuts with wrong captions, by the end of their name
NOISY_CLIENTS = 3
CRAWL = (0.0, 0.6)  # the least and the greatest share of wrong captions
SKEW_CLIENTS, ALPHA, SIZE_ALPHA, SMALLEST = 12, 0.3, 1.0, 16
KINDS = {  # as the language model learnt to say them
    "smileys": "a smiley or an emotion",
    "people": "a person or a part of the body",
    "animals": "an animal or a plant",
    "food": "food or drink",
    "travel": "a place or a vehicle",
    "activities": "an activity",
    "objects": "an object",
    "symbols": "a symbol",
}
LIFE = ("animals", "food", "people", "smileys")
HALVES = {"google": "gt", "twitter": "gt", "openmoji": "of", "fluent": "of"}  # of the styles
SOURCES = ("name", "keyword", "short", "kind")
ASKED = ("What is this?", "What is shown in the picture?", "Describe the picture.")
SAID = ("This is {}.", "The picture shows {}.")


def caption(source: str, name: str, topic: str, keywords: list[str], words: set[str]) -> str:
    """A picture's caption as one source gives it.

    By keyword: the first one that the playground's language model has the words of, which are those
    of all names; where there is none, the name.

    >>> known = {"light", "oil", "lamp"}
    >>> [caption(s, "diya lamp", "objects", ["clay light", "oil"], known) for s in SOURCES]
    ['diya lamp', 'oil', 'lamp', 'an object']
    """
    if source == "keyword":
        return next((k for k in keywords if set(k.split()) <= words), name)
    if source == "short":
        return name.split()[-1]
    return KINDS[topic] if source == "kind" else name


def cut(folder: Path, keywords: dict[str, list[str]]) -> None:
    """Write `clients/CUT/*.json`, CUT one of caption, mixed, common, skew, skew-dev, noisy,
    noisy-dev, crawl, crawl-dev, sentences and brief, and held-out pictures for them.

    `heldout_{dev,test}_caption.json` are described as the sources do, and the pictures of
    `heldout_{dev,test}_mixed.json` name the client of `mixed` whose domain they are of.

    Args:
        folder: the unpacked playground.
        keywords: `playground/data/captions.json`: of every concept.
    """
    topics = {
        file.stem: json.loads(file.read_text())
        for file in sorted((folder / "clients/topic").glob("*.json"))
    }
    private = [record for records in topics.values() for record in records]
    words = {word for record in private for word in record["conversations"][1]["value"].split()}
    order = private[:]
    random.Random(f"{SEED} caption").shuffle(order)
    for i, source in enumerate(SOURCES):
        records = [
            _described(record, source, keywords, words) for record in order[i :: len(SOURCES)]
        ]
        _write(folder / f"clients/caption/{source}.json", records)
    for part in ("dev", "test"):
        heldout = json.loads((folder / f"heldout_{part}.json").read_text())
        random.Random(f"{SEED} caption {part}").shuffle(heldout)
        # Half of the pictures by name, the others as the other sources describe them, in turns.
        records = [
            _described(record, "name" if i % 2 == 0 else SOURCES[1 + i // 2 % 3], keywords, words)
            for i, record in enumerate(heldout)
        ]
        _write(folder / f"heldout_{part}_caption.json", records)
        mixed = [{**record, "mixed": mixed_client(record)} for record in heldout]
        _write(folder / f"heldout_{part}_mixed.json", mixed)
        _write(folder / f"heldout_{part}_sentences.json", in_sentences(heldout))
    for client in sorted({mixed_client(record) for record in private}):
        own = [record for record in private if mixed_client(record) == client]
        _write(folder / f"clients/mixed/{client}.json", own)
    random.Random(f"{SEED} common").shuffle(order)
    _write(folder / "clients/common/common.json", order[: len(order) // 10])
    keys = [(record["topic"], record["style"]) for record in private]
    for name, seed in SKEW.items():
        shards = dirichlet(
            keys, SKEW_CLIENTS, alpha=ALPHA, size_alpha=SIZE_ALPHA, minimum=SMALLEST, seed=seed
        )
        for i, shard in enumerate(shards):
            _write(folder / f"clients/{name}/{i + 1:02d}.json", [private[j] for j in shard])
    for name, records in topics.items():
        _write(folder / f"clients/sentences/{name}.json", in_sentences(records[::4]))
        _write(folder / f"clients/brief/{name}.json", records[::4])
    for end, seed in NOISE.items():
        for cut_name, share_of in (("noisy", noisy_shares), ("crawl", crawl_shares)):
            for name, share in share_of(sorted(topics), seed).items():
                records = with_wrong_captions(topics[name], share, f"{seed} {cut_name} {name}")
                _write(folder / f"clients/{cut_name}{end}/{name}.json", records)


def with_article(name: str) -> str:
    """A name as a sentence has it: by its ending and its first letter, so not always right.

    >>> [with_article(n) for n in ("red apple", "owl", "glasses", "glass")]
    ['a red apple', 'an owl', 'glasses', 'a glass']
    """
    if name.endswith("s") and not name.endswith("ss"):
        return name
    return ("an " if name[0] in "aeiou" else "a ") + name


def in_sentences(records: list[dict]) -> list[dict]:
    """The records with two questions each, what is shown and of what kind it is."""
    result = []
    for i, record in enumerate(records):
        name = with_article(record["conversations"][1]["value"])
        talk = [
            ("human", "<image>\n" + ASKED[i % len(ASKED)]),
            ("gpt", SAID[i // len(ASKED) % len(SAID)].format(name)),
            ("human", "What kind of thing is it?"),
            ("gpt", f"It is {KINDS[record['topic']]}."),
        ]
        turns = [{"from": who, "value": text} for who, text in talk]
        result.append({**record, "conversations": turns})
    return result


def noisy_shares(clients: list[str], seed: int) -> dict[str, float]:
    """The share of wrong captions of each client: all of them at three, none at the others."""
    wrong = random.Random(f"{SEED} noisy {seed}").sample(clients, NOISY_CLIENTS)
    return {client: float(client in wrong) for client in clients}


def crawl_shares(clients: list[str], seed: int) -> dict[str, float]:
    """The share of wrong captions of each client: evenly between 0 and 60 %, in random order."""
    least, greatest = CRAWL
    shares = [least + (greatest - least) * i / (len(clients) - 1) for i in range(len(clients))]
    random.Random(f"{SEED} crawl {seed}").shuffle(shares)
    return dict(zip(clients, shares, strict=True))


def with_wrong_captions(records: list[dict], share: float, seed: str) -> list[dict]:
    """The records, in order, of which a random share have exchanged their captions.

    These have `wrong` true, and none of them its own name. No name may be that of half of them.
    """
    draw = random.Random(f"{SEED} {seed}")
    chosen = draw.sample(range(len(records)), round(share * len(records)))
    own = [records[i]["conversations"][1]["value"] for i in chosen]
    told = draw.sample(own, len(own))
    while same := [at for at, name in enumerate(own) if told[at] == name]:
        for at in same:
            other = draw.randrange(len(told))
            told[at], told[other] = told[other], told[at]
    result = list(records)
    for i, name in zip(chosen, told, strict=True):
        question, answer = records[i]["conversations"]
        talk = [question, {**answer, "value": name}]
        result[i] = {**records[i], "wrong": True, "conversations": talk}
    return result


def mixed_client(record: dict) -> str:
    """`life-gt`, `life-of`, `things-gt` or `things-of`: topics, then initials of the styles."""
    return ("life-" if record["topic"] in LIFE else "things-") + HALVES[record["style"]]


def _described(record: dict, source: str, keywords: dict[str, list[str]], words: set[str]) -> dict:
    question, answer = record["conversations"]
    own = keywords[record["id"].split("-", 1)[1]]
    text = caption(source, answer["value"], record["topic"], own, words)
    return {**record, "source": source, "conversations": [question, {**answer, "value": text}]}


def _write(path: Path, records: list[dict]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("[\n" + ",\n".join(map(json.dumps, records)) + "\n]\n")
