"""Questions and answers: from what is typed to a prompt, and to what the page shows."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import html
from collections.abc import AsyncIterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llava.constants import DEFAULT_IMAGE_TOKEN, MAX_PIXELS
from llava.conversation import Conversation, get_template
from llava.errors import InputError
from llava.eval.answer import end_mark
from llava.serve.ui.worker_client import Options, PageError, Worker, WorkerClient
from llava.texts import half_character

if TYPE_CHECKING:
    from PIL import Image

PREPROCESS = ("Crop", "Resize", "Pad", "Default")


@dataclasses.dataclass
class Turn:
    """A question with its pictures, files and as they are sent (base64), and its answer so far."""

    text: str
    files: list[str]
    images: list[str]
    answer: str = ""
    trouble: str = ""
    done: bool = False
    model: str = ""
    vote: str = ""
    """How its answer was voted on: once."""
    conversation: Conversation | None = None
    """What `model` was given, with the answer once that is there."""

    @classmethod
    def of(cls, message: Mapping[str, Any], preprocess: str) -> Turn:
        """The turn that a MultimodalTextbox holds; `PageError` for one that cannot be sent."""
        text, files = message["text"].strip(), list(message["files"])
        if not text and not files:
            raise PageError("Type a question, or add a picture.")
        if half_character(text) is not None:
            raise PageError("There is half an emoji in the question, which is no text.")
        return cls(text, files, [_sent(file, preprocess) for file in files])


def open_again(turn: Turn, preprocess: str) -> Turn:
    """The turn as it was typed, its pictures prepared anew."""
    return Turn(turn.text, turn.files, [_sent(file, preprocess) for file in turn.files])


def _sent(file: str, preprocess: str) -> str:
    image = Conversation("", ("", ""), [], 0).process_image(open_picture(file), preprocess)
    assert isinstance(image, str)  # base64 unless `return_pil`
    return image


def open_picture(path: str) -> Image.Image:
    """The picture uploaded to `path`, upright and RGB; `PageError` in words if it is none."""
    from llava.pictures import open_image

    try:
        return open_image(path, Path(path).name, MAX_PIXELS)
    except InputError as error:
        raise PageError(f"{error}.") from None


def conversation_of(turns: list[Turn], worker: Worker) -> Conversation:
    """The turns in the worker's template; those without an answer, but for the last, left out.

    `<image>` that someone typed is text, and is spelt so that no worker takes it for a picture.
    """
    conversation = get_template(worker.template)
    token = DEFAULT_IMAGE_TOKEN
    if "mmtag" in conversation.version:
        token = f"<Image>{token}</Image>"
    for turn in turns:
        if turn.answer or turn is turns[-1]:
            text = "\n".join(
                [token] * len(turn.images) + ([_typed(turn.text)] if turn.text else [])
            )
            conversation.append_message(conversation.roles[0], text)
            conversation.append_message(conversation.roles[1], _typed(turn.answer) or None)
    return conversation


def images_of(turns: list[Turn]) -> list[str]:
    """The pictures that `conversation_of` has tokens for, in their order."""
    return [image for t in turns if t.answer or t is turns[-1] for image in t.images]


async def fill(
    client: WorkerClient, columns: Mapping[str, list[Turn]], options: Options
) -> AsyncIterator[None]:
    """Answer the last turn of each model's column in place, all at once.

    Yields when there is news, and each second, so that a page that is gone is noticed. Closing it
    ends the connections to all workers.
    """
    news = asyncio.Event()
    tasks = [
        asyncio.create_task(_fill(client, *column, options, news)) for column in columns.items()
    ]
    for task in tasks:
        task.add_done_callback(lambda _: news.set())
    try:
        while not all(task.done() for task in tasks):
            with contextlib.suppress(asyncio.TimeoutError):
                await asyncio.wait_for(news.wait(), 1)
            news.clear()
            yield
        for task in tasks:
            task.result()
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


async def _fill(
    client: WorkerClient, model: str, turns: list[Turn], options: Options, news: asyncio.Event
) -> None:
    turn = turns[-1]
    turn.model = model
    try:
        worker = await client.worker(model)
        if images_of(turns) and not worker.multimodal:
            raise PageError(f"{model} is a language model: it cannot see pictures.")
        turn.conversation = conversation_of(turns, worker)
        stop, prompt = end_mark(turn.conversation), turn.conversation.get_prompt()
        answer = client.answer(worker, prompt, stop, images_of(turns), options)
        async with contextlib.aclosing(answer) as texts:
            async for turn.answer in texts:
                turn.conversation.messages[-1][1] = _typed(turn.answer)
                news.set()
        if not turn.answer:
            turn.trouble = f"{model} ended its answer before the first word."
    except (PageError, InputError) as error:
        turn.trouble = str(error)
    finally:
        turn.done = True


def chatbot_messages(turns: list[Turn]) -> list[dict[str, Any]]:
    """Messages for a Chatbot; an answer that is not done has a cursor."""
    messages: list[dict[str, Any]] = []
    for turn in turns:
        for file in turn.files:
            picture = {"path": file, "alt_text": Path(file).name}
            messages.append({"role": "user", "content": picture})
        if turn.text:
            messages.append({"role": "user", "content": html.escape(turn.text, quote=False)})
        if answer := turn.answer + "▌" * (not turn.done):
            messages.append({"role": "assistant", "content": answer})
        if turn.trouble:
            messages.append(
                {"role": "assistant", "content": f"**!** {html.escape(turn.trouble, quote=False)}"}
            )
    return messages


def _typed(text: str) -> str:
    return text.replace(DEFAULT_IMAGE_TOKEN, "< image >")
