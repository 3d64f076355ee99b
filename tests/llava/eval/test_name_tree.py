"""Best-first search by hand, and against the scores of all names."""

from __future__ import annotations

import random

import pytest
import torch

from llava.eval.name_tree import Search, name_tree

END = 0


def run(search: Search, table) -> Search:
    """Go through a search; `table(beginning)` are the log-probabilities of what follows it."""
    while (node := search.wanted()) is not None:
        beginnings = [node.tokens[:i] for i in range(len(node.tokens) + 1)]
        search.expand(torch.stack([table(beginning) for beginning in beginnings]))
    return search


def fixed(*values: float):
    """The same log-probabilities everywhere."""
    return lambda beginning: torch.tensor(values)


def test_by_hand():
    # Token 1 costs 1, token 2 costs 2, the end costs a half.
    answers = {(2, END): 0, (1, 1, 2, END): 1, (1, 1, END): 2, (1, 2, END): 3}
    found = run(Search(name_tree(answers), best=3), fixed(-0.5, -1, -2)).found
    assert [name for name, _ in found] == [0, 2, 3]
    assert [score for _, score in found] == pytest.approx([-2.5, -2.5, -3.5])


def test_names_of_one_score_are_in_their_order():
    answers = {(3, END): 0, (1, END): 1, (2, 2, END): 2, (2, END): 3}
    found = run(Search(name_tree(answers), best=4), fixed(0.0, -1, -0.5, -1)).found
    assert found == [(3, -0.5), (0, -1.0), (1, -1.0), (2, -1.0)]


def test_an_answer_that_begins_another_one():
    answers = {(1,): 0, (1, 1): 1, (1, 1, 2): 2}
    found = run(Search(name_tree(answers)), fixed(0.0, -1, -3)).found
    assert found == [(0, -1.0), (1, -2.0), (2, -5.0)]


def test_it_ends_with_the_name_that_is_looked_for():
    answers = {(1, END): 0, (2, END): 1, (3, END): 2}
    search = run(Search(name_tree(answers), until=1), fixed(0.0, -1, -2, -3))
    assert [name for name, _ in search.found] == [0, 1]


def test_of_one_name_nothing_is_left_to_find():
    found = run(Search(name_tree({(1, 2, END): 4})), fixed(-0.5, -1, -2)).found
    assert found == [(4, -3.5)]


def test_few_beginnings_are_scored():
    """A tree of 10,000 names of which each token but one is unlikely."""
    answers = {(*map(int, f"{i:04d}"), 10): i for i in range(10_000)}
    likely = torch.full((11,), -20.0).index_fill_(0, torch.tensor([7, 10]), 0.0)
    search = run(Search(name_tree(answers), best=1), lambda beginning: likely)
    assert search.found == [(7777, 0.0)]
    assert search.expanded == 5


@pytest.mark.parametrize("seed", range(20))
def test_the_same_as_all_scores(seed):
    draw = random.Random(seed)
    drawn = [tuple(draw.choices(range(1, 4), k=draw.randint(1, 5))) for _ in range(40)]
    answers: dict[tuple[int, ...], int] = {}
    for i, answer in enumerate(drawn):
        answers.setdefault((*answer, END) if seed % 2 else answer, i)

    def table(beginning):
        generator = torch.Generator().manual_seed(hash((seed, beginning)) % 2**31)
        return torch.randint(-6, 0, (4,), generator=generator).float()  # many are equal

    def score(answer):
        return sum(float(table(answer[:i])[token]) for i, token in enumerate(answer))

    expected = sorted((-score(answer), name) for answer, name in answers.items())
    search = run(Search(name_tree(answers), best=7), table)
    assert search.found == [(name, -negative) for negative, name in expected[:7]]
