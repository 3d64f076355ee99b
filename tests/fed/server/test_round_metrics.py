from __future__ import annotations

import math
from types import SimpleNamespace

import pytest
import torch

from fed.clients.task import ClientTask
from fed.clients.update import Update
from fed.server.round_metrics import (
    cosines_of,
    curves,
    drift_of,
    line_of_task,
    round_record,
    suspicions,
    update_products,
)
from tests.conftest import near


def test_cosines_are_those_of_all_tensors_as_one_vector(monkeypatch):
    monkeypatch.setattr("fed.numerics.chunks.CHUNK", 5)
    shapes = {"weight": (3, 4), "bias": (3,), "scale": ()}
    torch.manual_seed(0)
    starts = [{name: torch.randn(shape) for name, shape in shapes.items()} for _ in range(3)]
    ends = [{name: torch.randn(shape) for name, shape in shapes.items()} for _ in range(2)]
    ends.append(starts[2])  # an update of zero
    cosines = cosines_of(update_products(starts, ends))
    a, b = (
        torch.cat([(e[n] - s[n]).flatten() for n in shapes])
        for s, e in zip(starts[:2], ends[:2], strict=True)
    )
    assert cosines[0][1] == pytest.approx(float(torch.cosine_similarity(a, b, dim=0)), abs=1e-6)
    assert [cosines[0][0], cosines[1][1]] == near([1, 1])
    assert [row[2] for row in cosines] == cosines[2] == [None, None, None]
    assert cosines_of(update_products([], [])) == []


def products(*updates):
    rows = torch.tensor(updates, dtype=torch.float64)
    return rows @ rows.T


def test_drift_by_hand():
    assert drift_of(products([1, 0], [1, 0]), [1, 3]) == pytest.approx(0, abs=1e-7)  # a root
    assert drift_of(products([1, 0], [0, 1]), [1, 1]) == pytest.approx(0.5**0.5)
    assert drift_of(products([1, 0], [-1, 0]), [1, 1]) == near(1)
    # mean (0.25, 0.75): 1 - 0.625 over the mean square 1
    assert drift_of(products([1, 0], [0, 1]), [1, 3]) == pytest.approx(0.375**0.5)
    assert drift_of(products([0, 0], [0, 0]), [1, 1]) is None
    assert drift_of(products([1.0, 2.0]), [5]) == pytest.approx(0, abs=1e-7)


def record_of(**updates):
    found = products(*updates.values())
    return {
        "clients": {name: {"samples": 1} for name in updates},
        "norms": found.diagonal().sqrt().tolist(),
        "cosines": cosines_of(found),
    }


def test_who_should_be_looked_at():
    honest = dict(a=[1.0, 0, 0], b=[0, 1.1, 0], c=[0, 0.3, 0.8])
    assert list(suspicions(record_of(**honest))) == []
    said = list(
        suspicions(record_of(**honest, lazy=[0.0, 0, 0], loud=[1e6, 0, 0], copy=[1.0, 0, 0]))
    )
    assert said == [
        "client lazy sent back just what it was sent",
        "client loud's update is 1000000 times as long as the median one",
        "clients a and copy sent the same update",
    ]
    # The kernels of some processors give the products of equal updates with unequal last digits.
    rounded = record_of(**honest, copy=[1.0, 0, 0])
    rounded["norms"][-1] = math.nextafter(1.0, 2.0)
    assert list(suspicions(rounded)) == ["clients a and copy sent the same update"]
    absent = record_of(**honest, asleep=[0.0, 0, 0])
    absent["clients"]["asleep"]["samples"] = 0
    assert list(suspicions(absent)) == []


def test_a_driver_that_gives_no_metrics(tmp_path):
    tasks, updates = [], {}
    for name, end, metrics in (("a", 1.0, {}), ("b", 2.0, {"loss": 0.5, "seconds": 3.0})):
        client = SimpleNamespace(name=name)
        tasks.append(ClientTask(client, {"w": torch.zeros(1)}, 1, tmp_path))
        updates[name] = Update({"w": torch.tensor([end])}, 4, metrics)
    record = round_record(1, tasks, updates, {}, heldout={}, seconds={"training": 3.0})
    assert record["clients"]["a"] == {"samples": 4}
    drawn = curves(record)
    assert {n: v for n, v in drawn.items() if n.endswith("/loss")} == {"clients/b/loss": 0.5}
    assert "loss unknown" in line_of_task(tasks[0], 2, updates["a"])
