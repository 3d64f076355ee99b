"""Chat about pictures in a terminal.

python -m llava.serve.cli --model-path … --image-file picture.jpg [--image-file another.jpg]

An empty line, the end of the input, or Ctrl-C where a line is awaited ends the talk; Ctrl-C in an
answer ends that answer. A turn that goes wrong is left out, and the talk goes on without it.
"""

from __future__ import annotations

import argparse
import io
import sys

from llava.errors import one_clear_error, reason
from llava.eval.answer import Answerer, add_model_flags, end_mark, generation_options


def main(args: argparse.Namespace) -> None:
    """Load the model of `args`, then answer line after line."""
    from llava.mm_utils import load_images

    if isinstance(sys.stdin, io.TextIOWrapper):  # a line that is not UTF-8 gets an error message
        sys.stdin.reconfigure(errors="surrogateescape")
    options = generation_options(args.temperature, args.max_new_tokens)
    images = load_images(args.image_file)
    answerer = Answerer.load(args)
    conversation = answerer.template(args.conv_mode)
    user, assistant = (_name(role) for role in conversation.roles)
    pictures = [answerer.picture(image) for image in images]
    stop = end_mark(conversation)

    shown = False  # the first turn shows the pictures
    while text := _read(f"{user or 'user'}: "):
        asked = conversation.copy()
        streamer = _streamer(answerer.tokenizer, stop)
        try:
            text = answerer.with_pictures(text, 0 if shown else len(pictures))
            asked.append_message(conversation.roles[0], text)
            asked.append_message(conversation.roles[1], None)
            prompt = asked.get_prompt()
            print(f"{assistant or 'assistant'}: ", end="", flush=True)
            answer = answerer.answer([prompt], [pictures], stop, options, streamer)[0]
        except KeyboardInterrupt:
            _leave_out("interrupted")
            continue
        except Exception as error:  # out of memory, say
            _leave_out(f"error: {reason(error)}")
            continue
        asked.messages[-1][1] = answer
        conversation, shown = asked, True
        if args.debug:
            print("\n", {"prompt": prompt, "outputs": answer}, "\n")
    print("exit...")


def _leave_out(why: str) -> None:
    print(flush=True)
    print(f"{why}; the talk goes on without this turn", file=sys.stderr, flush=True)


def _read(prompt: str) -> str:
    """A line; none at the end of the input, or when the user interrupts."""
    try:
        return input(prompt)
    except EOFError:
        return ""
    except KeyboardInterrupt:
        print()
        return ""


def _name(role: str) -> str:
    """A role as people read it: `<|im_start|>user` is `user`."""
    return role.replace("<|im_start|>", "").strip()


def _streamer(tokenizer, stop: str):
    """Print words as they come, up to the mark that ends the answer."""
    from transformers import TextStreamer

    from llava.serve.text_stream import visible_text

    class UpToStop(TextStreamer):
        text, printed = "", 0

        def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
            self.text += text
            now = visible_text(self.text, stop, stream_end)
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
    """Names that other programs import from here, lazily: torch comes with them."""
    if name != "load_image":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from llava.mm_utils import load_image

    return load_image


if __name__ == "__main__":
    with one_clear_error():
        main(arguments())
