"""Chat about pictures in a terminal.

python -m llava.serve.cli --model-path … --image-file picture.jpg [--image-file another.jpg]

An empty line, or the end of the input, ends the talk.
"""

from __future__ import annotations

import argparse

from llava.errors import one_clear_error
from llava.eval.answer import Answerer, add_model_flags, end_mark, generation_options


def main(args: argparse.Namespace) -> None:
    """Load the model of `args`, then answer line after line."""
    from llava.mm_utils import load_images

    options = generation_options(args.temperature, args.max_new_tokens)
    images = load_images(args.image_file)
    answerer = Answerer.load(args)
    conversation = answerer.template(args.conv_mode)
    user, assistant = (_name(role) for role in conversation.roles)
    pictures = [answerer.picture(image) for image in images]
    stop = end_mark(conversation)

    pending = len(pictures)  # the first turn shows them
    while text := _read(f"{user or 'user'}: "):
        conversation.append_message(conversation.roles[0], answerer.with_pictures(text, pending))
        conversation.append_message(conversation.roles[1], None)
        pending = 0
        prompt = conversation.get_prompt()
        print(f"{assistant or 'assistant'}: ", end="", flush=True)
        streamer = _streamer(answerer.tokenizer, stop)
        answer = answerer.answer([prompt], [pictures], stop, options, streamer)[0]
        conversation.messages[-1][1] = answer
        if args.debug:
            print("\n", {"prompt": prompt, "outputs": answer}, "\n")
    print("exit...")


def _read(prompt: str) -> str:
    try:
        return input(prompt)
    except EOFError:
        return ""


def _name(role: str) -> str:
    """A role as people read it: `<|im_start|>user` is `user`."""
    return role.replace("<|im_start|>", "").strip()


def _streamer(tokenizer, stop: str):
    """Print words as they come, up to the mark that ends the answer."""
    from transformers import TextStreamer

    from llava.serve.generated import shown

    class UpToStop(TextStreamer):
        text, printed = "", 0

        def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
            self.text += text
            now = shown(self.text, stop, stream_end)
            print(now[self.printed :], end="\n" if stream_end else "", flush=True)
            self.printed = max(self.printed, len(now))

    return UpToStop(tokenizer, skip_prompt=True, skip_special_tokens=True)


def arguments(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    add_model_flags(parser)
    parser.add_argument(
        "--image-file", required=True, action="append", help="path or address; may be repeated"
    )
    parser.add_argument(
        "--conv-mode", default=None, help="else the config's conversation_template, else by name"
    )
    parser.add_argument("--temperature", type=float, default=0.2, help="0 is greedy")
    parser.add_argument("--max-new-tokens", type=int, default=512)
    parser.add_argument("--debug", action="store_true", help="show each prompt and answer")
    return parser.parse_args(argv)


def __getattr__(name: str):
    """What programs of others import from here, lazily: torch comes with it."""
    if name != "load_image":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from llava.mm_utils import load_image

    return load_image


if __name__ == "__main__":
    with one_clear_error():
        main(arguments())
