from __future__ import annotations

import torch

from fed.server.comparison import compare
from fed.server.round_metrics import suspicions


def record_of(**updates):
    ends = [{"w": torch.tensor(update)} for update in updates.values()]
    start = {"w": torch.zeros(3)}
    compared = compare([start] * len(ends), ends, [1] * len(ends))
    return {"clients": {name: {"samples": 1} for name in updates}, **compared.facts()}


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
    absent = record_of(**honest, asleep=[0.0, 0, 0])
    absent["clients"]["asleep"]["samples"] = 0
    assert list(suspicions(absent)) == []
