"""Many conversations on one model at once: continuous batching.

One thread owns the model. In each step it takes in at most one waiting question (its prompt runs
through the model by itself, and its cache joins the others', padded on the left), then makes one
token for everybody. Who is finished, or has hung up, leaves before the next step. Questions are
taken in as they came; who came while all rows were taken waits for the first that is free.
"""

from __future__ import annotations

import collections
import dataclasses
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from typing import Any, Protocol, cast

import torch
from transformers import DynamicCache, TemperatureLogitsWarper, TopPLogitsWarper

from llava.errors import InputError
from llava.eval.answer import Answerer, Picture, TooLongError
from llava.serve.protocol import GREEDY_BELOW
from llava.serve.text_stream import TextStream

STOPPED = "the worker was stopped"


@dataclasses.dataclass(eq=False)
class QueuedPrompt:
    """A prompt on its way through the engine.

    `tell` is called from the engine's thread: with the text so far whenever there is more of it,
    at the end with None, or with the exception that ended it. When it raises, nobody listens.
    """

    prompt: str
    pictures: Sequence[Picture]
    temperature: float
    top_p: float
    max_new_tokens: int
    stop: str
    tell: Callable[[str | Exception | None], object]
    cancelled: bool = False


@dataclasses.dataclass(eq=False)
class Row:
    """A question that is being answered; `position` is that of its next token."""

    question: QueuedPrompt
    generated: TextStream
    position: int
    left: int  # how many tokens it may still make; 0 once its end was told


class FilledLayer(Protocol):
    """A layer of a cache: keys and values, each (rows, heads, length, head size)."""

    keys: torch.Tensor
    values: torch.Tensor


class Engine:
    """The thread that answers; `rows` questions at most are answered at the same time."""

    def __init__(self, answerer: Answerer, rows: int):
        if rows < 1:
            raise InputError(f"--limit-model-concurrency {rows}: at least 1 is expected")
        self.answerer, self.most = answerer, rows
        self.rows: list[Row] = []
        self._cache: DynamicCache | None = None
        self._mask = torch.zeros(0, 0, dtype=torch.long)
        self._next = torch.zeros(0, 1, dtype=torch.long)
        self._waiting: collections.deque[QueuedPrompt] = collections.deque()
        self._calls: collections.deque[tuple[Callable[[], Any], Future]] = collections.deque()
        self._changed = threading.Condition()
        self._closed = False
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)
        self._thread.start()

    @property
    def length(self) -> int:
        """The number of questions that are being answered or wait."""
        return len(self.rows) + len(self._waiting)

    def ask(self, question: QueuedPrompt) -> None:
        """Put a question in the queue; one that comes after `close` gets an error at once."""
        with self._changed:
            if not self._closed:
                self._waiting.append(question)
                self._changed.notify()
                return
        _say(question, InputError(STOPPED))

    def call(self, function: Callable[[], Any]) -> Future:
        """Run `function`, which uses the model, between two steps."""
        future: Future = Future()
        with self._changed:
            if not self._closed:
                self._calls.append((function, future))
                self._changed.notify()
                return future
        future.set_exception(InputError(STOPPED))
        return future

    def close(self) -> None:
        """Stop; questions without a whole answer get an error."""
        with self._changed:
            self._closed = True
            self._changed.notify()
        self._thread.join()

    # -- the engine's thread ---------------------------------------------------------------------

    @torch.inference_mode()
    def _run(self) -> None:
        try:
            while self._turn():
                pass
        finally:
            self._end()

    def _turn(self) -> bool:
        """Run a call, take in a question, make a step; False when the engine was closed."""
        with self._changed:
            while not (self._closed or self._calls or self._waiting or self.rows):
                self._changed.wait()
            if self._closed:
                return False
            call = self._calls.popleft() if self._calls else None
            question = self._first() if len(self.rows) < self.most else None
        if call is not None:
            _run_call(*call)
        if question is not None:
            try:
                self._take_in(question)
            except Exception as error:
                _say(question, error)
        try:
            self._step()
        except Exception as error:  # out of memory, say: these are lost, the next are not
            lost, self.rows, self._cache = self.rows, [], None
            for row in lost:
                if row.left:
                    _say(row.question, error)
        return True

    def _end(self) -> None:
        """Tell all who are not answered that nothing more will come."""
        with self._changed:
            self._closed = True
            rows, waiting, calls = self.rows, self._waiting, self._calls
            self.rows, self._waiting, self._calls = [], collections.deque(), collections.deque()
        for question in [*(row.question for row in rows if row.left), *waiting]:
            _say(question, InputError(STOPPED))
        for _, future in calls:
            if future.set_running_or_notify_cancel():
                future.set_exception(InputError(STOPPED))

    def _first(self) -> QueuedPrompt | None:
        while self._waiting:
            question = self._waiting.popleft()
            if not question.cancelled:
                return question
        return None

    def _take_in(self, question: QueuedPrompt) -> None:
        """Run a prompt through the model, make its first token, and give it a row."""
        sizes = [size for _, size in question.pictures]
        try:
            ids, room = self.answerer.tokens(question.prompt, sizes)
        except TooLongError as error:
            raise InputError(f"{error}. Clear the talk and start anew, or ask for less") from None
        embeds = embedded(self.answerer, ids[None], question.pictures)
        length = embeds.shape[1]
        mask = torch.ones(1, length, dtype=torch.long, device=embeds.device)
        cache = DynamicCache()
        logits = self.answerer.model(
            inputs_embeds=embeds, attention_mask=mask, past_key_values=cache, use_cache=True
        ).logits[:, -1]
        generated = TextStream(self.answerer.tokenizer, question.stop, self.answerer.ends)
        row = Row(question, generated, length, min(question.max_new_tokens, room))
        token = choose(logits, [question])
        if self._tell(row, int(token)):
            return
        if self._cache is not None:  # others are being answered
            following = torch.cat([self._next, token[:, None]])
            self._mask = join(self._cache, self._mask, cache, mask)
            self._next = following
        else:
            self._cache, self._mask, self._next = cache, mask, token[:, None]
        self.rows.append(row)

    def _step(self) -> None:
        """One more token for every row that goes on."""
        self._keep([i for i, row in enumerate(self.rows) if not row.question.cancelled])
        if not self.rows:
            return
        self._mask = torch.cat([self._mask, torch.ones_like(self._next)], 1)
        positions = torch.tensor([[row.position] for row in self.rows], device=self._next.device)
        logits = self.answerer.model(
            input_ids=self._next,
            attention_mask=self._mask,
            position_ids=positions,
            past_key_values=self._cache,
            use_cache=True,
        ).logits[:, -1]
        tokens = choose(logits, [row.question for row in self.rows])
        self._next = tokens[:, None]
        going = []
        for i, (row, token) in enumerate(zip(self.rows, tokens.tolist(), strict=True)):
            row.position += 1
            if not self._tell(row, token):
                going.append(i)
        self._keep(going)

    def _keep(self, kept: list[int]) -> None:
        """Let all rows but these go."""
        if len(kept) == len(self.rows):
            return
        self.rows = [self.rows[i] for i in kept]
        if not kept:
            self._cache = None
            return
        index = torch.tensor(kept, device=self._next.device)
        self._next, self._mask = self._next[index], self._mask[index]
        start = int(self._mask.argmax(1).min())  # what is padding in all rows goes
        self._mask = self._mask[:, start:]
        assert self._cache is not None  # rows have a cache
        for layer in _filled(self._cache):  # one that fails half-way fails its step: all are lost
            layer.keys = layer.keys[index][:, :, start:]
            layer.values = layer.values[index][:, :, start:]

    def _tell(self, row: Row, token: int) -> bool:
        """Add a token to a row's text and tell it; whether the answer ends with it."""
        row.left -= 1
        done = row.generated.add(token) or row.left == 0
        text = row.generated.text(done)
        if text is not None:
            _say(row.question, text)
        if done:
            row.left = 0
            _say(row.question, None)
        return done


def embedded(answerer: Answerer, ids: torch.Tensor, pictures: Sequence[Picture]) -> torch.Tensor:
    """(1, length, hidden) embeddings of ids (1, n) with pictures in the places of image tokens."""
    model = answerer.model
    ids = ids.to(model.device)
    if not pictures:
        return model.get_input_embeddings()(ids)
    placed = answerer.placed(pictures)
    return model.prepare_inputs_labels_for_multimodal(ids, None, None, None, None, *placed)[4]


def choose(logits: torch.Tensor, questions: Sequence[QueuedPrompt]) -> torch.Tensor:
    """The next token of each row, (rows,), by its own temperature and top-p."""
    tokens = logits.argmax(-1)
    for i, question in enumerate(questions):
        if question.temperature > GREEDY_BELOW:
            scores = TemperatureLogitsWarper(question.temperature)(None, logits[i : i + 1].float())
            if question.top_p < 1:
                scores = TopPLogitsWarper(question.top_p)(None, scores)
            tokens[i] = torch.multinomial(scores.softmax(-1), 1)[0, 0]
    return tokens


def join(cache: DynamicCache, mask, other: DynamicCache, other_mask) -> torch.Tensor:
    """Add the rows of `other` to `cache`; shorter ones are padded on the left. Returns the mask.

    All is built before the first layer changes: when the memory does not suffice, `cache` is whole.
    """
    length = max(mask.shape[1], other_mask.shape[1])

    def joined(one, two, dim):
        return torch.cat([pad(one, dim), pad(two, dim)])

    def pad(tensor, dim):
        missing = length - tensor.shape[dim]
        spare = tensor.new_zeros(*tensor.shape[:dim], missing, *tensor.shape[dim + 1 :])
        return torch.cat([spare, tensor], dim)

    built = [
        (joined(layer.keys, more.keys, 2), joined(layer.values, more.values, 2))
        for layer, more in zip(_filled(cache), _filled(other), strict=True)
    ]
    mask = joined(mask, other_mask, 1)
    for layer, (keys, values) in zip(_filled(cache), built, strict=True):
        layer.keys, layer.values = keys, values
    return mask


def _filled(cache: DynamicCache) -> list[FilledLayer]:
    """The layers of a cache after a prompt has run through the model."""
    return cast("list[FilledLayer]", cache.layers)  # without keys only before the first run


def _say(question: QueuedPrompt, news: str | Exception | None) -> None:
    try:
        question.tell(news)
    except Exception:  # its event loop is closed, say: it has hung up, and no other may suffer
        question.cancelled = True


def _run_call(function: Callable[[], Any], future: Future) -> None:
    if future.set_running_or_notify_cancel():
        try:
            future.set_result(function())
        except Exception as error:
            future.set_exception(error)
