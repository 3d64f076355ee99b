"""The parts of fed.data that need no files: styles, names, products, sharing out."""

from __future__ import annotations

import doctest

import numpy as np
import pytest


def test_examples_in_docstrings():
    from fed.data import styles

    assert doctest.testmod(styles).attempted == 2
    assert not doctest.testmod(styles).failed


@pytest.mark.parametrize(
    ("text", "sentence", "words"),
    [
        ("A dog!  It runs.", "A dog!", "dog, runs"),
        ("no stop", "no stop", "stop"),
        ("it is on", "it is on", "it, is, on"),
        ("A man's T-shirt, 3.5 cm", "A man's T-shirt, 3.5 cm", "man's, t-shirt, 3, 5, cm"),
        ("...", "...", ""),
    ],
)
def test_forms_of_captions(text, sentence, words):
    from fed.data.styles import first_sentence, keywords

    assert (first_sentence(text), keywords(text)) == (sentence, words)


def test_client_names_are_what_clients_yaml_takes():
    from fed.data.cutting import client_names

    values = ["a b/c", "A-b-c", "", "pool", "heldout", "ünï", "x" * 200, "..", "a"]
    names = client_names(values)
    assert names == [
        "a-b-c",
        "A-b-c-2",
        "client",
        "pool-2",
        "heldout-2",
        "n",
        "x" * 80,
        "client-2",
        "a",
    ]


def test_products_name_their_parts_and_keep_who_is_left_out():
    from fed.data.cutting import Column, product

    a = Column(np.array([0, 1, -1, 1, 0], dtype=np.int32), ["x", "y"])
    b = Column(np.array([1, 0, 0, 1, -1], dtype=np.int32), ["p", "q"])
    both = product([a, b])
    assert [both.names[c] if c >= 0 else None for c in both.codes] == [
        "x x q",
        "y x p",
        None,
        "y x q",
        None,
    ]
    assert product([a]) is a


def test_dealing_is_even_and_skips_who_is_left_out():
    from fed.data.cutting import deal

    used = np.arange(100) % 10 != 3
    codes = deal(used, ["a", "b", "c", "d"], seed=1).codes
    assert np.bincount(codes[used]).tolist() == [23, 23, 22, 22]
    assert (codes[~used] == -1).all()
    assert (codes == deal(used, ["a", "b", "c", "d"], seed=1).codes).all()
    assert (codes != deal(used, ["a", "b", "c", "d"], seed=2).codes).any()


def test_what_is_held_out_does_not_depend_on_the_cut():
    from fed.data.cutting import hold_out

    used = np.ones(200, dtype=bool)
    assert hold_out(used, 0.1, 3).sum() == 20 == hold_out(used, 20, 3).sum()
    assert (hold_out(used, 0.1, 3) == hold_out(used, 20, 3)).all()
    assert not hold_out(used, 0, 3).any()


def test_minimum_is_of_what_is_left_after_holding_out():
    from fed.data.cutting import HELD_OUT, LEFT_OUT, Column, by_value

    column = Column(np.array([0] * 5 + [1] * 3 + [2, -1], dtype=np.int32), ["a", "b", "c"])
    held = np.zeros(10, dtype=bool)
    held[[0, 5, 8]] = True
    cut = by_value(column, held, minimum=3, rare="drop")
    assert cut.clients == ["a"]
    assert cut.owner.tolist() == [HELD_OUT, 0, 0, 0, 0] + [LEFT_OUT] * 5
    cut = by_value(column, held, minimum=3)
    assert cut.clients == ["a", "other"]
    assert cut.domains == ["a", "other", "other"]
    assert cut.owner.tolist() == [-2, 0, 0, 0, 0, -2, 1, 1, -2, -1]
