"""Endless public material for the playground's tasks, composed while the frozen parts train.

What is public says `cut_tasks.py`. Pictures are uint8 tensors (N, 3, 64, 64).
"""

from __future__ import annotations

import random
import string
from collections.abc import Sequence

import torch
from PIL import Image

from playground.tools import tasks
from playground.tools.captioner import pictures, pixels
from playground.tools.cut_tasks import Division
from playground.tools.unpack_data import TASKS


class Drawings:
    """Emoji at both sizes: `rows` are their records, `images` (N, 3, 64, 64), `cells` 32 px."""

    def __init__(self, rows: list[dict]) -> None:
        self.rows, self.images = rows, pictures(rows)
        whole = self.images.permute(0, 2, 3, 1).numpy()
        self.opened = [Image.fromarray(image) for image in whole]
        self.cells = pixels([tasks.small(image) for image in self.opened])

    def collages(self, shown: Sequence[int], grounds: torch.Tensor) -> tuple[torch.Tensor, list]:
        """Each drawing in small on its ground; pictures, and the place 0..8 of each drawing."""
        canvas, places = grounds.clone(), random.choices(range(tasks.PLACES), k=len(shown))
        for image, drawing, place in zip(canvas, shown, places, strict=True):
            left, top = tasks.corner(place)
            image[:, top : top + tasks.CELL, left : left + tasks.CELL] = self.cells[drawing]
        return canvas, places

    def written(self, words: list[str]) -> torch.Tensor:
        """Each word over some drawing."""
        behind = random.choices(self.opened, k=len(words))
        drawn = zip(words, behind, strict=True)
        return pixels([tasks.written(w, b, random.Random(random.random())) for w, b in drawn])


def spell(known: Division) -> str:
    """A public word, or as often three or four letters at random: it is letters that count."""
    if random.random() < 0.5:
        return random.choice(known.public_words)
    while True:
        word = "".join(random.choices(string.ascii_lowercase, k=random.choice((3, 4))))
        if word not in known.private_words:
            return word


def letters(words: list[str]) -> torch.Tensor:
    """(N, 4): 0..25, or 26 behind a word's end."""
    codes = [[ord(c) - ord("a") for c in word] for word in words]
    return torch.tensor([row + [26] * (tasks.LETTERS - len(row)) for row in codes])


class Shapes:
    """easy-VQA's public pictures, their questions, `colours` and `shapes` (N,), -1: unknown."""

    def __init__(self, asked: dict[str, list]) -> None:
        asked = {number: pairs for number, pairs in asked.items() if pairs}
        self.asked = list(asked.values())
        self.images = pictures([{"image": f"shapes/public/{n}.webp"} for n in asked], TASKS)

        def read(among: tuple[str, ...]) -> torch.Tensor:
            said = [[among.index(a) for _, a in pairs if a in among] for pairs in self.asked]
            return torch.tensor([row[0] if row else -1 for row in said])

        self.colours, self.shapes = read(tasks.COLOURS), read(tasks.SHAPES)

    def turned(self, chosen: torch.Tensor) -> torch.Tensor:
        """These pictures, turned and mirrored: what is said of them stays true."""
        images = torch.rot90(self.images[chosen], random.randrange(4), (2, 3))
        return images.flip(3) if random.random() < 0.5 else images

    def question(self, place: int) -> tuple[str, str]:
        """A question about picture `place` and its answer."""
        wants = ["colour", "shape"]
        random.shuffle(wants)
        found = [tasks.shape_question(self.asked[place], w, random.Random(0)) for w in wants]
        return next(f for f in found if f)
