"""The loop of an evaluation: questions in, answers out, and nothing lost when it is cut short.

Answers gather in `ANSWERS.part0` beside the answers file, under torchrun one for each process. The
same command started again takes over what is there; at the end the answers file appears whole.
"""

from __future__ import annotations

import argparse
import collections
import contextlib
import dataclasses
import hashlib
import json
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llava.atomic import write_text
from llava.errors import InputError
from llava.eval.answer import (
    Answerer,
    Picture,
    TooLongError,
    add_model_flags,
    end_mark,
    generation_options,
    single_turn,
)
from llava.eval.questions import answer_id, get_chunk
from llava.process_group import end_process_group

if TYPE_CHECKING:
    from PIL import Image

    from llava.conversation import Conversation

SAME_ANSWERS = ("answers_file", "batch_size", "device", "num_workers")
"""Flags that may differ between a run that was cut short and the one that goes on."""


@dataclasses.dataclass(frozen=True)
class Question:
    """One thing to ask: the user's text, and what opens each of its pictures.

    `record` is the answer's line in the file; the answer goes in at its key `text`.
    """

    record: dict[str, Any]
    text: str
    pictures: Sequence[Callable[[], Image.Image]] = ()


def parser(doc: str, conv_mode: str = "llava_v1") -> argparse.ArgumentParser:
    """The flags that all evaluation entries share.

    `doc` is the entry's docstring, `conv_mode` the template that it takes when none is named.
    """
    parser = argparse.ArgumentParser(description=doc.split("\n")[0])
    add_model_flags(parser)
    parser.add_argument("--image-folder", default="")
    parser.add_argument("--question-file", default="tables/question.jsonl")
    parser.add_argument("--answers-file", default="answer.jsonl")
    parser.add_argument(
        "--conv-mode", help=f"else the config's conversation_template, else {conv_mode}"
    )
    parser.set_defaults(default_conv_mode=conv_mode)
    parser.add_argument("--num-chunks", type=int, default=1)
    parser.add_argument("--chunk-idx", type=int, default=0)
    parser.add_argument("--temperature", type=float, default=0.2, help="0 is greedy")
    parser.add_argument("--top_p", type=float, default=None)
    parser.add_argument("--num_beams", type=int, default=1)
    parser.add_argument("--max_new_tokens", type=int, default=1024)
    parser.add_argument("--batch_size", type=int, default=1, help="questions asked at once")
    parser.add_argument("--num_workers", type=int, default=4, help="threads that open pictures")
    return parser


def run(
    args: argparse.Namespace,
    rows: Sequence[dict],
    ask: Callable[[dict], list[Question]],
    mmtag: bool = False,
) -> None:
    """Answer this process's share of `rows` and write `args.answers_file`.

    Under torchrun the processes divide the chunk and process 0 writes. `ask` makes the questions of
    a row; `mmtag` is as in `Answerer.template`.
    """
    rank, world = (int(os.environ.get(name, n)) for name, n in (("RANK", 0), ("WORLD_SIZE", 1)))
    rows = get_chunk(get_chunk(rows, args.num_chunks, args.chunk_idx), world, rank)
    if args.batch_size < 1 or args.num_workers < 1:
        raise InputError("--batch_size and --num_workers must be at least 1")
    questions = [question for row in rows for question in ask(row)]

    path = Path(args.answers_file).expanduser()
    if path.is_dir():
        raise InputError(f"--answers-file {path}: a folder is there")
    part = path.with_name(f"{path.name}.part{rank}")
    settings = json.dumps(_settings(args, rows, world), sort_keys=True, default=str)
    answers = _earlier(part, settings)
    if answers and rank == 0:
        print(f"{part}: going on after {len(answers)} answers", file=sys.stderr)
    write_text(part, "".join(f"{line}\n" for line in [settings, *map(json.dumps, answers)]))
    if world > 1:
        args = _join(args)
    if todo := questions[len(answers) :]:
        with open(part, "a") as file:
            for answer in _report(_answers(args, todo, mmtag), len(todo)):
                answers.append(answer)
                file.write(json.dumps(answer) + "\n")
                file.flush()
    if world > 1:
        answers = _gather(answers, world)
    if rank == 0:
        write_text(path, "".join(json.dumps(answer) + "\n" for answer in answers))
    if world > 1:
        _leave()  # nobody throws away its part before the whole is written
    part.unlink()


def _answers(args, questions: list[Question], mmtag: bool) -> Iterator[dict]:
    """The answers' records, in order."""
    options = generation_options(args.temperature, args.max_new_tokens, args.top_p, args.num_beams)
    answerer = Answerer.load(args)
    template = answerer.template(args.conv_mode, args.default_conv_mode, mmtag)
    _check(answerer, template, questions, args.question_file)
    size = args.batch_size
    batches = [questions[i : i + size] for i in range(0, len(questions), size)]

    def prepare(question: Question) -> tuple[str, list[Picture]]:
        with _named(question):
            prompt = _prompt(answerer, template, question)
            return prompt, [answerer.picture(opened()) for opened in question.pictures]

    for batch, prepared in _ahead(batches, prepare, args.num_workers):
        prompts, pictures = zip(*prepared, strict=True)
        answers = answerer.answer(prompts, pictures, end_mark(template), options)
        for question, answer in zip(batch, answers, strict=True):
            ending = {"answer_id": answer_id(), "model_id": answerer.name, "metadata": {}}
            yield {**question.record, "text": answer, **ending}


def _prompt(answerer: Answerer, template: Conversation, question: Question) -> str:
    text = answerer.with_pictures(question.text, len(question.pictures))
    return single_turn(template, text)


@contextlib.contextmanager
def _named(question: Question) -> Iterator[None]:
    """Inside, an `InputError` says which question it is about."""
    try:
        yield
    except InputError as error:
        message = f"question {question.record['question_id']}: {error}"
        raise type(error)(message) from None


def _check(
    answerer: Answerer, template: Conversation, questions: Sequence[Question], file: str
) -> None:
    """`InputError` if a prompt does not fit, before the first is answered.

    An answers file without some of its answers would be scored as if they were wrong, and to stop
    at the first of them in the middle of the night is worse than at its beginning.
    """
    too_long = []
    for question in questions:
        try:
            with _named(question):
                prompt, pictures = _prompt(answerer, template, question), question.pictures
                if answerer.at_most(prompt, len(pictures)) >= answerer.context_length:
                    answerer.tokens(prompt, [opened().size for opened in pictures])
        except TooLongError as error:
            too_long.append(str(error))
    if too_long:
        more = f" ({len(too_long)} such questions)" if len(too_long) > 1 else ""
        raise InputError(f"{file}: {too_long[0]}{more}; nothing was asked")


def _ahead(batches: list[list], prepare: Callable, workers: int) -> Iterator[tuple[list, list]]:
    """Each batch with what `prepare` makes of its items, worked out in threads a little ahead."""
    from concurrent.futures import ThreadPoolExecutor

    with ThreadPoolExecutor(workers) as pool:
        waiting: collections.deque = collections.deque()
        for batch in batches:
            waiting.append((batch, [pool.submit(prepare, item) for item in batch]))
            if len(waiting) > 1 + workers // len(batch):
                batch, futures = waiting.popleft()
                yield batch, [future.result() for future in futures]
        for batch, futures in waiting:
            yield batch, [future.result() for future in futures]


def _report(answers: Iterator[dict], total: int) -> Iterator[dict]:
    """Show how far the answers are: a bar on a terminal, else a line for every tenth."""
    from tqdm import tqdm

    for done, answer in enumerate(tqdm(answers, total=total, disable=None), 1):
        yield answer
        if not sys.stderr.isatty() and done * 10 // total > (done - 1) * 10 // total:
            print(f"{done} of {total} questions", file=sys.stderr, flush=True)


def _settings(args: argparse.Namespace, rows: Sequence[dict], world: int) -> dict[str, Any]:
    """All that the answers depend on: flags, questions, the model's files by size and time."""
    files = [
        (str(file), file.stat().st_size, file.stat().st_mtime_ns)
        for model in (args.model_path, args.model_base)
        if model
        for file in _files(Path(model).expanduser())
    ]
    told = {name: value for name, value in vars(args).items() if name not in SAME_ANSWERS}
    digest = hashlib.sha256(json.dumps([rows, files]).encode()).hexdigest()
    return {**told, "world": world, "questions_and_model": digest}


def _files(model: Path) -> list[Path]:
    """The files of a folder, or the one that is a model by itself; none for a name on the hub."""
    return [model] if model.is_file() else sorted(model.glob("*"))


def _earlier(part: Path, settings: str) -> list[dict]:
    """The answers that the same evaluation has left; a line that was not finished is dropped."""
    try:
        first, *lines = part.read_text().split("\n")
    except FileNotFoundError:
        return []
    return [json.loads(line) for line in lines[:-1]] if first == settings else []


def _join(args: argparse.Namespace) -> argparse.Namespace:
    """Meet the other processes of torchrun; returns `args` with this process's own GPU."""
    import datetime

    import torch

    torch.distributed.init_process_group("gloo", timeout=datetime.timedelta(days=7))
    if args.device == "cuda" and torch.cuda.is_available():
        return argparse.Namespace(**{**vars(args), "device": f"cuda:{os.environ['LOCAL_RANK']}"})
    return args


def _gather(answers: list[dict], world: int) -> list[dict]:
    """All processes' answers, in the questions' order."""
    import torch.distributed

    everyone: list = [None] * world
    torch.distributed.all_gather_object(everyone, answers)
    return [answer for own in everyone for answer in own]


def _leave() -> None:
    import torch.distributed

    torch.distributed.barrier()
    end_process_group()
