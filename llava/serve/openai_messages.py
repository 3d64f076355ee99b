"""A prompt back into the messages that it was made of, as OpenAI-compatible servers take them.

A template's marks are cut out of prompts that the template itself makes. A prompt is cut into
rounds where an answer ends and the next question begins, and each round at the last mark of an
answer. So a question may hold the mark of an answer (Vicuna's ` ASSISTANT: `) or of a question
(`</s>USER: `). What a string cannot tell is lost: an answer that holds either, or a question with
the first and then the second, is cut there.
"""

from __future__ import annotations

import base64
import dataclasses
import io
import re
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

from llava.constants import (
    DEFAULT_IM_END_TOKEN,
    DEFAULT_IM_START_TOKEN,
    DEFAULT_IMAGE_TOKEN,
    MAX_PIXELS,
)
from llava.conversation import Conversation, SeparatorStyle, get_template
from llava.errors import InputError

OTHERS = ("vicuna_v1", "llava_v0", "chatml_direct", "llava_llama_2", "mistral_instruct", "smollm2")
"""One template of each form, for prompts of a page that chose another than the worker."""

_CHATML_SYSTEM = "<|im_start|>system\n"
_PICTURE = re.compile(
    f"(?:{DEFAULT_IM_START_TOKEN})?{DEFAULT_IMAGE_TOKEN}(?:{DEFAULT_IM_END_TOKEN})?\n?"
)
_TAGGED = [f"<Image>{DEFAULT_IMAGE_TOKEN}</Image>", "Received."]


class Talk(NamedTuple):
    """A prompt's texts: the system's, and the turns' in order, a user's first and last."""

    system: str
    turns: list[str]


class _Marks(NamedTuple):
    """`silent` stands where upstream left an empty answer open: between two questions."""

    before_system: str
    before_first: str
    answer: str
    question: str
    silent: str
    opening: str


def read_prompt(prompt: str, name: str) -> Talk:
    """The texts of a prompt of the template `name`; those of `OTHERS` are recognised too."""
    try:
        return split_prompt(prompt, name)
    except InputError:
        for other in OTHERS:
            try:
                return split_prompt(prompt, other)
            except InputError:
                pass
        raise


def split_prompt(prompt: str, name: str) -> Talk:
    """The texts of a prompt of the template `name`; its system's text may be another.

    Examples that belong to the template are turns. The turns with which `mmtag` templates announce
    a picture become `<image>` at the front of the question after them, as elsewhere.

    Raises:
        InputError: a template that is no talk, or a prompt that is not of it.
    """
    template = get_template(name)
    if template.sep_style is SeparatorStyle.PLAIN:
        raise InputError(f"the template {name} has no turns; a chat template is needed")
    marks = _marks(template)
    head, seen, talk = prompt.removesuffix(marks.opening).partition(marks.before_first)
    framed = seen and head.startswith(marks.before_system) and prompt.endswith(marks.opening)
    if not framed or (head and not template.system):
        raise InputError(
            f"the prompt is not of the template {name}: one or more turns were expected, "
            f"the last a question that is followed by {marks.opening!r}"
        )
    turns: list[str] = []
    start = unsearched = 0
    for mark in re.finditer(f"{re.escape(marks.question)}|{re.escape(marks.silent)}", talk):
        end = mark.start()
        answer = talk.rfind(marks.answer, unsearched, end)
        if mark[0] == marks.silent:
            turns += [talk[start:end], ""]
        elif answer >= 0:
            turns += [talk[start:answer], talk[answer + len(marks.answer) : end]]
        else:  # no answer yet, so the mark belongs to the question
            unsearched = max(start, mark.end() - len(marks.answer))
            continue
        start = unsearched = mark.end()
    turns.append(talk[start:])
    if "mmtag" in template.version and turns[:2] == _TAGGED:
        turns[:3] = [f"{DEFAULT_IMAGE_TOKEN}\n{turns[2]}"]
    return Talk(head.removeprefix(marks.before_system), turns)


def _marks(template: Conversation) -> _Marks:
    head = _CHATML_SYSTEM if template.system.startswith(_CHATML_SYSTEM) else ""
    system = f"{head}\0" if template.system else ""

    def pieces(*texts: str | None) -> list[str]:
        messages = [[template.roles[i % 2], text] for i, text in enumerate(texts)]
        talk = dataclasses.replace(template, system=system, messages=messages)
        return talk.get_prompt().split("\0")

    *before, first, answer, question, opening = pieces("\0", "\0", "\0", None)
    silent = pieces("\0", None, "\0", None)[-2]
    return _Marks("".join(before), first, answer, question, silent, opening)


def chat_messages(talk: Talk, images: Sequence[str]) -> list[dict[str, Any]]:
    """The messages of a talk, each `<image>` of a question with its picture (base64) in its place.

    A line break after a picture goes with it: servers' own chat templates put one there.
    """
    tags = sum(text.count(DEFAULT_IMAGE_TOKEN) for text in talk.turns[::2])
    if tags != len(images):
        raise InputError(
            f"{len(images)} pictures were sent, the questions have {tags} "
            f"{DEFAULT_IMAGE_TOKEN} tags"
        )
    pictures = iter(images)
    messages: list[dict[str, Any]] = []
    if talk.system:
        messages.append({"role": "system", "content": talk.system})
    for i, text in enumerate(talk.turns):
        content = text if i % 2 else _content(text, pictures)
        messages.append({"role": "assistant" if i % 2 else "user", "content": content})
    return messages


def _content(text: str, pictures: Iterator[str]) -> str | list[dict[str, Any]]:
    pieces = _PICTURE.split(text)
    if len(pieces) == 1:
        return text
    if not pieces[-1]:  # what ends with a picture has its line break before it
        pieces[-2] = pieces[-2].removesuffix("\n")
    parts: list[dict[str, Any]] = []
    for i, piece in enumerate(pieces):
        if i:
            parts.append({"type": "image_url", "image_url": {"url": data_url(next(pictures))}})
        if piece:
            parts.append({"type": "text", "text": piece})
    return parts


def data_url(image: str) -> str:
    """A base64 picture as a `data:` address; what not every server reads alike becomes PNG."""
    from llava.pictures import open_image, plain_kind

    name = "a picture of the question"
    try:
        data = base64.b64decode("".join(image.split()), validate=True)
    except ValueError:
        raise InputError(f"{name} cannot be read: this is not base64") from None
    picture, kind = open_image(data, name, MAX_PIXELS), plain_kind(data)
    if kind not in ("png", "jpeg", "webp", "gif"):
        buffer = io.BytesIO()
        picture.save(buffer, format="PNG")
        data, kind = buffer.getvalue(), "png"
    return f"data:image/{kind};base64,{base64.b64encode(data).decode()}"
