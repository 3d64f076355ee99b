"""The likeliest names of a picture among many, found exactly without scoring them all.

A name's score is the log-probability of its whole answer, end included:

    s(name) = sum_j log p(t_j | picture, question, t_1 … t_{j-1})

which is what training maximises, and a distribution over all answers, as each has an end. It falls
along every answer. So in the tree of all answers the score of a beginning bounds those of all names
that begin so, and best-first search finds the names from the likeliest down. A mean over tokens
would not be bounded so, and prefers long names whose later tokens follow from the earlier ones.

Names of the same score are in the order of their numbers.
"""

from __future__ import annotations

import heapq
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import groupby
from typing import NamedTuple

import torch

Tokens = tuple[int, ...]


@dataclass(frozen=True)
class Node:
    """A place where answers part or one ends: its tokens from the root, and the name that ends."""

    tokens: Tokens
    name: int | None
    children: list[Node]


def name_tree(answers: Mapping[Tokens, int]) -> Node:
    """The tree of all answers, each the tokens of a name's number; at least one."""
    return _grown(sorted(answers.items()))


def _grown(sorted_answers: Sequence[tuple[Tokens, int]]) -> Node:
    (low, name), (high, _) = sorted_answers[0], sorted_answers[-1]
    shared = len(os.path.commonprefix([low, high]))
    ends = len(low) == shared
    groups = groupby(sorted_answers[ends:], key=lambda answer: answer[0][shared])
    children = [_grown(list(group)) for _, group in groups]
    return Node(low[:shared], name if ends else None, children)


class _Entry(NamedTuple):
    """What may come next, the least first: a name that is scored, or a node as a bound of others.

    At the same score a bound comes first, as a name below it may be an earlier one.
    """

    negative_score: float
    is_name: bool
    name: int  # of a node the number of its entry: it decides nothing but is unique
    node: Node | None = None
    scored: int = 0  # of the node's tokens


@dataclass
class Search:
    """The search for one picture: `wanted` says what to score, `expand` is told of it.

    `found` are the likeliest names and their scores, best first; it grows until it has `best` of
    them, or `until`. `expanded` counts the beginnings that were scored.
    """

    tree: Node
    best: int = 5
    until: int | None = None
    found: list[tuple[int, float]] = field(default_factory=list)
    expanded: int = 0

    def __post_init__(self) -> None:
        self._heap: list[_Entry] = []
        self._pushed = 0
        self._push_node(0.0, self.tree, 0)

    def wanted(self) -> Node | None:
        """The next node whose tokens are to be scored; None when the search is over."""
        while self._heap and len(self.found) < self.best:
            entry = self._heap[0]
            if not entry.is_name:
                return entry.node
            heapq.heappop(self._heap)
            self.found.append((entry.name, -entry.negative_score))
            if entry.name == self.until:
                break
        self._heap.clear()
        return None

    def expand(self, log_probs: torch.Tensor) -> None:
        """Go on from the wanted node.

        Args:
            log_probs: (at least 1 + its tokens, vocabulary): the first row is for the first token
                of an answer, the next one for what follows it, and so on.
        """
        entry = heapq.heappop(self._heap)
        node, score = entry.node, -entry.negative_score
        assert node is not None, "`wanted` comes before"
        self.expanded += 1
        length = len(node.tokens)
        places = range(entry.scored, length)
        score += sum(log_probs[places, [node.tokens[j] for j in places]].tolist())
        if node.name is not None:
            heapq.heappush(self._heap, _Entry(-score, True, node.name))
        following = [child.tokens[length] for child in node.children]
        scores = log_probs[length, following].tolist()
        for child, more in zip(node.children, scores, strict=True):
            self._push_node(score + more, child, length + 1)

    def _push_node(self, score: float, node: Node, scored: int) -> None:
        if node.name is not None and not node.children and scored == len(node.tokens):
            heapq.heappush(self._heap, _Entry(-score, True, node.name))
            return
        self._pushed += 1
        heapq.heappush(self._heap, _Entry(-score, False, self._pushed, node, scored))
