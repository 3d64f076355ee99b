from __future__ import annotations

from types import SimpleNamespace

import torch

from fed.clients.task import ClientTask
from fed.clients.update import Update
from fed.server.comparison import compare
from fed.server.round_metrics import curves, line_of_task, round_record, suspicions


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


def test_pictures_that_do_not_belong_to_their_captions_are_named():
    record = record_of(a=[1.0, 0, 0], b=[0, 1.1, 0], c=[0, 0.3, 0.8], d=[0, 0.5, 0.1])
    record["reliability"] = {"a": 0.5, "b": 0.6, "c": 0.1, "away": 0.1}
    assert list(suspicions(record)) == [
        "the pictures of client c explain 10 % of its captions, those of the others 50 %: do they "
        "belong together?",
        "d did not say what pictures explain; reliability: the others' mean",
    ]
    drawn = curves({**record, "heldout": {}, "seconds": {}})
    assert drawn["clients/c/reliability"] == 0.1


def test_two_of_a_round_are_compared_with_all_that_are_known():
    record = record_of(b=[1.0, 0, 0], c=[0, 0.3, 0.8])
    record["reliability"] = {"a": 0.5, "b": 0.6, "c": 0.1, "d": 0.5}
    (said,) = suspicions(record)
    assert said.startswith("the pictures of client c explain 10 %")
    record["reliability"] = {}
    assert list(suspicions(record)) == [
        "b, c did not say what pictures explain; reliability: 1 for all"
    ]


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
