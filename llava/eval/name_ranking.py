"""Which of all candidate names a model gives a picture: `name_tree` on the samples of a data set.

A sample asks for its last answer, given its pictures and all that is said before. These are run
once; after that a beginning of an answer costs no more than its own tokens.
"""

from __future__ import annotations

import copy
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch.nn.utils.rnn import pad_sequence

from llava.constants import DEFAULT_IMAGE_TOKEN, IGNORE_INDEX
from llava.errors import InputError
from llava.eval.name_tree import Node, Search, Tokens, name_tree
from llava.train.data import LazySupervisedDataset
from llava.train.preprocess import SPEAKERS


class Ranked(NamedTuple):
    """The likeliest names of a sample and their scores (nats), best first, down to its own.

    `rank` is that of its own name, from 1 on; None where it is not among them. `expanded` is of
    `Search`.
    """

    names: list[str]
    scores: list[float]
    rank: int | None
    expanded: int


class _Question(NamedTuple):
    """What is said before an answer: ids, a picture being one -200, and how many it shows.

    `answers`: the tree of all names, `numbers` theirs in it, `longest` the most tokens of one.
    """

    prompt: torch.Tensor
    pictures: int
    answers: Node
    numbers: dict[str, int]
    longest: int


def names_of(data: LazySupervisedDataset) -> list[str]:
    """The distinct last answers of the samples with pictures, in their order."""
    every = (_split(record) for record in data.records)
    return list(dict.fromkeys(name for _, pictures, name in every if pictures))


@torch.no_grad()
def rank_names(
    model: Any,
    data: LazySupervisedDataset,
    collate: Callable[[list[dict]], dict],
    names: Sequence[str],
    batch_size: int = 16,
    best: int = 5,
) -> list[Ranked | None]:
    """The `best` names of every sample, down to its own one; None for a sample of text alone.

    Args:
        model: a LLaVA in `eval` mode.

    Raises:
        InputError: a sample's own name is not among `names`, or one is too long for the model.
    """
    found: list[Ranked | None] = [None] * len(data)
    size = 1 if data.sample_format.tiling else batch_size  # whose prompts differ in length
    for question_of in _alike(data, names):
        for start in range(0, len(question_of), size):
            batch = dict(list(question_of.items())[start : start + size])
            own = {i: q.numbers[_split(data.records[i])[2]] for i, q in batch.items()}
            searches = [Search(q.answers, best, until=own[i]) for i, q in batch.items()]
            inputs = collate([_prompt(q, data[i]) for i, q in batch.items()])
            longest = max(q.longest for q in batch.values()) + inputs["input_ids"].shape[1]
            if longest > data.tokenizer.model_max_length:
                raise InputError(
                    f"{data.source}: a candidate name makes {longest} tokens, "
                    f"model_max_length is {data.tokenizer.model_max_length}"
                )
            search_together(model, inputs, searches)
            for i, search in zip(batch, searches, strict=True):
                found[i] = _ranked(search, names)
    return found


def _alike(data: LazySupervisedDataset, names: Sequence[str]) -> Iterator[dict[int, _Question]]:
    """The samples with pictures and their questions, in groups of one length."""
    known: dict[str, _Question] = {}
    groups: dict[tuple[int, int], dict[int, _Question]] = defaultdict(dict)
    listed = set(names)
    for i, record in enumerate(data.records):
        before, pictures, name = _split(record)
        if not pictures:
            continue
        if name not in listed:
            raise InputError(f"{data.name(i)}: {name!r} is not among the candidate names")
        if (key := repr(before)) not in known:
            known[key] = _question(data, i, names)
        question = known[key]
        groups[len(question.prompt), pictures][i] = question
    yield from groups.values()


def _split(record: dict[str, Any]) -> tuple[list[dict], int, str]:
    """The turns before the last answer that says something, their pictures, and the answer."""
    turns = record["conversations"]
    answers = (i for i, turn in enumerate(turns) if turn["from"] == SPEAKERS[1])
    last = max(i for i in answers if turns[i]["value"].strip())
    shown = sum(turn["value"].count(DEFAULT_IMAGE_TOKEN) for turn in turns[:last])
    return turns[:last], shown, turns[last]["value"]


def _question(data: LazySupervisedDataset, index: int, names: Sequence[str]) -> _Question:
    """The question of a sample, with each name as its answer."""
    before, pictures, _ = _split(data.records[index])
    images = data.records[index]["image"]
    shown = images[:pictures] if isinstance(images, list) else images
    records = [
        {"image": shown, "conversations": [*before, {"from": SPEAKERS[1], "value": name}]}
        for name in names
    ]
    asked = LazySupervisedDataset(
        records, data.tokenizer, data.data_args, sample_format=data.sample_format
    )
    answers: dict[Tokens, int] = {}
    numbers: dict[str, int] = {}
    prompts = set()
    for i, name in enumerate(names):
        ids, labels = asked.tokens(i)
        begin, end = _last_run(labels != IGNORE_INDEX)
        prompts.add(tuple(ids[:begin].tolist()))
        numbers[name] = answers.setdefault(tuple(ids[begin:end].tolist()), i)
    if len(prompts) > 1:
        raise InputError(f"{data.name(index)}: the question's tokens depend on the answer")
    longest = max(map(len, answers))
    return _Question(torch.tensor(prompts.pop()), pictures, name_tree(answers), numbers, longest)


def _last_run(learnt: torch.Tensor) -> tuple[int, int]:
    """Begin and end of the last places in a row that are true."""
    end = int(learnt.nonzero()[-1]) + 1
    before = (~learnt[:end]).nonzero()
    return (int(before[-1]) + 1 if len(before) else 0), end


def _prompt(question: _Question, item: dict[str, Any]) -> dict[str, Any]:
    """A sample up to its last answer."""
    keys = item.keys() & {"images", "image_tokens", "image_sizes"}
    pictures: dict[str, Any] = {key: item[key][: question.pictures] for key in keys}
    labels = torch.full_like(question.prompt, IGNORE_INDEX)
    return {"input_ids": question.prompt, "labels": labels, **pictures}


def search_together(model: Any, inputs: dict[str, Any], searches: Sequence[Search]) -> None:
    """Go through the searches of a batch, a node of each at a time.

    Args:
        inputs: the collated prompts, a row a search, all of one length.
    """
    inputs = {k: v.to(model.device) if torch.is_tensor(v) else v for k, v in inputs.items()}
    *_, embeds, _ = model.prepare_inputs_labels_for_multimodal(
        inputs["input_ids"], None, None, None, None, inputs["images"], inputs.get("image_sizes"),
        image_positions=inputs["image_positions"],
    )  # fmt: skip
    # The last position is run with each beginning, for it gives the first token of an answer.
    seen, last = embeds[:, :-1], embeds[:, -1:]
    cache = None
    if seen.shape[1]:
        cache = model.get_model()(inputs_embeds=seen, use_cache=True).past_key_values
    active = list(searches)
    while True:
        wanted = [search.wanted() for search in active]
        nodes = [node for node in wanted if node is not None]
        if not nodes:
            return
        if len(nodes) < len(active):
            kept = torch.tensor([i for i, node in enumerate(wanted) if node], device=last.device)
            active, last = [active[i] for i in kept.tolist()], last[kept]
            if cache is not None:
                cache.batch_select_indices(kept)
        beginnings = [torch.tensor(node.tokens, dtype=torch.long) for node in nodes]
        # Padding on the right is seen by nothing before it.
        tokens = pad_sequence(beginnings, batch_first=True).to(last.device)
        logits = model(
            inputs_embeds=torch.cat([last, model.get_input_embeddings()(tokens)], 1),
            past_key_values=copy.deepcopy(cache),  # a forward pass adds to what it is given
            use_cache=cache is not None,
        ).logits
        for search, row in zip(active, logits.float().log_softmax(-1).cpu(), strict=True):
            search.expand(row)


def _ranked(search: Search, names: Sequence[str]) -> Ranked:
    order = [name for name, _ in search.found]
    rank = order.index(search.until) + 1 if search.until in order else None
    scores = [score for _, score in search.found]
    return Ranked([names[i] for i in order], scores, rank, search.expanded)
