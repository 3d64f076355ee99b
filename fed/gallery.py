"""A grid of held-out pictures, with each model's caption and the truth under them.

A record with several pictures takes one place: they stand side by side.

    python -m fed.gallery --models "FedAvg=runs/fedavg" "Fed-CMP=runs/fedcmp" --model_base LLM \\
        --data heldout.json --image_folder images --output gallery.png

The backbone is loaded once; the models are projector-only folders that share it.
"""

from __future__ import annotations

import argparse
import random
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llava.atomic import atomic_write
from llava.errors import InputError, one_clear_error
from llava.flags import FlagParser, pairs

if TYPE_CHECKING:
    from PIL import Image


def captions(
    folders: Sequence[str],
    model_base: str,
    pictures: Sequence[Sequence[Path]],
    max_new_tokens: int = 24,
) -> list[list[str]]:
    """Each model's (outer list) greedy caption of each record's pictures.

    The prompt is that of plain pre-training, the pictures alone.
    """
    from fed import state
    from llava.constants import DEFAULT_IMAGE_TOKEN
    from llava.conversation import get_template
    from llava.eval.answer import Answerer, generation_options, single_turn
    from llava.model.builder import load_pretrained_model
    from llava.model.checkpoint import load_projector
    from llava.model.checkpoint_names import PROJECTOR_FILE
    from llava.pictures import open_image

    tokenizer, model, processor, _ = load_pretrained_model(folders[0], model_base, "llava")
    positions = getattr(model.config, "max_position_embeddings", None) or 2048
    answerer = Answerer(tokenizer, model, processor, folders[0], positions)
    plain = get_template("plain")
    prompts = [single_turn(plain, DEFAULT_IMAGE_TOKEN * len(own)).strip("\n") for own in pictures]
    prepared = [[answerer.picture(open_image(path)) for path in own] for own in pictures]
    said = []
    for folder in folders:
        file = Path(folder) / PROJECTOR_FILE
        load_projector(model, state.load(file), str(file))
        said.append(answerer.answer(prompts, prepared, "\n", generation_options(0, max_new_tokens)))
    return said


def beside(images: Sequence[Image.Image]) -> Image.Image:
    """Pictures in a row from left to right, as high as the first of them."""
    from PIL import Image

    height = images[0].height
    scaled = [i.resize((max(1, round(i.width * height / i.height)), height)) for i in images]
    row = Image.new("RGB", (sum(image.width for image in scaled), height))
    left = 0
    for image in scaled:
        row.paste(image, (left, 0))
        left += image.width
    return row


def shown(record: dict[str, Any], folder: Path, source: str) -> tuple[list[Path], str]:
    """A record's pictures and its caption; `InputError` names the record in `source`."""
    from llava.train.preprocess import read_turns

    image = record["image"]
    names = image if isinstance(image, list) else [image]
    try:
        if not all(isinstance(name, str) for name in names):
            raise InputError(f"`image` is {image!r:.80}, expected a path or a list of paths")
        return [folder / name for name in names], read_turns(record["conversations"])[-1]
    except InputError as error:
        raise InputError(f"{source}: record {record.get('id')!r}: {error}") from None


def draw(
    pictures: Sequence[Sequence[Path]],
    truths: Sequence[str],
    models: Sequence[str],
    said: Sequence[Sequence[str]],
    path: Path,
    columns: int = 4,
) -> None:
    """The grid as a PNG: under a record's pictures the truth, then each model's answer, green if
    it is the same.
    """
    import textwrap

    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    from llava.pictures import open_image

    rows = -(-len(pictures) // columns)
    lines = 1 + len(models)
    figure, axes = pyplot.subplots(
        rows, columns, figsize=(3.1 * columns, (1.9 + 0.24 * lines) * rows), squeeze=False
    )
    figure.subplots_adjust(0.01, 0.01, 0.99, 0.99, 0.02, 0.02)
    for axis in axes.flat:
        axis.axis("off")
    share = 1.7 / (1.9 + 0.24 * lines)
    step = (1 - share) / (lines + 0.5)
    for i, (axis, own, truth) in enumerate(zip(axes.flat, pictures, truths, strict=False)):
        inset = axis.inset_axes([0.1, 1 - share, 0.8, share])
        inset.imshow(beside([open_image(path) for path in own]), interpolation="lanczos")
        inset.axis("off")
        y = 1 - share - 0.02
        axis.text(0.5, y, textwrap.shorten(truth, 36, placeholder="…"), ha="center", va="top",
                  fontsize=10, weight="bold", transform=axis.transAxes)  # fmt: skip
        for model, answers in zip(models, said, strict=True):
            y -= step
            colour = "#007a4d" if answers[i] == truth else "#b03a00"
            answer = textwrap.shorten(answers[i] or "(nothing)", 24, placeholder="…")
            axis.text(0.47, y, model, ha="right", va="top", fontsize=8, color="0.45",
                      transform=axis.transAxes)  # fmt: skip
            axis.text(0.5, y, answer, ha="left", va="top", fontsize=8.5,
                      color=colour, transform=axis.transAxes)  # fmt: skip
    with atomic_write(path) as file:
        figure.savefig(file, dpi=130, format="png")
    pyplot.close(figure)


def parser() -> argparse.ArgumentParser:
    top = FlagParser(description=__doc__.split("\n")[0])
    top.add_argument("--models", nargs="+", required=True, metavar="NAME=FOLDER")
    top.add_argument("--model_base", required=True)
    top.add_argument("--data", required=True, help="LLaVA JSON with one-turn captions")
    top.add_argument("--image_folder", type=Path, required=True)
    top.add_argument("--output", type=Path, required=True)
    top.add_argument("--pictures", type=int, default=16)
    top.add_argument("--seed", type=int, default=0)
    return top


def main(argv: Sequence[str] | None = None) -> None:
    args = parser().parse_args(argv)
    with one_clear_error():
        from llava.train.data import load_records

        models = pairs("--models", args.models, "NAME=FOLDER")
        if args.pictures < 1:
            raise InputError(f"--pictures {args.pictures}: at least 1 is expected")
        records = [r for r in load_records(args.data) if r.get("image")]
        if not records:
            raise InputError(f"{args.data}: no record has a picture")
        records = random.Random(args.seed).sample(records, min(args.pictures, len(records)))
        pictures, truths = zip(
            *(shown(r, args.image_folder, args.data) for r in records), strict=True
        )
        said = captions(list(models.values()), args.model_base, pictures)
        draw(pictures, truths, list(models), said, args.output)
        print(f"wrote {args.output}")


if __name__ == "__main__":
    main()
