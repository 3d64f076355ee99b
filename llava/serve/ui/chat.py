"""The tab for talking to one model, as upstream's users know it."""

# No postponed annotations: gradio finds its Request by them.
import asyncio
from collections.abc import AsyncIterator
from typing import Any, NamedTuple

from llava.serve.ui.chat_state import Turn, chatbot_messages, fill, open_again
from llava.serve.ui.feedback_log import FeedbackLog
from llava.serve.ui.overlay import overlays
from llava.serve.ui.widgets import (
    ONE_BY_ONE,
    options_of,
    question_box,
    settings,
    small_button,
    told,
    turn_of,
)
from llava.serve.ui.worker_client import Options, WorkerClient

VOTES = {"upvote": "Upvote", "downvote": "Downvote", "flag": "Flag"}


class ChatWidgets(NamedTuple):
    """The tab's widgets, as far as an event reads or changes them."""

    model: Any
    parameters: list
    chatbot: Any
    box: Any
    votes: list
    stop: Any
    again: Any
    clear: Any
    look: Any
    attention: Any

    def outputs(self) -> list:
        """The widgets that `view` updates, in its order."""
        buttons = [*self.votes, self.stop, self.again, self.clear, self.look]
        return [self.chatbot, self.attention, *buttons]


def _widgets(offers: list[dict]) -> ChatWidgets:
    import gradio as gr

    with gr.Row():
        with gr.Column(scale=3, min_width=260):
            model = gr.Dropdown([], label="Model", elem_id="model")
            parameters = settings()
        with gr.Column(scale=8, min_width=300):
            chatbot = gr.Chatbot(
                label="Conversation", height="52vh", elem_id="chatbot", buttons=["copy"]
            )
            box = question_box("Your question", offers)
            with gr.Row():
                votes = [small_button(label) for label in VOTES.values()]
            with gr.Row():
                labels = ("Stop", "Regenerate", "Clear", "What did it look at?")
                stop, again, clear, look = map(small_button, labels)
            attention = gr.Gallery(
                label="What it looked at",
                visible=False,
                buttons=["fullscreen"],
                columns=2,
                fit_columns=False,
                height="auto",
                object_fit="contain",
                format="png",
            )
    return ChatWidgets(model, parameters, chatbot, box, votes, stop, again, clear, look, attention)


def view(turns: list[Turn], busy: bool = False) -> list:
    """Updates of the conversation, and of the buttons that make sense now."""
    import gradio as gr

    answered = bool(turns) and not busy and bool(turns[-1].answer)
    idle, votable = bool(turns) and not busy, [answered and not turns[-1].vote] * len(VOTES)
    able = [*votable, busy, idle, idle, answered and any(turn.images for turn in turns)]
    buttons = [gr.update(interactive=each) for each in able]
    return [chatbot_messages(turns), gr.update(visible=False, value=None), *buttons]


def chat_tab(client: WorkerClient, log: FeedbackLog, offers: list[dict]):
    """Build the tab; returns its choice of models."""
    import gradio as gr

    turns, tab = gr.State([]), _widgets(offers)

    async def answer(model, turns: list[Turn], options: Options, request) -> AsyncIterator[list]:
        async for _ in fill(client, {model: turns}, options):
            yield view(turns, busy=True)
        if turns[-1].answer:
            await asyncio.to_thread(log.write, "chat", turns, request.client.host)
        yield view(turns)

    async def send(message, model, turns, preprocess, heat, top_p, most, request: gr.Request):
        turns.append(await turn_of(message, preprocess))
        yield [None, *view(turns, busy=True)]
        async for update in answer(model, turns, options_of(heat, top_p, most), request):
            yield [gr.skip(), *update]

    async def regenerate(model, turns, preprocess, heat, top_p, most, request: gr.Request):
        with told():
            turns[-1] = await asyncio.to_thread(open_again, turns[-1], preprocess)
        async for update in answer(model, turns, options_of(heat, top_p, most), request):
            yield update

    def vote(kind: str):
        async def write(turns, request: gr.Request):
            if not turns[-1].vote:
                await asyncio.to_thread(log.write, kind, turns, request.client.host)
                turns[-1].vote = kind
            return [gr.update(interactive=False)] * len(VOTES)

        return write

    async def look_at(turns):
        with told():
            return gr.update(value=await overlays(client, turns), visible=True)

    given, outputs = [tab.model, turns, *tab.parameters], tab.outputs()
    running = [
        tab.box.submit(send, [tab.box, *given], [tab.box, *outputs], show_progress="hidden"),
        tab.again.click(regenerate, given, outputs, show_progress="hidden"),
    ]
    tab.stop.click(None, cancels=running).then(lambda turns: view(turns), turns, outputs)
    for event in (tab.clear.click, tab.chatbot.clear):
        event(lambda: ([], *view([])), None, [turns, *outputs], cancels=running)
    for button, kind in zip(tab.votes, VOTES, strict=True):
        button.click(vote(kind), turns, tab.votes, show_progress="hidden", **ONE_BY_ONE)
    tab.look.click(look_at, turns, tab.attention, show_progress_on=tab.look)
    return tab.model
