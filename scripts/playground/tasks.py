"""The playground's tasks: what each of them asks of a picture, and how its pictures are composed.

caption, category: an emoji. vqa: a picture of easy-VQA (one coloured shape), asked for its colour
or its shape. grounding: four places of 32 px with three or four emoji, asked where one of them is.
text: a word in large letters over a pale emoji.
"""

from __future__ import annotations

import random
from collections.abc import Sequence

from cut_clients import KINDS
from PIL import Image, ImageDraw, ImageFont

SIDE, CELL, PLACES = 64, 32, 4
CAPTION_QUESTIONS = ("Describe the picture.", "What is this?")
CATEGORY_QUESTION = "What kind of thing is this?"
TEXT_QUESTION = "What is written in the picture?"
COLOURS = ("black", "blue", "brown", "gray", "green", "red", "teal", "yellow")  # easy-VQA's
SHAPES = ("circle", "rectangle", "triangle")
INKS = ("black", "navy", "darkgreen", "darkred", "indigo", "saddlebrown")
PALE = 0.25  # the share that the emoji keeps under a word; the rest is white
LETTER, LETTERS = 20, 4  # size of letters in px, of which each has 16 px; the longest word


def box(place: int) -> str:
    """Place 0..3, row by row, as LLaVA writes a box: x1, y1, x2, y2 as shares of the sides.

    >>> box(1)
    '[0.50, 0.00, 1.00, 0.50]'
    """
    left, top = place % 2 / 2, place // 2 / 2
    return "[" + ", ".join(f"{v:.2f}" for v in (left, top, left + 0.5, top + 0.5)) + "]"


def where(name: str) -> str:
    return f"Where is the {name}?"


def small(emoji: Image.Image) -> Image.Image:
    """An emoji at the size of a collage's place, 32 px."""
    return emoji.resize((CELL, CELL), Image.Resampling.LANCZOS)


def places(count: int, dice: random.Random) -> list[int]:
    """Which of the four places `count` drawings take, in the order of the drawings."""
    return dice.sample(range(PLACES), count)


def collage(drawings: Sequence[Image.Image], where_to: Sequence[int]) -> Image.Image:
    """Emoji of any size, each scaled to 32 px and put at its place, on white."""
    canvas = Image.new("RGB", (SIDE, SIDE), "white")
    for drawing, place in zip(drawings, where_to, strict=True):
        canvas.paste(small(drawing), (place % 2 * CELL, place // 2 * CELL))
    return canvas


def written(word: str, behind: Image.Image, dice: random.Random) -> Image.Image:
    """The word, dark, on a 64 px emoji that is mixed with white: a letter every 16 px, on one of
    two lines, so that a letter is about one of the tower's patches.

    (With letters of natural distances, words of five and any height, the tower had hardly begun to
    tell letters apart after 1,000 steps: 2.6 nats a letter.)
    """
    canvas = Image.blend(Image.new("RGB", (SIDE, SIDE), "white"), behind.convert("RGB"), PALE)
    draw, pitch = ImageDraw.Draw(canvas), SIDE // LETTERS
    left, middle = pitch / 2 + dice.randint(0, 1), dice.choice((24, 40)) + dice.randint(-1, 1)
    ink, font = dice.choice(INKS), ImageFont.load_default(LETTER)
    for place, letter in enumerate(word):
        draw.text((left + pitch * place, middle), letter, fill=ink, font=font, anchor="mm")
    return canvas


def shape_question(questions: Sequence[Sequence[str]], want: str, dice: random.Random):
    """One of a picture's questions with its answer, about its `colour` or its `shape`; or None.

    Args:
        questions: easy-VQA's (question, answer) pairs of one picture.
    """
    allowed = COLOURS if want == "colour" else SHAPES
    found = [(q[0].upper() + q[1:], a) for q, a in questions if a in allowed]
    return dice.choice(found) if found else None


def record(name: str, image: str, task: str, question: str, answer: str, **more: str) -> dict:
    """A LLaVA record with its `task` and `domain` (the task, if nothing else is said)."""
    return {
        "id": name,
        "image": image,
        "task": task,
        "domain": task,
        **more,
        "conversations": [
            {"from": "human", "value": f"<image>\n{question}"},
            {"from": "gpt", "value": answer},
        ],
    }


def emoji_record(emoji: dict, task: str, dice: random.Random) -> dict:
    """A question about one emoji, given its record in `playground/data/emoji`."""
    if task == "category":
        question, answer = CATEGORY_QUESTION, KINDS[emoji["topic"]]
    else:
        question, answer = dice.choice(CAPTION_QUESTIONS), emoji["conversations"][1]["value"]
    return record(f"{task}-{emoji['id']}", f"emoji/{emoji['image']}", task, question, answer)
