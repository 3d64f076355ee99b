"""The tab that asks two to four models the same, side by side."""

from __future__ import annotations

import copy
import functools

from llava.serve.page.controls import options_of, question_box, settings, told, turn_of
from llava.serve.page.talk import Talk, Trouble
from llava.serve.page.turns import Turn, fill, shown

MOST = 4


def compare_tab(talk: Talk):
    """Build the tab; returns its choice of models."""
    import gradio as gr

    talks = gr.State({})  # model -> its turns
    models = gr.Dropdown([], multiselect=True, max_choices=MOST, label="Models, two to four",
                         elem_id="models")  # fmt: skip
    with gr.Row():
        columns = [
            gr.Chatbot(label="", height="50vh", min_width=260, visible=place < 2, buttons=["copy"])
            for place in range(MOST)
        ]
    box = question_box("Your question to all")
    with gr.Row():
        stop = gr.Button("Stop", interactive=False, min_width=110, size="sm")
        clear = gr.Button("Clear", min_width=110, size="sm")
    parameters = settings()
    outputs = [*columns, stop]

    def view(models: list[str], talks: dict[str, list[Turn]], busy: bool = False) -> list:
        """The outputs: a column for each model, and whether there is something to stop."""
        shows = [
            gr.update(label=model, value=shown(talks.get(model, [])), visible=True)
            for model in models
        ]
        hidden = [gr.update(visible=False)] * (MOST - len(models))
        return [*shows, *hidden, gr.update(interactive=busy)]

    async def send(message, models, talks, preprocess, *parameters):
        with told():
            if not 2 <= len(models) <= MOST:
                raise Trouble(f"Choose two to {MOST} models to compare.")
        turn = await turn_of(message, preprocess)
        for model in models:
            talks.setdefault(model, []).append(copy.copy(turn))
        yield [None, *view(models, talks, busy=True)]
        chosen = {model: talks[model] for model in models}
        async for _ in fill(talk, chosen, options_of(*parameters)):
            yield [gr.skip(), *view(models, talks, busy=True)]
        yield [gr.skip(), *view(models, talks)]

    def forget(place: int, models, talks):
        if place < len(models):
            talks.pop(models[place], None)
        return view(models, talks)

    given = [models, talks]
    running = box.submit(send, [box, *given, *parameters], [box, *outputs], show_progress="hidden")
    stop.click(None, cancels=running).then(view, given, outputs)
    clear.click(lambda models: ({}, *view(models, {})), models, [talks, *outputs], cancels=running)
    for place, column in enumerate(columns):
        column.clear(functools.partial(forget, place), given, outputs, show_progress="hidden")
    models.change(view, given, outputs, show_progress="hidden")
    return models
