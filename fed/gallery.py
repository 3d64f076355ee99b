"""A grid of held-out pictures with what each model says of them beside the truth.

    python -m fed.gallery --models "FedAvg=runs/fedavg" "Fed-CMP=runs/fedcmp" --model-base LLM \\
        --data heldout.json --image-folder images --output gallery.png

The backbone is loaded once; the models are projector-only folders that share it.
"""

from __future__ import annotations

import argparse
import random
from collections.abc import Sequence
from pathlib import Path

from llava.atomic import atomic_write
from llava.errors import InputError, one_clear_error


def captions(
    folders: Sequence[str], model_base: str, pictures: Sequence[Path], max_new_tokens: int = 24
) -> list[list[str]]:
    """What each model (outer list) says of each picture, greedily, as after plain pre-training."""
    import torch

    from fed import state
    from llava.conversation import get_template
    from llava.mm_utils import open_image, process_images, tokenizer_image_token
    from llava.model.builder import load_pretrained_model
    from llava.model.checkpoint import PROJECTOR_FILE, load_projector

    tokenizer, model, processor, _ = load_pretrained_model(folders[0], model_base, "llava")
    pixels = process_images([open_image(p) for p in pictures], processor, model.config)
    features = model.get_vision_tower()(pixels.to(model.device, model.dtype))
    conversation = get_template("plain").copy()
    conversation.append_message(conversation.roles[0], "<image>")
    ids = tokenizer_image_token(
        conversation.get_prompt().strip("\n"), tokenizer, return_tensors="pt"
    )
    ids = ids.to(model.device).expand(len(pictures), -1)
    said = []
    for folder in folders:
        file = Path(folder) / PROJECTOR_FILE
        load_projector(model, state.load(file), str(file))
        with torch.inference_mode():
            output = model.generate(
                ids,
                images=features,
                do_sample=False,
                max_new_tokens=max_new_tokens,
                pad_token_id=tokenizer.pad_token_id or tokenizer.eos_token_id,
            )
        texts = tokenizer.batch_decode(output, skip_special_tokens=True)
        said.append([text.split("\n")[0].strip() for text in texts])
    return said


def draw(
    pictures: Sequence[Path],
    truths: Sequence[str],
    models: Sequence[str],
    said: Sequence[Sequence[str]],
    path: Path,
    columns: int = 4,
) -> None:
    """The grid as a PNG: under each picture its name, then a line per model, green if right."""
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
    for i, (axis, picture, truth) in enumerate(zip(axes.flat, pictures, truths, strict=False)):
        inset = axis.inset_axes([0.1, 1 - share, 0.8, share])
        inset.imshow(open_image(picture), interpolation="lanczos")
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


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--models", nargs="+", required=True, metavar="NAME=FOLDER")
    parser.add_argument("--model-base", required=True)
    parser.add_argument("--data", required=True, help="LLaVA JSON with one-turn captions")
    parser.add_argument("--image-folder", type=Path, required=True)
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--pictures", type=int, default=16)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args(argv)
    with one_clear_error():
        from llava.train.data import load_records

        names, folders = [], []
        for text in args.models:
            name, equals, folder = text.partition("=")
            if not equals:
                raise InputError(f"--models {text}: NAME=FOLDER is expected")
            names.append(name)
            folders.append(folder)
        records = [r for r in load_records(args.data) if r.get("image")]
        records = random.Random(args.seed).sample(records, min(args.pictures, len(records)))
        pictures = [args.image_folder / record["image"] for record in records]
        truths = [record["conversations"][-1]["value"] for record in records]
        said = captions(folders, args.model_base, pictures)
        draw(pictures, truths, names, said, args.output)
        print(f"wrote {args.output}")


if __name__ == "__main__":
    main()
