"""Cut the playground's tasks: what is public, and what each client and each held-out part holds.

Half of the seen concepts, of the words and of easy-VQA's pictures are public: from them the frozen
parts learn the tasks. Clients and held-out pictures are private. Two scenarios, `a` and `b`, of
three tasks with three clients each, every client with 160 samples that no other has. The emoji of
a scenario are 340 private concepts; its clients hold them as three vendors draw them and its
held-out pictures as the fourth does (of a third of the concepts for development). Words are the
same for clients and held-out pictures, on other emoji. `unpack_data.py` calls `cut`.
"""

from __future__ import annotations

import json
import random
import re
import shutil
from dataclasses import dataclass
from pathlib import Path

from PIL import Image

from llava.pictures import open_image
from playground.tools import tasks
from playground.tools.cut_clients import SEED, _write

SCENARIOS = {"a": ("caption", "vqa", "grounding"), "b": ("category", "text", "caption")}
CLIENTS, SAMPLES = 3, 160  # of each task; of each client
HELD_OUT = {"dev": 100, "test": 100}  # samples of each task
POOL = 340  # concepts of a scenario
DEV_SHARE = 1 / 3
PUBLIC = 1500  # records of public.json
PRIVATE_WORDS = 60


@dataclass
class Division:
    """Emoji records by concept, in the order of the seed, and words: public and private."""

    public: list[list[dict]]  # of a concept: its pictures that clients may hold
    private: list[list[dict]]
    held: dict[str, dict]  # of every concept: the picture that no client holds
    public_words: list[str]
    private_words: list[str]


def concept(record: dict) -> str:
    """The code of what an emoji record shows, whoever drew it."""
    return record["id"].split("-", 1)[1]


def divide(emoji: Path) -> Division:
    """Who may know what, by SEED; `emoji` is the unpacked `playground/data/emoji`.

    Words are those of 3 or 4 letters in the names of all seen concepts.
    """

    def read(*patterns: str) -> list[dict]:
        files = [file for p in patterns for file in sorted(emoji.glob(p))]
        return [record for file in files for record in json.loads(file.read_text())]

    drawn: dict[str, list[dict]] = {}
    for record in sorted(read("clients/topic/*.json"), key=lambda r: r["id"]):
        drawn.setdefault(concept(record), []).append(record)
    held = {concept(r): r for r in read("heldout_dev.json", "heldout_test.json")}
    names = [rows[0]["conversations"][1]["value"] for rows in drawn.values()]
    words = sorted({w for name in names for w in name.split() if re.fullmatch("[a-z]{3,4}", w)})
    order = [drawn[code] for code in sorted(drawn)]
    random.Random(f"{SEED} concepts").shuffle(order)
    random.Random(f"{SEED} words").shuffle(words)
    half = len(order) // 2
    return Division(order[:half], order[half:], held, words[PRIVATE_WORDS:], words[:PRIVATE_WORDS])


class Cutter:
    """Makes the samples of one scenario and writes their pictures into `images/` of `folder`."""

    def __init__(self, folder: Path, emoji: Path, scenario: str, known: Division) -> None:
        self.folder, self.emoji, self.scenario = folder, emoji, scenario
        self.words = known.private_words
        self.dice = random.Random(f"{SEED} {scenario}")
        start = POOL * sorted(SCENARIOS).index(scenario)
        pool = known.private[start : start + POOL]
        held = [known.held[concept(rows[0])] for rows in pool]
        cut = round(DEV_SHARE * POOL)
        self.drawings = {  # whose pictures a part takes
            "clients": [record for rows in pool for record in rows],
            "dev": held[:cut],
            "test": held[cut:],
        }
        asked = json.loads((folder / "questions/private.json").read_text())
        order = sorted(asked, key=int)
        random.Random(f"{SEED} vqa").shuffle(order)
        self.shapes = [(number, asked[number]) for number in order]
        silent = [number for number in order if not asked[number]]  # no task asks about these
        self.grounds = {part: silent[i::3] for i, part in enumerate(self.drawings)}
        self.left = {part: self._shuffled(rows) for part, rows in self.drawings.items()}

    def samples(self, task: str, part: str, count: int) -> list[dict]:
        """`count` samples of a task for a part: `clients`, `dev` or `test`."""
        make = {"vqa": self._vqa, "grounding": self._grounding, "text": self._text}
        if task in make:
            return [make[task](part, number) for number in range(count)]
        source = self.left[part]
        if part == "clients":  # a picture goes to one task only; the held-out ones are too few
            self.left[part] = source[count:]
        chosen = [tasks.emoji_record(r, task, self.dice) for r in source[:count]]
        for record in chosen:
            _copy(self.folder, self.emoji, record)
        return chosen

    def _shuffled(self, rows: list[dict]) -> list[dict]:
        return self.dice.sample(rows, len(rows))

    def _open(self, record: dict) -> Image.Image:
        return open_image(self.emoji / "images" / record["image"])

    def _save(self, picture: Image.Image, name: str) -> str:
        target = self.folder / "images" / name
        target.parent.mkdir(parents=True, exist_ok=True)
        picture.save(target)
        return name

    def _vqa(self, part: str, number: int) -> dict:
        want = ("colour", "shape")[number % 2]
        for place, (picture, questions) in enumerate(self.shapes):
            found = tasks.shape_question(questions, want, self.dice)
            if found:
                del self.shapes[place]
                image = f"shapes/private/{picture}.webp"
                return tasks.record(f"vqa-{picture}", image, "vqa", *found, domain=f"vqa {want}")
        raise ValueError("easy_vqa.tar.xz: too few private pictures for the scenario's clients")

    def _grounding(self, part: str, number: int) -> dict:
        shows, place = self.dice.choice(self.drawings[part]), self.dice.randrange(tasks.PLACES)
        ground = self.folder / f"images/shapes/private/{self.dice.choice(self.grounds[part])}.webp"
        name = f"collage/{self.scenario}-{part}-{number}"
        collage = tasks.collage(self._open(shows), open_image(ground), place)
        image = self._save(collage, f"{name}.png")
        question = tasks.where(shows["conversations"][1]["value"])
        more = {"shows": shows["image"]}
        return tasks.record(name, image, "grounding", question, tasks.box(place), **more)

    def _text(self, part: str, number: int) -> dict:
        word = self.words[number % len(self.words)]
        behind = self._open(self.dice.choice(self.drawings[part]))
        name = f"word/{self.scenario}-{part}-{number}"
        image = self._save(tasks.written(word, behind, self.dice), f"{name}.png")
        return tasks.record(name, image, "text", tasks.TEXT_QUESTION, word)


def cut(folder: Path, emoji: Path) -> None:
    """Fill `folder`, which holds the unpacked easy_vqa.tar.xz, with pictures, clients and parts.

    Args:
        emoji: the unpacked `playground/data/emoji`.
    """
    known = divide(emoji)
    for scenario, names in SCENARIOS.items():
        cutter = Cutter(folder, emoji, scenario, known)
        for task in names:
            samples = cutter.samples(task, "clients", CLIENTS * SAMPLES)
            cutter.dice.shuffle(samples)
            for client in range(CLIENTS):
                own = samples[client::CLIENTS]
                _write(folder / f"clients/{scenario}/{task}-{client + 1}.json", own)
        for part, count in HELD_OUT.items():
            rows = [r for task in names for r in cutter.samples(task, part, count)]
            _write(folder / f"heldout_{part}_{scenario}.json", rows)
    dice = random.Random(f"{SEED} public")
    plain = dice.sample([record for rows in known.public for record in rows], PUBLIC)
    captions = [tasks.emoji_record(record, "caption", dice) for record in plain]
    for record in captions:
        _copy(folder, emoji, record)
    _write(folder / "public.json", captions)


def _copy(folder: Path, emoji: Path, record: dict) -> None:
    """A task's emoji picture, from the folder of the emoji."""
    target = folder / "images" / record["image"]
    target.parent.mkdir(parents=True, exist_ok=True)
    shutil.copyfile(emoji / "images" / record["image"].removeprefix("emoji/"), target)
