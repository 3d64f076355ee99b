from __future__ import annotations

import math

import pytest
import torch

from fed.server import comparison
from fed.server.comparison import compare

SHAPES = {"weight": (3, 4), "bias": (3,), "scale": ()}


def states(count: int, seed: int) -> list[dict]:
    draw = torch.Generator().manual_seed(seed)
    return [
        {name: torch.randn(shape, generator=draw) for name, shape in SHAPES.items()}
        for _ in range(count)
    ]


def vectors(starts: list[dict], ends: list[dict]) -> torch.Tensor:
    """Updates as rows, float64."""
    return torch.stack(
        [
            torch.cat([(e[n].double() - s[n].double()).flatten() for n in SHAPES])
            for s, e in zip(starts, ends, strict=True)
        ]
    )


@pytest.mark.parametrize("block", [2**21, 9])
def test_all_tensors_are_one_vector(monkeypatch, block):
    monkeypatch.setattr(comparison, "BLOCK", block)
    starts, ends = states(3, 0), states(2, 1)
    ends.append(starts[2])  # an update of zero
    found = compare(starts, ends, [1, 2, 3])
    x = vectors(starts, ends)
    mean = torch.tensor([1, 2, 3]).double() / 6 @ x
    cosine = torch.cosine_similarity
    assert found.norms == pytest.approx(x.norm(dim=1).tolist(), rel=1e-6)
    assert found.cosines[0][1] == pytest.approx(float(cosine(x[0], x[1], dim=0)), abs=2e-6)
    assert [found.cosines[0][0], found.cosines[1][1]] == pytest.approx([1, 1], abs=2e-6)
    assert [row[2] for row in found.cosines] == found.cosines[2] == [None, None, None]
    assert found.to_mean[:2] == pytest.approx(cosine(x[:2], mean, dim=1).tolist(), abs=2e-6)
    assert found.to_mean[2] is None
    assert found.copies == []


def test_nobody_has_nothing_to_compare():
    found = compare([], [], [])
    assert found.facts() == {"norms": [], "cosines": [], "drift": None, "copies": []}


def drift(*updates, weights) -> float | None:
    ends = [{"w": torch.tensor(update)} for update in updates]
    return compare([{"w": torch.zeros(2)}] * len(ends), ends, weights).drift


def test_drift_by_hand():
    assert drift([1.0, 0], [1.0, 0], weights=[1, 3]) == pytest.approx(0, abs=1e-3)  # a root
    assert drift([1.0, 0], [0.0, 1], weights=[1, 1]) == pytest.approx(0.5**0.5)
    assert drift([1.0, 0], [-1.0, 0], weights=[1, 1]) == pytest.approx(1)
    # mean (0.25, 0.75): 1 - 0.625 over the mean square 1
    assert drift([1.0, 0], [0.0, 1], weights=[1, 3]) == pytest.approx(0.375**0.5)
    assert drift([0.0, 0], [0.0, 0], weights=[1, 1]) is None
    assert drift([1.0, 0], [0.0, 1], weights=[0, 0]) is None
    assert drift([1.0, 2], weights=[5]) == pytest.approx(0, abs=1e-3)
    assert drift([1.0, 2], weights=[0]) is None


def test_small_updates_of_large_weights_and_large_ones_have_lengths():
    for size in (1e-25, 1e25):
        found = compare([{"w": torch.zeros(2)}], [{"w": torch.tensor([3 * size, 4 * size])}], [1])
        assert found.norms == pytest.approx([5 * size], rel=1e-6)
        assert found.cosines == [[1.0]]
        assert found.drift == pytest.approx(0, abs=1e-3)


def test_copies_are_found_from_whatever_they_started():
    starts, ends = states(4, 2), states(4, 3)
    ends[2] = {n: t.clone() for n, t in ends[0].items()}
    starts[2] = starts[0]
    assert compare(starts, ends, [1] * 4).copies == [(0, 2)]


def test_many_clients_are_compared_by_sketches(monkeypatch):
    monkeypatch.setattr(comparison, "PAIRWISE", 5)
    starts, ends = states(6, 4), states(6, 5)
    ends[4], starts[4] = ends[1], starts[1]
    found = compare(starts, ends, [1, 1, 1, 1, 1, 2])
    x = vectors(starts, ends)
    mean = torch.tensor([1, 1, 1, 1, 1, 2]).double() / 7 @ x
    assert found.cosines is None
    assert found.copies == [(1, 4)]
    assert found.norms == pytest.approx(x.norm(dim=1).tolist(), rel=1e-6)
    assert found.facts()["to_mean"] == found.to_mean
    cosines = torch.cosine_similarity(x, mean, dim=1).tolist()
    assert found.to_mean == pytest.approx(cosines, abs=2e-6)
    p = torch.tensor([1, 1, 1, 1, 1, 2]).double() / 7
    apart = float(p @ (x - mean).square().sum(1)) / float(p @ x.square().sum(1))
    assert found.drift == pytest.approx(math.sqrt(apart), rel=1e-6)


def test_a_sketch_keeps_inner_products():
    draw = torch.Generator().manual_seed(6)
    rows = torch.randn(3, 5000, generator=draw)
    rows[1] += rows[0]
    sketch = comparison._sketch(rows, torch.Generator().manual_seed(0)).double()
    assert sketch.shape == (3, comparison.SKETCH)
    found = torch.nn.functional.cosine_similarity(sketch[0], sketch[1], dim=0)
    expected = torch.nn.functional.cosine_similarity(rows[0], rows[1], dim=0)
    assert float(found) == pytest.approx(float(expected), abs=5 / comparison.SKETCH**0.5)
