"""Train the frozen parts that can follow instructions: playground/backbones/instruct.

    python -m playground.tools.unpack_data
    python -m playground.tools.train_instruct | tee playground/backbones/instruct/train.log

Goes on from playground/backbones/{vision_tower,llm}. First the tower alone learns to see what the
tasks ask for, by readouts that are thrown away: the concept of an emoji, the place of a small one,
the letters of a word, colour and shape. Then tower, a new projector and language model learn
together: plain captions, the five tasks of `tasks.py` in `v1` conversations, and text alone; the
projector is thrown away. Tasks are learnt from public material only (`cut_tasks.py`); captions, and
what the tower alone learns of concepts, are of all but the unseen ones, as CLIP and Vicuna know the
world. Two CPU cores, 15 to 40 minutes.
"""

from __future__ import annotations

import argparse
import json
import random
import shutil
from dataclasses import dataclass

import torch
from torch import nn
from transformers import (
    AutoTokenizer,
    CLIPVisionModel,
    DynamicCache,
    LlamaForCausalLM,
    PreTrainedTokenizerBase,
)
from transformers.utils.logging import disable_progress_bar

from playground.tools import tasks
from playground.tools.captioner import (
    BACKBONES,
    IMAGE,
    Row,
    caption_row,
    chat_row,
    embed,
    features,
    losses,
    name_of,
    new_projector,
    pad,
    records,
    score,
)
from playground.tools.check_backbones import load
from playground.tools.cut_clients import KINDS
from playground.tools.cut_tasks import concept, divide
from playground.tools.public_pictures import Drawings, Shapes, letters, spell
from playground.tools.train_backbones import (
    NAME_QUESTIONS,
    Concepts,
    Optimizer,
    Progress,
    augment,
    save,
    text_row,
)
from playground.tools.unpack_data import TARGET, TASKS

FOLDER = BACKBONES / "instruct"
READ_SHARE = 0.3  # of the readouts in the joint loss
TEXTS = 4  # rows of text alone in a joint step
Asked = dict[str, list[tuple[Row, int]]]  # of each task: rows, each with its picture's place


@dataclass
class Sizes:
    """Pictures of a step: emoji of all seen concepts, of public ones, and of the other tasks."""

    seen: int
    public: int
    collages: int
    words: int
    shapes: int


ALONE = Sizes(seen=32, public=0, collages=8, words=16, shapes=16)
JOINT = Sizes(seen=24, public=12, collages=10, words=12, shapes=10)


class Material:
    """Where steps are drawn from. `number` numbers the concepts, `labels` those of the drawings."""

    def __init__(self) -> None:
        styles = [f"clients/style/{s}" for s in ("google", "twitter", "openmoji", "fluent")]
        seen = records(*styles, "heldout_dev", "heldout_test")
        self.by_name = {name_of(r): r for r in seen + records("unseen")}
        self.names = sorted(self.by_name)
        number = {name: place for place, name in enumerate(self.names)}
        self.labels = torch.tensor([number[name_of(r)] for r in seen])
        self.known = divide(TARGET)
        self.drawings = Drawings(seen)
        codes = {concept(rows[0]) for rows in self.known.public}
        self.public = [place for place, r in enumerate(seen) if concept(r) in codes]
        self.shapes = Shapes(json.loads((TASKS / "questions/public.json").read_text()))


class Step:
    """A step's pictures and what is true of them."""

    def __init__(self, data: Material, sizes: Sizes) -> None:
        joint = sizes is JOINT  # the tower alone may spell what it likes
        self.data, self.sizes = data, sizes
        self.emoji = random.sample(range(len(data.drawings.rows)), sizes.seen)
        self.emoji += random.sample(data.public, sizes.public)
        self.shown = random.sample(data.public, sizes.collages)
        self.words = [
            random.choice(data.known.public_words) if joint else spell(data.known)
            for _ in range(sizes.words)
        ]
        count = len(data.shapes.images)
        self.shapes = torch.randint(count, (sizes.shapes,))
        grounds = data.shapes.turned(torch.randint(count, (sizes.collages,)))
        collages, self.places = data.drawings.collages(self.shown, grounds)
        parts = [collages, data.drawings.written(self.words), data.shapes.turned(self.shapes)]
        drawn = augment(data.drawings.images[self.emoji].float())
        self.images = torch.cat([drawn, torch.cat(parts).float()])

    def split(self, found: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """By picture -> of emoji, collages, words, shapes."""
        sizes = self.sizes
        return found.split([len(self.emoji), sizes.collages, sizes.words, sizes.shapes])

    def rows(self, tokenizer: PreTrainedTokenizerBase) -> list[Asked]:
        """What is asked of the pictures, in three groups of about equally long rows."""
        data, rows = self.data, self.data.drawings.rows
        names = [name_of(rows[i]) for i in self.emoji]
        plain: Asked = {"plain": [(caption_row(tokenizer, n), i) for i, n in enumerate(names)]}
        plain["plain"] = plain["plain"][: self.sizes.seen]
        short: Asked = {"caption": [], "category": [], "vqa": [], "text": []}
        long: Asked = {"grounding": []}

        def chat(group: Asked, task: str, question: str, answer: str, picture: int) -> None:
            group[task].append((chat_row(tokenizer, question, answer), picture))

        for picture in range(self.sizes.seen, len(self.emoji)):
            if picture % 2:
                chat(short, "caption", random.choice(NAME_QUESTIONS), names[picture], picture)
            else:
                kind = KINDS[rows[self.emoji[picture]]["topic"]]
                chat(short, "category", tasks.CATEGORY_QUESTION, kind, picture)
        start = len(self.emoji)
        for picture, (drawing, place) in enumerate(
            zip(self.shown, self.places, strict=True), start
        ):
            asked = tasks.where(name_of(rows[drawing]))
            chat(long, "grounding", asked, tasks.box(place), picture)
        start += len(self.shown)
        for picture, word in enumerate(self.words, start):
            chat(short, "text", tasks.TEXT_QUESTION, word, picture)
        for picture, place in enumerate(self.shapes.tolist(), start + len(self.words)):
            chat(short, "vqa", *data.shapes.question(place), picture)
        return [plain, short, long]


class Readouts(nn.Module):
    """What the tower's features (N, 16, width) should tell, read off by one linear layer each."""

    def __init__(self, width: int, concepts: int) -> None:
        super().__init__()
        self.concept = Concepts(width, concepts)
        self.colour, self.shape = Concepts(width, len(tasks.COLOURS)), Concepts(width, 3)
        self.where = nn.Sequential(
            nn.LayerNorm(width), nn.Flatten(), nn.Linear(16 * width, tasks.PLACES)
        )
        self.spell = nn.Sequential(
            nn.LayerNorm(width), nn.Flatten(), nn.Linear(16 * width, tasks.LETTERS * 27)
        )

    @torch.no_grad()
    def begin(self, found: torch.Tensor, labels: torch.Tensor) -> None:
        """Start the concepts' readout at what the tower knows already: the nearest class mean.

        Args:
            found: features of all drawings; `labels` are their concepts.
        """
        norm, read = self.concept.read
        points = norm(found.mean(1))
        points, centre = points - points.mean(0), points.mean(0)
        means = torch.zeros_like(read.weight).index_add_(0, labels, points)
        means /= labels.bincount(minlength=len(means)).clamp_min(1)[:, None]
        spread = 10 * (points - means[labels]).square().mean()  # 10: the least loss of a few
        read.weight.copy_(means / spread)
        read.bias.copy_(-means.square().sum(1) / (2 * spread) - read.weight @ centre)

    def forward(self, step: Step, found: torch.Tensor) -> dict[str, torch.Tensor]:
        """The mean loss of each readout."""
        emoji, collages, words, shaped = step.split(found)
        labels, shapes = step.data.labels, step.data.shapes
        spelt = self.spell(words).view(-1, 27)
        colours, forms = shapes.colours[step.shapes], shapes.shapes[step.shapes]
        return {
            "concept": self.concept(emoji, labels[step.emoji]),
            "place": nn.functional.cross_entropy(self.where(collages), torch.tensor(step.places)),
            "letter": nn.functional.cross_entropy(spelt, letters(step.words).flatten()),
            "colour": self.colour(shaped[colours >= 0], colours[colours >= 0]),
            "form": self.shape(shaped[forms >= 0], forms[forms >= 0]),
        }


def chat_losses(
    llm: LlamaForCausalLM, rows: list[Row], image: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """`captioner.losses` of rows that start alike up to the picture: half of a `v1` row.

    The start is computed once, and every row attends to its keys and values.
    """
    start = rows[0][0].index(IMAGE)
    cache = DynamicCache()
    ids = torch.tensor([rows[0][0][:start]])
    llm.model(inputs_embeds=embed(llm, ids, None), past_key_values=cache, use_cache=True)
    for layer in cache.layers:
        layer.keys = layer.keys.expand(len(rows), -1, -1, -1)
        layer.values = layer.values.expand(len(rows), -1, -1, -1)
    ids, labels = pad([(row[start:], learnt[start:]) for row, learnt in rows])
    embeds = embed(llm, ids, image)
    hidden = llm.model(inputs_embeds=embeds, past_key_values=cache).last_hidden_state
    return score(llm, hidden, labels)


def by_task(found: torch.Tensor, rows: list[Row], sizes: dict[str, int]) -> dict[str, torch.Tensor]:
    """Token losses (T,) of rows in the order of the tasks -> each task's mean, in nats an answer.

    Sums over an answer's tokens: four of a box's 24 are not the same in every box, and in a mean
    over tokens they hardly count.
    """
    learnt = [sum(label >= 0 for label in labels) for _, labels in rows]
    of_row = torch.stack([part.sum() for part in found.split(learnt)])
    parts = of_row.split(list(sizes.values()))
    return {task: part.mean() for task, part in zip(sizes, parts, strict=True)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tower_steps", type=int, default=1400)
    parser.add_argument("--steps", type=int, default=1400)
    parser.add_argument("--lr", type=float, default=8e-4)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    torch.manual_seed(args.seed)
    random.seed(args.seed)
    torch.set_num_threads(2)
    disable_progress_bar()

    data = Material()
    tokenizer = AutoTokenizer.from_pretrained(BACKBONES / "llm")
    tower, llm = load(CLIPVisionModel, "vision_tower"), load(LlamaForCausalLM, "llm")
    tower.requires_grad_(True), llm.requires_grad_(True)
    width = tower.config.hidden_size
    projector = new_projector(width, llm.config.hidden_size)
    readouts = Readouts(width, len(data.names))
    print(f"torch {torch.__version__}, {vars(args)}, {len(data.labels)} pictures, of which", end="")
    print(f" {len(data.public)} public; {len(data.known.public_words)} public words")

    with torch.no_grad():
        parts = [features(tower, images.float()) for images in data.drawings.images.split(256)]
    readouts.begin(torch.cat(parts), data.labels)

    progress = Progress()
    optimizer = Optimizer([tower, readouts], args.lr, args.tower_steps)
    for number in range(1, args.tower_steps + 1):
        step = Step(data, ALONE)
        seen = readouts(step, features(tower, step.images))
        optimizer.step(torch.stack(list(seen.values())).mean())
        progress("tower", number, **seen)

    optimizer = Optimizer([tower, readouts, projector, llm], args.lr, args.steps)
    for number in range(1, args.steps + 1):
        step = Step(data, JOINT)
        texts = [text_row(tokenizer, data.by_name[n]) for n in random.choices(data.names, k=TEXTS)]
        found = features(tower, step.images)
        tokens = projector(found)
        read = torch.stack(list(readouts(step, found).values())).mean()
        with torch.autocast("cpu", torch.bfloat16):  # half as fast again, where the cores have it
            told, hits = {"text alone": losses(llm, texts, None)[0].mean()}, {}
            for group in step.rows(tokenizer):
                rows = [row for asked in group.values() for row, _ in asked]
                image = tokens[[picture for asked in group.values() for _, picture in asked]]
                found_losses, exact = chat_losses(llm, rows, image)
                sizes = {task: len(asked) for task, asked in group.items()}
                told |= by_task(found_losses, rows, sizes)
                parts = exact.float().split(list(sizes.values()))
                hits |= {task: part.mean() for task, part in zip(sizes, parts, strict=True)}
        loss = torch.stack(list(told.values())).mean()
        optimizer.step(loss + READ_SHARE * read)
        progress("joint", number, loss=loss, read=read, **hits)
        if number % 500 == 0 or number == args.steps:
            save(tower, llm, FOLDER)
    for file in ("tokenizer.model", "tokenizer_config.json", "special_tokens_map.json"):
        shutil.copyfile(BACKBONES / "llm" / file, FOLDER / "llm" / file)


if __name__ == "__main__":
    main()
