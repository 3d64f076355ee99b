"""The playground's tasks: what each of them asks of a picture, and how its pictures are composed.

caption, category: an emoji. vqa: a picture of easy-VQA (one coloured shape), asked for its colour
or its shape. grounding: a small emoji on such a picture, beside or over the shape, asked where it
is. text: a word in large letters over a pale emoji.

(Grounding had three or four emoji in a picture at first. A language model this small had not begun
to look for the one that was named after 9,600 questions, nor for the shape of a named colour.)
"""

from __future__ import annotations

import random
from collections.abc import Sequence

from PIL import Image, ImageDraw, ImageFont

from playground.tools.cut_clients import KINDS

SIDE, CELL, RASTER, PLACES = 64, 32, 16, 9  # sizes in px
CAPTION_QUESTIONS = ("Describe the picture.", "What is this?")
CATEGORY_QUESTION = "What kind of thing is this?"
TEXT_QUESTION = "What is written in the picture?"
COLOURS = ("black", "blue", "brown", "gray", "green", "red", "teal", "yellow")  # easy-VQA's
SHAPES = ("circle", "rectangle", "triangle")
INKS = ("black", "navy", "darkgreen", "darkred", "indigo", "saddlebrown")
PALE = 0.25  # the share that the emoji keeps under a word; the rest is white
LETTER, LETTERS = 20, 4  # size of letters in px, of which each has 16 px; the longest word


def corner(place: int) -> tuple[int, int]:
    """Left and top, in px, of place 0..8: three columns and three rows, 16 px apart."""
    return place % 3 * RASTER, place // 3 * RASTER


def box(place: int) -> str:
    """A place as LLaVA writes a box: x1, y1, x2, y2 as shares of the sides.

    >>> box(1)
    '[0.25, 0.00, 0.75, 0.50]'
    """
    left, top = corner(place)
    return f"[{', '.join(f'{v / SIDE:.2f}' for v in (left, top, left + CELL, top + CELL))}]"


def where(name: str) -> str:
    return f"Where is the {name}?"


def small(emoji: Image.Image) -> Image.Image:
    """An emoji at the size of a place, 32 px."""
    return emoji.resize((CELL, CELL), Image.Resampling.LANCZOS)


def collage(emoji: Image.Image, ground: Image.Image, place: int) -> Image.Image:
    """An emoji, scaled to 32 px, at its place on a picture of easy-VQA with its shape."""
    canvas = ground.convert("RGB")
    canvas.paste(small(emoji), corner(place))
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
