"""Continuous batching on a real small model: the same answers as one by one, in a fair order."""

from __future__ import annotations

import threading

import pytest
import torch
from PIL import Image
from transformers.cache_utils import DynamicLayer

from llava.conversation import get_template
from llava.errors import InputError
from llava.eval.answer import Answerer, generation_options, single_turn
from llava.serve.batching import Engine, QueuedPrompt
from llava.serve.text_stream import TextStream, visible_text

TEXTS = ("What is this?", "Name it.", "What colours does the picture show, and where?", "Why?")


class Listener:
    """Gathers what the engine tells, and waits for the end."""

    def __init__(self, order: list | None = None, name=None):
        self.news: list = []
        self.ended, self.began = threading.Event(), threading.Event()
        self.order, self.name = order, name

    def __call__(self, news) -> None:
        self.began.set()
        if news is None or isinstance(news, Exception):
            if self.order is not None:
                self.order.append(self.name)
            self.ended.set()
        if news is not None:
            self.news.append(news)

    def answer(self):
        assert self.ended.wait(300), "no end was told"
        return self.news[-1] if self.news else ""


@pytest.fixture
def engine(answerer):
    engine = Engine(answerer, 3)
    yield engine
    engine.close()


def asked(answerer, pictures, text: str, tell, shot: int | None = 0, **more) -> QueuedPrompt:
    images = [] if shot is None else [answerer.picture(Image.open(pictures / f"{shot}.png"))]
    text = "<image>\n" * len(images) + text
    options = {"temperature": 0, "top_p": 1.0, "max_new_tokens": 12, "stop": "###"} | more
    prompt = single_turn(get_template("llava_v0"), text)
    return QueuedPrompt(prompt, images, tell=tell, **options)


def test_many_at_once_answer_as_each_does_alone(engine, answerer, pictures):
    listeners, expected = [], []
    for i in range(10):  # of different lengths, with and without a picture, over three rows
        listeners.append(Listener())
        question = asked(
            answerer, pictures, TEXTS[i % 4], listeners[-1], shot=None if i == 4 else i % 7,
            max_new_tokens=3 + 2 * i,
        )  # fmt: skip
        options = generation_options(0, question.max_new_tokens)
        expected += answerer.answer([question.prompt], [question.pictures], "###", options)
        engine.ask(question)
    assert [listener.answer() for listener in listeners] == expected
    assert len(set(expected)) > 3
    assert engine.length == 0
    clean = [listener.news for listener in listeners if "\ufffd" not in "".join(listener.news)]
    assert len(clean) > 2  # noise may make bytes that are no text, which change what was before
    for texts in clean:  # every piece is the beginning of the next
        assert all(b.startswith(a) for a, b in zip(texts, texts[1:], strict=False))


def test_who_came_first_is_taken_first(engine, answerer, pictures):
    order: list[int] = []
    listeners = [Listener(order, i) for i in range(9)]
    held = threading.Event()
    engine.call(held.wait)  # all are there before the first is taken
    for listener in listeners:
        engine.ask(asked(answerer, pictures, "Why?", listener, max_new_tokens=8))
    held.set()
    for listener in listeners:
        listener.answer()
    assert order == list(range(9))


def test_who_hangs_up_makes_room_at_once(engine, answerer, pictures, monkeypatch):
    monkeypatch.setattr(Answerer, "ends", set())
    order: list[str] = []
    began, held = threading.Event(), threading.Event()

    def hold(news):
        began.set()
        held.wait(300)

    more = {"temperature": 5.0, "stop": "", "max_new_tokens": 150}
    tells = [Listener(order, "long"), Listener(order, "cancelled"), hold]
    questions = [asked(answerer, pictures, TEXTS[0], tell, **more) for tell in tells]
    for question in questions:
        engine.ask(question)
    assert began.wait(300)  # the three rows are taken
    waiting, gone = Listener(order, "waiting"), Listener(order, "gone")
    left = asked(answerer, pictures, TEXTS[1], gone)
    engine.ask(left)
    engine.ask(asked(answerer, pictures, TEXTS[1], waiting))
    left.cancelled = questions[1].cancelled = True
    held.set()
    waiting.answer()
    tells[0].answer()
    assert order == ["waiting", "long"]


def test_one_questions_trouble_is_its_own(engine, answerer, pictures):
    good, bad, mismatched = Listener(), Listener(), Listener()
    engine.ask(asked(answerer, pictures, TEXTS[0], good, max_new_tokens=30, stop=""))
    engine.ask(asked(answerer, pictures, "word " * 300, bad))
    question = asked(answerer, pictures, TEXTS[0], mismatched)
    question.prompt = question.prompt.replace("<image>", "<image> <image>")
    engine.ask(question)
    assert isinstance(bad.answer(), InputError)
    assert "this model reads 256" in str(bad.answer())
    assert isinstance(mismatched.answer(), InputError)
    assert isinstance(good.answer(), str)


def test_a_failing_step_loses_its_rows_and_no_more(engine, answerer, pictures, monkeypatch):
    first, second = Listener(), Listener()
    forward, failed = answerer.model.forward, []

    def fails(*args, **kwargs):
        if kwargs.get("position_ids") is not None and not failed:
            failed.append(True)
            raise RuntimeError("out of memory")
        return forward(*args, **kwargs)

    monkeypatch.setattr(answerer.model, "forward", fails)
    engine.ask(asked(answerer, pictures, TEXTS[0], first))
    assert str(first.answer()) == "out of memory"
    engine.ask(asked(answerer, pictures, TEXTS[0], second))
    assert isinstance(second.answer(), str)
    assert engine.length == 0


class Full(DynamicLayer):
    """A cache layer whose values do not fit into the memory when they are copied."""

    def get(self):
        raise torch.OutOfMemoryError("no memory for the values")

    values = property(get, lambda self, value: None)


def test_a_join_that_fails_half_way_harms_nobody_else(engine, answerer, pictures, monkeypatch):
    forward, joining = answerer.model.forward, []

    def fills_the_last_layer(*args, **kwargs):
        output = forward(*args, **kwargs)
        if kwargs.get("inputs_embeds") is not None:
            joining.append(kwargs["past_key_values"])
            if len(joining) == 2:
                joining[-1].layers[-1].__class__ = Full
        return output

    listeners = [Listener() for _ in range(3)]
    more = {"stop": "@@@@", "max_new_tokens": 40}
    questions = [
        asked(answerer, pictures, text, tell, **more)
        for text, tell in zip(TEXTS, listeners, strict=False)
    ]
    options = generation_options(0, 40)
    first, _, third = (
        answerer.answer([q.prompt], [q.pictures], q.stop, options)[0] for q in questions
    )
    monkeypatch.setattr(answerer.model, "forward", fills_the_last_layer)
    held = threading.Event()
    engine.call(held.wait)
    for question in questions:
        engine.ask(question)
    held.set()
    assert "no memory for the values" in str(listeners[1].answer())
    assert (listeners[0].answer(), listeners[2].answer()) == (first, third)


def test_a_departure_that_fails_half_way_loses_who_was_there_and_no_more(
    engine, answerer, pictures, monkeypatch
):
    forward, steps = answerer.model.forward, []

    def fills_the_last_layer(*args, **kwargs):
        output = forward(*args, **kwargs)
        if kwargs.get("position_ids") is not None:
            steps.append(len(kwargs["position_ids"]))
            if steps == [1, 2]:  # the first leaves after its third token
                kwargs["past_key_values"].layers[-1].__class__ = Full
        return output

    monkeypatch.setattr(answerer.model, "forward", fills_the_last_layer)
    monkeypatch.setattr(Answerer, "ends", set())
    listeners = [Listener() for _ in range(3)]
    held = threading.Event()
    engine.call(held.wait)
    for listener, tokens in zip(listeners, (3, 40), strict=False):
        engine.ask(asked(answerer, pictures, "Why?", listener, stop="@", max_new_tokens=tokens))
    held.set()
    assert "no memory for the values" in str(listeners[1].answer())
    assert listeners[0].ended.is_set()
    assert isinstance(listeners[0].answer(), str)
    engine.ask(asked(answerer, pictures, "Why?", listeners[2]))
    assert isinstance(listeners[2].answer(), str)
    assert engine.length == 0


def test_who_cannot_be_told_takes_nobody_along(engine, answerer, pictures):
    def closed(news):
        raise RuntimeError("Event loop is closed")

    listeners = [Listener(), Listener()]
    held = threading.Event()
    engine.call(held.wait)
    for tell in (listeners[0], closed, listeners[1]):
        engine.ask(asked(answerer, pictures, "Why?", tell))
    engine.ask(asked(answerer, pictures, "word " * 300, closed))
    held.set()
    assert all(isinstance(listener.answer(), str) for listener in listeners)
    last = Listener()
    engine.ask(asked(answerer, pictures, "Why?", last))
    assert isinstance(last.answer(), str)
    assert engine.length == 0


def test_an_answer_ends_where_the_context_does(engine, answerer, pictures):
    listener = Listener()
    engine.ask(
        asked(answerer, pictures, TEXTS[0], listener, stop="", max_new_tokens=1000, temperature=9.0)
    )
    assert isinstance(listener.answer(), str)


def test_sampling_follows_temperature_and_top_p(answerer):
    from llava.serve.batching import choose

    def question(temperature, top_p):
        return QueuedPrompt("", (), temperature, top_p, 1, "", lambda news: None)

    torch.manual_seed(0)
    logits = torch.tensor([[3.0, 2.0, -5.0]] * 4)
    kinds = [question(0, 1), question(1.0, 1.0), question(1.0, 0.5), question(100.0, 1.0)]
    drawn = torch.stack([choose(logits, kinds) for _ in range(600)])
    shares = [(drawn[:, i] == torch.arange(3)[:, None]).float().mean(1) for i in range(4)]
    assert shares[0].tolist() == [1, 0, 0]
    assert shares[2].tolist() == [1, 0, 0]
    torch.testing.assert_close(shares[1], logits[0].softmax(0), atol=0.06, rtol=0)
    assert shares[3].min() > 0.25


def test_a_stopped_engine_says_so_to_all(answerer, pictures, monkeypatch):
    """To who is being answered, waits, has called, and to who comes later."""
    monkeypatch.setattr(Answerer, "ends", set())
    engine = Engine(answerer, 1)
    running, waiting, late = Listener(), Listener(), Listener()
    held = threading.Event()

    def told(news):
        running(news)
        held.wait(300)

    engine.ask(asked(answerer, pictures, TEXTS[0], told, stop="@@", max_new_tokens=200))
    assert running.began.wait(300)
    engine.ask(asked(answerer, pictures, TEXTS[0], waiting))
    called = [engine.call(int) for _ in range(3)]
    closing = threading.Thread(target=engine.close)
    closing.start()
    while not engine._closed:
        pass
    held.set()
    closing.join()
    engine.ask(asked(answerer, pictures, TEXTS[0], late))
    called.append(engine.call(int))
    for listener in (running, waiting, late):
        assert "stopped" in str(listener.answer())
        assert isinstance(listener.news[-1], InputError)
    for future in called:
        with pytest.raises(InputError, match="stopped"):
            future.result(30)
    assert engine.length == 0
    engine.close()
    with pytest.raises(InputError, match="--limit-model-concurrency 0"):
        Engine(answerer, 0)


def test_what_may_begin_the_end_mark_waits():
    assert visible_text("cat #", "###", False) == "cat "
    assert visible_text("cat #", "###", True) == "cat #"
    assert visible_text("cat ### USER", "###", False) == "cat "
    assert visible_text("cat", "", False) == "cat"


def test_half_a_character_waits(answerer):
    ids = answerer.tokenizer("é☃", add_special_tokens=False).input_ids
    generated, told = TextStream(answerer.tokenizer, "###", {2}), []
    for token in ids:
        assert not generated.add(token)
        told.append(generated.text(False))
    assert generated.add(2)
    assert "\ufffd" not in "".join(t or "" for t in told)
    assert (generated.text(True) or told[-1]) == "é☃"
