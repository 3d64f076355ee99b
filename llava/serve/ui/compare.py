"""The tab that asks two to four models the same, side by side, and takes votes as arenas do."""

# No postponed annotations: gradio finds its Request by them.
import asyncio
import copy
import functools
import random
from typing import Any, NamedTuple

from llava.serve.ui.chat_state import Turn, chatbot_messages, fill
from llava.serve.ui.feedback_log import FeedbackLog
from llava.serve.ui.widgets import (
    ONE_BY_ONE,
    options_of,
    question_box,
    settings,
    small_button,
    told,
    turn_of,
)
from llava.serve.ui.worker_client import PageError, WorkerClient

MAX_COLUMNS = 4
TIE, BAD = "tievote", "bothbad_vote"  # as arenas write them
Talks = dict[str, list[Turn]]
"""The turns of each model, those of models that are not shown now included."""


class CompareWidgets(NamedTuple):
    """The tab's widgets; `order` holds the models by column."""

    order: Any
    models: Any
    hide: Any
    columns: list
    votes: list
    box: Any
    stop: Any
    clear: Any
    parameters: list

    def outputs(self) -> list:
        """The widgets that `view` updates, in its order."""
        return [self.order, self.models, self.hide, *self.columns, *self.votes, self.stop]


def _widgets(offers: list[dict]) -> CompareWidgets:
    import gradio as gr

    with gr.Row():
        with gr.Column(scale=4):
            models = gr.Dropdown([], multiselect=True, max_choices=MAX_COLUMNS,
                                 label="Models, two to four", elem_id="models")  # fmt: skip
        with gr.Column(min_width=240):
            hide = gr.Checkbox(label="Hide names until a vote")
    with gr.Row():
        columns = [
            gr.Chatbot(label="", height="42vh", min_width=260, visible=place < 2, buttons=["copy"])
            for place in range(MAX_COLUMNS)
        ]
    with gr.Row():
        votes = [small_button("", visible=place < 2) for place in range(MAX_COLUMNS)]
        votes += [small_button("Tie"), small_button("All bad")]
    box = question_box("Your question to all", offers)
    with gr.Row():
        stop, clear = small_button("Stop"), small_button("Clear", interactive=True)
    return CompareWidgets(gr.State([]), models, hide, columns, votes, box, stop, clear, settings())


def compare_tab(client: WorkerClient, log: FeedbackLog, offers: list[dict]):
    """Build the tab; returns its choice of models."""
    import gradio as gr

    talks, tab = gr.State({}), _widgets(offers)

    async def send(message, order, talks, hide, preprocess, *parameters):
        with told():
            if not 2 <= len(order) <= MAX_COLUMNS:
                raise PageError(f"Choose two to {MAX_COLUMNS} models to compare.")
        turn = await turn_of(message, preprocess)
        if hide and not any(talks.values()):
            order = random.sample(order, len(order))
        for model in order:
            talks.setdefault(model, []).append(copy.copy(turn))
        yield [None, *view(order, talks, hide, busy=True)]
        chosen = {model: talks[model] for model in order}
        async for _ in fill(client, chosen, options_of(*parameters)):
            yield [gr.skip(), *view(order, talks, hide, busy=True)]
        yield [gr.skip(), *view(order, talks, hide)]

    def vote(place: int):
        async def write(order, talks, hide, request: gr.Request):
            await asyncio.to_thread(cast, log, place, order, talks, hide, request.client.host)
            return view(order, talks, hide)

        return write

    def choose(models, order, talks, hide):
        return view(sorted(models, key=[*order, *models].index), talks, hide)

    def clear(order, hide):
        return {}, *view(order, {}, hide)

    def forget(place: int, order, talks, hide):
        if place < len(order):
            talks.pop(order[place], None)
        return view(order, talks, hide)

    given, outputs = [tab.order, talks, tab.hide], tab.outputs()
    asked, answered = [tab.box, *given, *tab.parameters], [tab.box, *outputs]
    running = tab.box.submit(send, asked, answered, show_progress="hidden")
    tab.stop.click(None, cancels=running).then(view, given, outputs)
    cleared = [talks, *outputs]
    tab.clear.click(clear, [tab.order, tab.hide], cleared, cancels=running)
    for place, column in enumerate(tab.columns):
        column.clear(functools.partial(forget, place), given, outputs, show_progress="hidden")
    for place, button in enumerate(tab.votes):
        button.click(vote(place), given, outputs, show_progress="hidden", **ONE_BY_ONE)
    tab.models.change(choose, [tab.models, *given], outputs, show_progress="hidden")
    tab.hide.change(view, given, outputs, show_progress="hidden")
    return tab.models


def view(order: list[str], talks: Talks, hide: bool, busy: bool = False) -> list:
    """The tab's outputs: a column and a vote for each model, and what can be done now."""
    import gradio as gr

    names, voted = _names(order, talks, hide), {turn.vote for turn in _last(order, talks)}
    able, begun = not busy and comparable(order, talks), any(talks.values())
    hidden = [gr.update(visible=False)] * (MAX_COLUMNS - len(order))

    def vote(kind: str, label: str):
        look = "primary" if kind in voted else "secondary"
        return gr.update(value=label, interactive=able, variant=look, visible=True)

    return [
        order,
        gr.update(interactive=not busy and not (hide and begun)),
        gr.update(interactive=not busy and not begun),
        *(
            gr.update(label=name, value=chatbot_messages(talks.get(model, [])), visible=True)
            for name, model in zip(names, order, strict=True)
        ),
        *hidden,
        *(vote(model, f"Best: {name}") for name, model in zip(names, order, strict=True)),
        *hidden,
        vote(TIE, "Tie"),
        vote(BAD, "All bad" if len(order) > 2 else "Both bad"),
        gr.update(interactive=busy),
    ]


def cast(log: FeedbackLog, place: int, order: list[str], talks: Talks, hide: bool, ip: str) -> None:
    """FeedbackLog a vote for the column at `place`, or for TIE or BAD after all of them, once."""
    if not comparable(order, talks):
        return
    best = order[place] if place < len(order) else None
    kind = (TIE, BAD)[place - MAX_COLUMNS] if place >= MAX_COLUMNS else "bestvote"
    if best and len(order) == 2:
        kind = ("leftvote", "rightvote")[place]
    anonymous = _names(order, talks, hide) != order
    log.write_vote(kind, [talks[model] for model in order], best, anonymous, ip)
    for turn in _last(order, talks):
        turn.vote = best or kind


def comparable(order: list[str], talks: Talks) -> bool:
    """Whether all have answered the same question and nobody has voted on it."""
    last = _last(order, talks)
    same = len({(turn.text, *turn.files) for turn in last}) == 1
    return same and 2 <= len(order) == len(last) and all(t.answer and not t.vote for t in last)


def _last(order: list[str], talks: Talks) -> list[Turn]:
    return [talks[model][-1] for model in order if talks.get(model)]


def _names(order: list[str], talks: Talks, hide: bool) -> list[str]:
    """The columns' titles: hidden names are shown once there was a vote."""
    if hide and not any(turn.vote for model in order for turn in talks.get(model, [])):
        return [f"Model {letter}" for letter in "ABCD"[: len(order)]]
    return order
