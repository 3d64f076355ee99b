"""Where a picture's own name ranks among all candidate names.

Exact greedy words are a strict measure of a name that has synonyms; a rank among given names is
none. A name's score is the log-probability of all its tokens, the end included, given the picture.
It is not divided by their number: so it is the probability of the name.

The five best are found without scoring every name: the candidates' tokens make a prefix tree, a
name's score is at most that of its beginning, and so only beginnings that score better than the
fifth best name so far are looked at, the best ones first.
"""

from __future__ import annotations

import copy
import heapq
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from fed.clients.measures import Samples
from llava.constants import IGNORE_INDEX
from llava.errors import InputError

AMONG = 5
WIDTH = 16  # beginnings that are looked at together


@dataclass
class Node:
    """A beginning of names: the tokens that follow it, and the candidate that ends with it."""

    children: dict[int, Node] = field(default_factory=dict)
    ends: int | None = None


def prefix_tree(names: Sequence[Sequence[int]]) -> Node:
    """The tree of candidates' token ids; a leaf has the number of its candidate."""
    root = Node()
    for number, ids in enumerate(names):
        node = root
        for token in ids:
            node = node.children.setdefault(token, Node())
        node.ends = number
    return root


def rank(
    model: Any,
    dataset: Samples,
    collate: Callable[[list[dict]], dict],
    source: str,
    device: torch.device | str = "cpu",
) -> dict:
    """The share of samples whose own answer ranks first, and among the first five, of all answers.

    Args:
        model: a LLaVA in evaluation mode.
        dataset: of samples with one answer each, which ends them; candidates are its answers, each
            once.
        source: its name, for messages.

    Returns:
        `first` and `among_five` (shares of the samples) and `candidates` (their number).

    Raises:
        InputError: a sample that has several answers, or none, or text behind its answer.
    """
    numbers: dict[tuple[int, ...], int] = {}
    own = []
    for i in range(len(dataset)):
        _, answer = _split(dataset[i], f"{source}, sample {i}")
        own.append(numbers.setdefault(tuple(answer.tolist()), len(numbers)))
    tree = prefix_tree(list(numbers))
    first = among = 0
    for i, wanted in enumerate(own):
        best = best_names(model, collate([dataset[i]]), tree, device)
        first += best[0] == wanted
        among += wanted in best
    samples = max(len(own), 1)
    return {"first": first / samples, "among_five": among / samples, "candidates": len(numbers)}


def _split(item: dict, who: str) -> tuple[torch.Tensor, torch.Tensor]:
    """What a sample is asked, and the tokens of its answer."""
    learnt = item["labels"] != IGNORE_INDEX
    start = int(learnt.int().argmax())
    if not learnt.any() or not learnt[start:].all():
        raise InputError(f"{who}: expected one answer, which ends it, to rank it among the others")
    return item["input_ids"][:start], item["labels"][start:]


@torch.no_grad()
def best_names(model: Any, batch: dict, tree: Node, device: torch.device | str) -> list[int]:
    """The five best candidates of one sample, the best first; of equal ones the earlier first.

    Args:
        batch: the sample alone, as it is trained on.
    """
    scores, cache, length = _asked(model, batch, device)
    # (-score, tokens, node): what may still hold one of the five best, the likeliest first.
    open_: list[tuple[float, tuple[int, ...], Node]] = []
    found: list[tuple[float, int]] = []

    def look(path: tuple[int, ...], node: Node, score: float, following: torch.Tensor) -> None:
        for token, child in node.children.items():
            worse = score - float(following[token])
            if child.ends is not None:
                found.append((worse, child.ends))
            if child.children:
                heapq.heappush(open_, (worse, (*path, token), child))

    look((), tree, 0.0, scores)
    while open_:
        bound = sorted(found)[AMONG - 1][0] if len(found) >= AMONG else float("inf")
        looked_at: list[tuple[float, tuple[int, ...], Node]] = []
        while open_ and len(looked_at) < WIDTH and open_[0][0] <= bound:
            looked_at.append(heapq.heappop(open_))
        if not looked_at:
            break
        paths = [path for _, path, _ in looked_at]
        for (score, path, node), row in zip(
            looked_at, _following(model, paths, cache, length, device), strict=True
        ):
            look(path, node, score, row)
    return [number for _, number in sorted(found)[:AMONG]]


def _asked(model, batch: dict, device) -> tuple[torch.Tensor, Any, int]:
    """After the question and its picture: log-probabilities of what follows, cache, its length."""
    batch = {k: v.to(device) if torch.is_tensor(v) else v for k, v in batch.items()}
    length = int(batch["label_positions"][0]) + 1
    kept = ("images", "image_positions", "image_sizes")
    asked = {key: batch[key] for key in kept if key in batch}
    outputs = model(input_ids=batch["input_ids"][:, :length], use_cache=True, **asked)
    return outputs.logits[0, -1].float().log_softmax(-1).cpu(), outputs.past_key_values, length


def _following(
    model, paths: list[tuple[int, ...]], cache: Any, length: int, device
) -> list[torch.Tensor]:
    """Log-probabilities (vocabulary,) of what follows each beginning."""
    longest = max(map(len, paths))
    rows = [[*path, *[0] * (longest - len(path))] for path in paths]
    held = copy.deepcopy(cache)
    held.batch_repeat_interleave(len(paths))
    logits = model(
        input_ids=torch.tensor(rows, device=device), past_key_values=held, use_cache=True
    ).logits
    last = torch.tensor([len(path) - 1 for path in paths], device=device)
    chosen = logits[torch.arange(len(paths), device=device), last]
    return list(chosen.float().log_softmax(-1).cpu())
