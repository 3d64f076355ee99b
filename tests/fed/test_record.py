from __future__ import annotations

import pytest
import torch

from fed.record import update_cosines


def test_cosines_are_those_of_all_tensors_as_one_vector(monkeypatch):
    monkeypatch.setattr("fed.record._CHUNK", 5)
    shapes = {"weight": (3, 4), "bias": (3,), "scale": ()}
    torch.manual_seed(0)
    starts = [{name: torch.randn(shape) for name, shape in shapes.items()} for _ in range(3)]
    ends = [{name: torch.randn(shape) for name, shape in shapes.items()} for _ in range(2)]
    ends.append(starts[2])  # an update of zero
    cosines = update_cosines(starts, ends)
    a, b = (
        torch.cat([(e[n] - s[n]).flatten() for n in shapes])
        for s, e in zip(starts[:2], ends[:2], strict=True)
    )
    assert cosines[0][1] == pytest.approx(float(torch.cosine_similarity(a, b, dim=0)), abs=1e-6)
    assert cosines[0][0] == cosines[1][1] == pytest.approx(1)
    assert [row[2] for row in cosines] == cosines[2] == [None, None, None]
    assert update_cosines([], []) == []
