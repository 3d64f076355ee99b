"""Widgets that the tabs share: the question box, the settings of an answer, error messages."""

from __future__ import annotations

import asyncio
import contextlib
import html
from collections.abc import Iterator

from llava.errors import InputError
from llava.serve.protocol import MAX_CHARACTERS, MAX_NEW_TOKENS
from llava.serve.ui.chat_state import PREPROCESS, Turn
from llava.serve.ui.worker_client import Options, PageError

ONE_BY_ONE = {"concurrency_limit": 1, "concurrency_id": "votes"}
"""How events of votes run, so that of two clicks the second sees the first's vote."""


def question_box(label: str, offers: list[dict]):
    """A box for text and pictures; Enter sends. Screen readers read the placeholder.

    Above it are the examples, of which a click fills it.
    """
    import gradio as gr

    box = gr.MultimodalTextbox(
        label=label,
        show_label=False,
        placeholder=label,
        file_types=["image"],
        file_count="multiple",
        sources=["upload"],
        max_plain_text_length=MAX_CHARACTERS,
        render=False,
    )
    if offers:
        gr.Examples([[offer] for offer in offers], box, api_visibility="private")
    return box.render()


def small_button(label: str, interactive: bool = False, visible: bool = True):
    import gradio as gr

    return gr.Button(label, interactive=interactive, visible=visible, min_width=90, size="sm")


def settings() -> list:
    """Sliders and choices in the order that `options_of` and `turn_of` take them."""
    import gradio as gr

    with gr.Accordion("Parameters", open=False):
        preprocess = gr.Radio(
            PREPROCESS, value="Default", label="Preprocess for non-square image", type="value"
        )
        temperature = gr.Slider(0, 1, 0.2, step=0.1, label="Temperature")
        top_p = gr.Slider(0.1, 1, 0.7, step=0.1, label="Top P")
        most = gr.Slider(1, MAX_NEW_TOKENS, 512, step=1, label="Max output tokens")
    return [preprocess, temperature, top_p, most]


def options_of(temperature: float, top_p: float, most: float) -> Options:
    return Options(temperature, top_p, int(most))


async def turn_of(message: dict | None, preprocess: str) -> Turn:
    """The turn that is typed; pictures are prepared beside the event loop."""
    with told():
        return await asyncio.to_thread(Turn.of, message or {"text": "", "files": []}, preprocess)


@contextlib.contextmanager
def told() -> Iterator[None]:
    """PageError becomes a message on the page that stays until it is closed."""
    import gradio as gr

    try:
        yield
    except (PageError, InputError) as error:
        text = html.escape(str(error))
        raise gr.Error(text, duration=None, title="", print_exception=False) from None
