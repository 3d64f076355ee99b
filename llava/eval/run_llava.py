"""Ask a LLaVA about pictures.

python -m llava.eval.run_llava --model-path … --image-file … --query …
"""

from __future__ import annotations

import argparse

from llava.errors import one_clear_error
from llava.eval.answer import (
    Answerer,
    add_model_flags,
    end_mark,
    filled,
    generation_options,
    single_turn,
)


def eval_model(args) -> str:
    """Answer one query about the pictures of `args`, print the answer and return it.

    `args` is any object with the flags as attributes; those that it lacks take their defaults.
    """
    from llava.mm_utils import load_images

    args = filled(args, arguments(["--image-file", "", "--query", ""]))
    files = args.image_file.split(args.sep) if args.sep else [args.image_file]
    options = generation_options(args.temperature, args.max_new_tokens, args.top_p, args.num_beams)
    images = load_images(files)
    answerer = Answerer.load(args)
    template = answerer.template(args.conv_mode)
    prompt = single_turn(template, answerer.with_pictures(args.query, len(images)))
    pictures = [answerer.picture(image) for image in images]
    answer = answerer.answer([prompt], [pictures], end_mark(template), options)[0]
    print(answer)
    return answer


def arguments(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    add_model_flags(parser)
    parser.add_argument("--image-file", required=True, help="path or address; several with --sep")
    parser.add_argument("--query", required=True)
    parser.add_argument(
        "--conv-mode", default=None, help="else the config's conversation_template, else by name"
    )
    parser.add_argument("--sep", default=",")
    parser.add_argument("--temperature", type=float, default=0.2)
    parser.add_argument("--top_p", type=float, default=None)
    parser.add_argument("--num_beams", type=int, default=1)
    parser.add_argument("--max_new_tokens", type=int, default=512)
    return parser.parse_args(argv)


def __getattr__(name: str):
    """Names that other programs import from here, lazily: torch comes with them."""
    if name not in ("load_image", "load_images", "process_images"):
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from llava import mm_utils

    return getattr(mm_utils, name)


if __name__ == "__main__":
    with one_clear_error():
        eval_model(arguments())
